/**
 * Shows the nuclei that `patchcl-qp run` found, in the open image; or, with 'Run > Run for project',
 * in every image chosen there.
 *
 * What an earlier import added is taken out first, but for objects that a person has changed since:
 * those, and everything else in the image, stay as they are. Nuclei that a person deleted stay
 * deleted, and new nuclei that lie on a kept object are left out. So the script may be run as often
 * as one likes.
 *
 * Each image gets a receipt, patchcl/imported/<image id>.json: without one, its import failed.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.security.MessageDigest
import java.time.OffsetDateTime
import org.locationtech.jts.index.strtree.STRtree
import org.slf4j.LoggerFactory
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObject
import qupath.lib.scripting.QP

// ---------------------------------------------------------------- settings
double maxOverlap = 0.5   // a new nucleus is left out if its IoU with a kept object is above this
String folderName = 'patchcl'   // where patchcl-qp leaves its results, beside project.qpproj
// -------------------------------------------------------------------------

def logger = LoggerFactory.getLogger('import_nuclei')
def imageData = QP.getCurrentImageData()
def entry = QP.getProjectEntry()
if (imageData == null || entry == null) {
    logger.warn('Open an image of a project first, or choose Run > Run for project.')
    return
}
String name = entry.getImageName()
Path folder = Paths.get(QP.PROJECT_BASE_DIR, folderName)
Path results = folder.resolve('results').resolve(entry.getID())
Path resultFile = results.resolve('result.json')
if (!Files.exists(resultFile)) {
    logger.warn("No nuclei for ${name}: run 'patchcl-qp run' on this project first (looked for ${resultFile}).")
    return
}
def result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
Path receiptFile = folder.resolve('imported').resolve("${entry.getID()}.json".toString())
Map<String, String> receipt = readReceipt(receiptFile)
def hierarchy = imageData.getHierarchy()

// Read everything before anything is changed: a damaged file must not cost the nuclei shown now.
List<PathObject> nuclei = result.getAsJsonArray('files').collectMany { file ->
    PathIO.readObjects(results.resolve(file.getAsString()))
}
if (nuclei.size() != result.get('nuclei').getAsInt())
    throw new IOException("${results} is damaged: run 'patchcl-qp run' again to write it anew.")

// Ours are the objects that the receipt names; untouched if they are what the receipt says.
List<PathObject> untouched = []
List<PathObject> kept = []
Set<String> present = []
for (pathObject in hierarchy.getAllObjects(false)) {
    String id = pathObject.getID().toString()
    present << id
    if (receipt[id] != null && receipt[id] == digest(pathObject))
        untouched << pathObject
    else if (pathObject.getROI()?.isArea())
        kept << pathObject
}
// None of them there: the import was never saved, and nobody deleted anything.
Set<String> deleted = receipt.keySet().any { it in present } ? receipt.keySet() - present : [] as Set

List<PathObject> added = withoutOverlap(nuclei.findAll { !(it.getID().toString() in deleted) }, kept, maxOverlap)
hierarchy.removeObjects(untouched, true)
hierarchy.addObjects(added)

Map<String, String> objects = added.collectEntries { [it.getID().toString(), digest(it)] }
deleted.each { objects[it] = receipt[it] }
kept.each { String id = it.getID().toString(); if (receipt[id] != null) objects[id] = receipt[id] }
writeReceipt(receiptFile, [
    image   : name,
    run     : result.get('run').getAsString(),
    imported: OffsetDateTime.now().toString(),
    added   : added.size(),
    removed : untouched.size(),
    kept    : kept.size(),
    deleted : deleted.size(),
    objects : objects,
])
logger.info("${name}: ${added.size()} nuclei added, ${untouched.size()} of an earlier import removed, " +
        "${kept.size()} other objects kept")


/** The receipt's objects, id -> digest as imported; empty where there is no receipt. */
static Map<String, String> readReceipt(Path file) {
    if (!Files.exists(file))
        return [:]
    def objects = JsonParser.parseString(Files.readString(file)).getAsJsonObject().getAsJsonObject('objects')
    return objects.entrySet().collectEntries { [it.getKey(), it.getValue().getAsString()] }
}

static void writeReceipt(Path file, Map receipt) {
    Files.createDirectories(file.getParent())
    Path temporary = Files.createTempFile(file.getParent(), file.getFileName().toString(), '.partial')
    Files.writeString(temporary, GsonTools.getInstance(true).toJson(receipt))
    Files.move(temporary, file, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE)
}

/**
 * What a person can change of an object: outline, class, name, description, lock.
 * Coordinates as float: that is how QuPath stores them, so the digest survives saving.
 */
static String digest(PathObject pathObject) {
    def text = new StringBuilder()
    for (point in pathObject.getROI().getAllPoints())
        text << (float) point.getX() << ' ' << (float) point.getY() << ' '
    text << pathObject.getPathClass() << '|' << pathObject.getName() << '|' << pathObject.isLocked()
    if (pathObject.isAnnotation())
        text << '|' << pathObject.getDescription()
    byte[] hash = MessageDigest.getInstance('SHA-256').digest(text.toString().getBytes(StandardCharsets.UTF_8))
    return hash.encodeHex().toString().substring(0, 16)
}

/** The nuclei whose overlap with each kept object, intersection over union, is at most maxOverlap. */
static List<PathObject> withoutOverlap(List<PathObject> nuclei, List<PathObject> kept, double maxOverlap) {
    if (kept.isEmpty())
        return nuclei
    def tree = new STRtree()
    kept.each { def geometry = it.getROI().getGeometry(); tree.insert(geometry.getEnvelopeInternal(), geometry) }
    return nuclei.findAll { nucleus ->
        def geometry = nucleus.getROI().getGeometry()
        !tree.query(geometry.getEnvelopeInternal()).any { other ->
            double shared = geometry.intersection(other).getArea()
            shared > maxOverlap * (geometry.getArea() + other.getArea() - shared)
        }
    }
}
