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
 * The nuclei lie in a locked annotation, 'PatchCL', that carries their number and density; in one for
 * each region where a run kept to regions (`--within`). The image shows what the last run found: one
 * that kept to regions replaces one of the whole image. After `patchcl-qp remove`, this script takes
 * out what it added, but for what a person changed.
 *
 * Each image gets a receipt, patchcl/imported/<image id>.json, which names the run that it shows.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonObject
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
import qupath.lib.objects.PathObjects
import qupath.lib.objects.hierarchy.PathObjectHierarchy
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
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
JsonObject result
List<PathObject> nuclei = []
try {
    result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
    for (file in result.getAsJsonArray('files'))
        nuclei.addAll(PathIO.readObjects(results.resolve(file.getAsString())))
    if (nuclei.size() != result.get('nuclei').getAsInt())
        throw new IOException("${nuclei.size()} of ${result.get('nuclei')} nuclei")
} catch (Exception e) {
    // Without its cause: QuPath would show that one's message in place of this.
    throw new IOException("The results of ${name} are damaged (${e.message}): run 'patchcl-qp run' again (${results}).")
}

def done = replaceNuclei(imageData, entry, nuclei, result, maxOverlap)

// QuPath saves after 'Run for project' and 'QuPath script --save', a person saves the open image.
boolean savedByQuPath = getBinding().getVariables()[ScriptAttributes.BATCH_SAVE]
boolean inWindow = QuPathGUI.getInstance() != null
if (!savedByQuPath && !inWindow)
    entry.saveImageData(imageData)
writeReceipt(folder.resolve('imported').resolve(entry.getID() + '.json'), [
    image   : name,
    run     : text(result, 'run'),
    imported: OffsetDateTime.now().toString(),
] + done)
logger.info("${name}: ${done.added} nuclei added, ${done.left_out} left out where a person decided otherwise, " +
        "${done.removed} of an earlier import removed, ${done.kept} other objects kept." +
        (inWindow && !savedByQuPath ? ' Save the image to keep them.' : ''))


/**
 * Puts nuclei in the place of those of earlier imports, and says how many were added, left out, removed
 * and kept. 'result' is what result.json says. patchcl-qp calls this, too, when it writes by itself.
 */
@CompileStatic
static Map<String, Integer> replaceNuclei(ImageData<?> imageData, ProjectImageEntry<?> entry, List<PathObject> nuclei,
                                          JsonObject result, double maxOverlap) {
    PathObjectHierarchy hierarchy = imageData.getHierarchy()
    Map<String, String> imported = readImported(imageData)
    Set<String> regionIds = imported.findAll { id, mark -> mark.endsWith(' region') }.keySet()

    // Untouched is what we imported and still looks so, with nothing within that we did not import;
    // a region may have anything within.
    Set<PathObject> oldRegions = new LinkedHashSet<>()
    Set<PathObject> untouched = new LinkedHashSet<>()
    List<PathObject> kept = []
    Set<String> keptIds = new HashSet<>()
    for (PathObject pathObject : hierarchy.getAllObjects(false)) {
        String id = pathObject.getID().toString()
        boolean isRegion = regionIds.contains(id)
        boolean drawnWithin = !isRegion &&
                pathObject.getChildObjects().any { PathObject child -> !imported.containsKey(child.getID().toString()) }
        if (drawnWithin || !imported[id]?.startsWith(digest(pathObject))) {
            kept << pathObject
            keptIds << id
        } else if (isRegion)
            oldRegions << pathObject
        else
            untouched << pathObject
    }

    // The rest of what we imported, a person changed or deleted: there the person's word counts.
    Map<String, String> decided = new LinkedHashMap<>(imported)
    decided.keySet().removeAll(regionIds)
    for (PathObject pathObject : untouched)
        decided.remove(pathObject.getID().toString())
    boolean forget = result.has('removed')   // by patchcl-qp remove
    if (forget || untouched.isEmpty() && Collections.disjoint(decided.keySet(), keptIds))
        decided.clear()   // all of it deleted: start afresh

    STRtree keptOutlines = new STRtree()
    for (PathObject pathObject : kept) {
        ROI roi = PathObjectTools.getROI(pathObject, true)
        if (roi?.isArea())
            keptOutlines.insert(envelope(roi), roi)
    }
    STRtree decidedPlaces = new STRtree()
    for (String mark : decided.values()) {
        Coordinate place = centroid(mark)
        decidedPlaces.insert(new Envelope(place), place)
    }
    List<PathObject> added = nuclei.findAll { PathObject nucleus ->
        !decided.containsKey(nucleus.getID().toString()) &&
                !coversAny(nucleus.getROI(), decidedPlaces) &&
                !overlapsAny(nucleus.getROI(), keptOutlines, maxOverlap)
    }

    Map<String, String> now = decided
    for (PathObject nucleus : added)
        now[nucleus.getID().toString()] = digestAndCentroid(nucleus)
    // What a person drew within an old region goes to where the nuclei go.
    List<PathObject> members = []
    for (PathObject region : oldRegions)
        members.addAll(region.getChildObjects().findAll { PathObject child -> !untouched.contains(child) })
    members.addAll(added)
    Set<PathObject> old = new LinkedHashSet<>(untouched)
    old.addAll(oldRegions)
    hierarchy.getSelectionModel().deselectObjects(old)
    hierarchy.removeObjects(old, true)
    List<PathObject> regions = forget ? [] as List<PathObject> : newRegions(imageData, entry, result)
    regions.removeAll { PathObject region -> keptIds.contains(region.getID().toString()) }   // a person changed it
    // Filled before they are in the hierarchy: there, QuPath takes long over many annotations.
    List<PathObject> elsewhere = share(members, regions)
    for (PathObject region : regions) {
        measure(region, imageData)
        now[region.getID().toString()] = digestAndCentroid(region) + ' region'
    }
    hierarchy.addObjects(elsewhere.findAll { PathObject pathObject -> pathObject.getParent() == null })   // new ones
    hierarchy.addObjects(regions)
    writeImported(imageData, now)
    return [added: added.size(), left_out: nuclei.size() - added.size(), removed: untouched.size(), kept: kept.size()]
}

