/**
 * Shows the nuclei that `patchcl-qp run` found, in the open image; or, with 'Run > Run for project',
 * in every image chosen there. Without a window, the images are saved at once:
 *
 *     QuPath script -p project.qpproj import_nuclei.groovy
 *
 * It may be run as often as one likes. What an earlier import added is taken out first. What a person
 * drew or changed stays as it is, nuclei that a person deleted stay deleted, and new nuclei in either
 * place are left out. To have deleted ones back, delete all the nuclei, then run this again.
 *
 * Each image gets a receipt, patchcl/imported/<image id>.json, which names the run that it shows.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import groovy.transform.CompileStatic
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.security.MessageDigest
import java.time.OffsetDateTime
import org.locationtech.jts.geom.Coordinate
import org.locationtech.jts.geom.Envelope
import org.locationtech.jts.index.strtree.STRtree
import org.slf4j.LoggerFactory
import qupath.lib.geom.Point2
import qupath.lib.gui.QuPathGUI
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathAnnotationObject
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.roi.interfaces.ROI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

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
Path folder = Paths.get(QP.buildPathInProject(folderName))
Path results = folder.resolve('results').resolve(entry.getID())
Path resultFile = results.resolve('result.json')
if (!Files.exists(resultFile)) {
    logger.warn("No nuclei for ${name}: run 'patchcl-qp run' on this project first (looked for ${resultFile}).")
    return
}

// Read everything before anything is changed: a damaged file must not cost the nuclei shown now.
String run
List<PathObject> nuclei = []
try {
    def result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
    run = result.get('run').getAsString()
    for (file in result.getAsJsonArray('files'))
        nuclei.addAll(PathIO.readObjects(results.resolve(file.getAsString())))
    if (nuclei.size() != result.get('nuclei').getAsInt())
        throw new IOException("${nuclei.size()} of ${result.get('nuclei')} nuclei")
} catch (Exception e) {
    // Without its cause: QuPath would show that one's message in place of this.
    throw new IOException("The results of ${name} are damaged (${e.message}): run 'patchcl-qp run' again (${results}).")
}

// Untouched is what we imported and still looks so, with nothing within that we did not import.
def hierarchy = imageData.getHierarchy()
Map<String, String> imported = readImported(imageData)
Set<PathObject> untouched = []
List<PathObject> kept = []
Set<String> keptIds = []
for (pathObject in hierarchy.getAllObjects(false)) {
    String id = pathObject.getID()
    boolean drawnWithin = pathObject.getChildObjects().any { !imported.containsKey(it.getID().toString()) }
    if (!drawnWithin && imported[id]?.startsWith(digest(pathObject)))
        untouched << pathObject
    else {
        kept << pathObject
        keptIds << id
    }
}
// The rest of what we imported, a person changed or deleted: there the person's word counts.
Map<String, String> decided = new LinkedHashMap(imported)
untouched.each { decided.remove(it.getID().toString()) }
if (untouched.isEmpty() && !decided.keySet().any { it in keptIds })
    decided.clear()   // all of it deleted: start afresh

def keptOutlines = new STRtree()
for (roi in kept.collect { PathObjectTools.getROI(it, true) })
    if (roi?.isArea())
        keptOutlines.insert(envelope(roi), roi)
def decidedPlaces = new STRtree()
for (place in decided.values().collect { centroid(it) })
    decidedPlaces.insert(new Envelope(place), place)
List<PathObject> added = nuclei.findAll {
    !(it.getID().toString() in decided) &&
            !coversAny(it.getROI(), decidedPlaces) &&
            !overlapsAny(it.getROI(), keptOutlines, maxOverlap)
}

hierarchy.getSelectionModel().deselectObjects(untouched)
hierarchy.removeObjects(untouched, true)
hierarchy.addObjects(added)
writeImported(imageData, decided + added.collectEntries { [it.getID().toString(), digestAndCentroid(it)] })

// QuPath saves after 'Run for project' and 'QuPath script --save', a person saves the open image.
boolean savedByQuPath = getBinding().getVariables()[ScriptAttributes.BATCH_SAVE]
boolean inWindow = QuPathGUI.getInstance() != null
if (!savedByQuPath && !inWindow)
    entry.saveImageData(imageData)
int leftOut = nuclei.size() - added.size()
writeReceipt(folder.resolve('imported').resolve(entry.getID() + '.json'), [
    image   : name,
    run     : run,
    imported: OffsetDateTime.now().toString(),
    added   : added.size(),
    left_out: leftOut,
    removed : untouched.size(),
    kept    : kept.size(),
])
logger.info("${name}: ${added.size()} nuclei added, ${leftOut} left out where a person decided otherwise, " +
        "${untouched.size()} of an earlier import removed, ${kept.size()} other objects kept." +
        (inWindow && !savedByQuPath ? ' Save the image to keep them.' : ''))


/**
 * What earlier imports added: id -> digest and centroid. Kept among the image's own properties, so
 * that QuPath saves, discards and duplicates it together with the objects themselves.
 */
static Map<String, String> readImported(ImageData<?> imageData) {
    String lines = imageData.getProperty('patchcl.imported') ?: ''
    return lines.readLines().collectEntries { [it.substring(0, 36), it.substring(37)] }
}

static void writeImported(ImageData<?> imageData, Map<String, String> imported) {
    imageData.setProperty('patchcl.imported', imported.collect { id, mark -> id + ' ' + mark }.join('\n'))
}

static void writeReceipt(Path file, Map receipt) {
    Files.createDirectories(file.getParent())
    Path temporary = Files.createTempFile(file.getParent(), file.getFileName().toString(), '.partial')
    Files.writeString(temporary, GsonTools.getInstance(true).toJson(receipt))
    Files.move(temporary, file, StandardCopyOption.REPLACE_EXISTING)
}

static String digestAndCentroid(PathObject pathObject) {
    ROI roi = pathObject.getROI()
    return digest(pathObject) + ' ' + (float) roi.getCentroidX() + ' ' + (float) roi.getCentroidY()
}

static Coordinate centroid(String digestAndCentroid) {
    def (_, x, y) = digestAndCentroid.tokenize(' ')
    return new Coordinate(x as double, y as double)
}

/**
 * What a person can change of an object: kind, outline, class, name, colour, lock, description.
 * Coordinates as float: that is how QuPath saves them, so the digest survives saving.
 */
@CompileStatic
static String digest(PathObject pathObject) {
    def text = new StringBuilder()
    ROI roi = pathObject.getROI()
    if (roi != null)
        for (Point2 point : roi.getAllPoints())
            text.append((float) point.getX()).append(' ').append((float) point.getY()).append(' ')
    text.append([pathObject.isAnnotation(), pathObject.getPathClass(), pathObject.getName(), pathObject.getColor(),
                 pathObject.isLocked()])
    if (pathObject instanceof PathAnnotationObject)
        text.append(((PathAnnotationObject) pathObject).getDescription())
    byte[] hash = MessageDigest.getInstance('SHA-256').digest(text.toString().getBytes(StandardCharsets.UTF_8))
    return hash.encodeHex().toString().substring(0, 16)
}

@CompileStatic
static Envelope envelope(ROI roi) {
    return new Envelope(roi.getBoundsX(), roi.getBoundsX() + roi.getBoundsWidth(),
            roi.getBoundsY(), roi.getBoundsY() + roi.getBoundsHeight())
}

/** Whether one of the places lies inside the outline. */
@CompileStatic
static boolean coversAny(ROI roi, STRtree places) {
    return places.query(envelope(roi)).any { roi.contains(((Coordinate) it).x, ((Coordinate) it).y) }
}

/** Whether the intersection with one of the outlines is more than maxOverlap of the union. */
@CompileStatic
static boolean overlapsAny(ROI roi, STRtree outlines, double maxOverlap) {
    double area = roi.getArea()
    return outlines.query(envelope(roi)).any {
        ROI other = (ROI) it
        double otherArea = other.getArea()
        // Cheap first: the areas alone say that a nucleus is no match for a large annotation.
        if (Math.min(area, otherArea) <= maxOverlap * Math.max(area, otherArea))
            return false
        double shared = roi.getGeometry().intersection(other.getGeometry()).getArea()
        return shared > maxOverlap * (area + otherArea - shared)
    }
}