/** What holds the nuclei: an annotation for each region that was analysed, or for the whole image. */
static List<PathObject> newRegions(ImageData<?> imageData, ProjectImageEntry<?> entry, JsonObject result) {
    String image = "PatchCL region of image ${entry.getID()}"
    if (!result.has('regions')) {
        def server = imageData.getServer()
        ROI whole = ROIs.createRectangleROI(0, 0, server.getWidth(), server.getHeight(), ImagePlane.getDefaultPlane())
        return [newRegion(image, whole, result, result)]
    }
    return result.getAsJsonArray('regions').collect {
        JsonObject part = it.getAsJsonObject()
        ROI roi = GsonTools.getInstance().fromJson(part.get('geometry'), ROI)
        newRegion("${image}: ${part.get('geometry')}", roi, part, result)
    }
}

/** Its id is the same always for one place of one image. */
static PathObject newRegion(String place, ROI roi, JsonObject part, JsonObject result) {
    PathObject region = PathObjects.createAnnotationObject(roi)
    region.setID(UUID.nameUUIDFromBytes(place.getBytes(StandardCharsets.UTF_8)))
    region.setName('PatchCL')
    region.setDescription("Nuclei found by patchcl-qp, run ${text(result, 'run')} (${text(result, 'made')})")
    region.setLocked(true)
    if (part.has('tissue_mm2'))
        region.getMeasurementList().put('PatchCL: Tissue mm^2', part.get('tissue_mm2').getAsDouble())
    return region
}

/** Puts objects into the regions that hold their centroids; returns those that lie in none. */
@CompileStatic
static List<PathObject> share(List<PathObject> objects, List<PathObject> regions) {
    STRtree places = new STRtree()
    for (PathObject region : regions)
        places.insert(envelope(region.getROI()), region)
    Map<PathObject, List<PathObject>> members = [:]
    List<PathObject> elsewhere = []
    for (PathObject pathObject : objects) {
        ROI roi = pathObject.getROI()
        double x = roi.getCentroidX()
        double y = roi.getCentroidY()
        PathObject region = (PathObject) places.query(new Envelope(new Coordinate(x, y))).find {
            ((PathObject) it).getROI().contains(x, y)
        }
        // A run decides by pixels, so the outline of a nucleus on the border can have its centroid outside.
        region = region ?: (PathObject) places.query(envelope(roi)).find {
            ((PathObject) it).getROI().getGeometry().intersects(roi.getGeometry())
        }
        if (region == null)
            elsewhere << pathObject
        else
            members.computeIfAbsent(region) { [] as List<PathObject> } << pathObject
    }
    members.each { PathObject region, List<PathObject> within -> region.addChildObjects(within) }
    return elsewhere
}

/** Counts the nuclei of a region; by its tissue, where that is known. */
static void measure(PathObject region, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    int count = region.getChildObjects().size()
    def measured = region.getMeasurementList()
    double area = measured.get('PatchCL: Tissue mm^2')   // NaN where there is none
    if (Double.isNaN(area) && pixels.hasPixelSizeMicrons()) {
        area = region.getROI().getScaledArea(pixels.getPixelWidthMicrons(), pixels.getPixelHeightMicrons()) / 1e6
        measured.put('PatchCL: Area mm^2', area)
    }
    measured.put('PatchCL: Nuclei', count)
    if (area > 0)
        measured.put('PatchCL: Nuclei per mm^2', count / area)
}

static String text(JsonObject result, String key) {
    return result.has(key) ? result.get(key).getAsString() : '?'
}

/**
 * What earlier imports added: id -> digest and centroid, and a word for what is a region. Kept among
 * the image's own properties, so that QuPath saves, discards and duplicates it together with the
 * objects themselves.
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

@CompileStatic
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
    def bytes = new ByteArrayOutputStream()
    def data = new DataOutputStream(bytes)
    ROI roi = pathObject.getROI()
    if (roi != null)
        for (Point2 point : roi.getAllPoints()) {
            data.writeFloat((float) point.getX())
            data.writeFloat((float) point.getY())
        }
    List<Object> rest = [pathObject.isAnnotation(), pathObject.getPathClass(), pathObject.getName(),
                         pathObject.getColor(), pathObject.isLocked()]
    if (pathObject instanceof PathAnnotationObject)
        rest << ((PathAnnotationObject) pathObject).getDescription()
    data.write(rest.toString().getBytes(StandardCharsets.UTF_8))
    byte[] hash = MessageDigest.getInstance('SHA-256').digest(bytes.toByteArray())
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
