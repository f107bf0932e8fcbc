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
 * After `patchcl-qp suggest` it also marks the fields that are worth correcting: locked annotations of class
 * 'PatchCL: correct here', in which all nuclei are annotations, to be put right. Whoever is done with one sets
 * its class to 'PatchCL: corrected'. Nothing that reaches into a field is added or taken out any more, but for
 * fields in which nobody changed anything: those go when others are suggested.
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
import javafx.application.Platform
import org.locationtech.jts.geom.Coordinate
import org.locationtech.jts.geom.Envelope
import org.locationtech.jts.index.strtree.STRtree
import org.slf4j.LoggerFactory
import qupath.lib.common.ColorTools
import qupath.lib.geom.Point2
import qupath.lib.gui.QuPathGUI
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathAnnotationObject
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.hierarchy.PathObjectHierarchy
import qupath.lib.projects.Project
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
JsonObject suggested = null
List<PathObject> nuclei = []
Path fieldsFile = folder.resolve('fields').resolve(entry.getID() + '.json')
try {
    result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
    for (file in result.getAsJsonArray('files'))
        nuclei.addAll(PathIO.readObjects(results.resolve(file.getAsString())))
    if (nuclei.size() != result.get('nuclei').getAsInt())
        throw new IOException("${nuclei.size()} of ${result.get('nuclei')} nuclei")
    if (Files.exists(fieldsFile))
        suggested = JsonParser.parseString(Files.readString(fieldsFile)).getAsJsonObject()
} catch (Exception e) {
    // Without its cause: QuPath would show that one's message in place of this.
    throw new IOException("The results of ${name} are damaged (${e.message}): run 'patchcl-qp run' again (${results}).")
}

def done = replaceNuclei(imageData, entry, nuclei, result, suggested, maxOverlap)
if (suggested != null)
    offer(QP.getProject(), fieldClasses())

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
        (suggested == null ? '' : " Fields to correct: ${done.fields} new, ${done.fields_kept} of before.") +
        (inWindow && !savedByQuPath ? ' Save the image to keep them.' : ''))


/**
 * Puts nuclei in the place of those of earlier imports, and says how many were added, left out, removed
 * and kept. 'result' is what result.json says; 'suggested' are the fields to correct, null without any.
 * patchcl-qp calls this, too, when it writes by itself.
 */
@CompileStatic
static Map<String, Integer> replaceNuclei(ImageData<?> imageData, ProjectImageEntry<?> entry, List<PathObject> nuclei,
                                          JsonObject result, JsonObject suggested, double maxOverlap) {
    PathObjectHierarchy hierarchy = imageData.getHierarchy()
    Map<String, String> imported = readImported(imageData)
    Set<String> regionIds = imported.findAll { id, mark -> mark.endsWith(' region') }.keySet()
    Map<String, String> fieldMarks = imported.findAll { id, mark -> mark.contains(' field ') }
    boolean forget = result.has('removed')   // by patchcl-qp remove

    // A field goes if it is suggested no longer, and nobody touched it or what is in it.
    List<PathObject> suggestions = forget || suggested == null ? [] as List<PathObject> :
            newFields(imageData, suggested)
    Collection<PathObject> all = hierarchy.getAllObjects(false)
    List<PathObject> oldFields = []
    List<PathObject> keptFields = []
    for (PathObject field : all) {
        String id = field.getID().toString()
        String mark = fieldMarks[id]
        if (mark == null && !isField(field))
            continue
        boolean touched = mark == null || !mark.startsWith(digest(field)) || !mark.endsWith(contents(field, all))
        if (touched || suggestions.any { PathObject suggestion -> suggestion.getID() == field.getID() })
            keptFields << field
        else
            oldFields << field
    }
    Set<PathObject> fields = new HashSet<>(oldFields)
    fields.addAll(keptFields)

    // Untouched is what we imported and still looks so, with nothing within that we did not import;
    // a region may have anything within. What reaches into a field is a person's now.
    Set<PathObject> oldRegions = new LinkedHashSet<>()
    Set<PathObject> untouched = new LinkedHashSet<>()
    List<PathObject> kept = []
    Set<String> keptIds = new HashSet<>()
    for (PathObject pathObject : all) {
        if (fields.contains(pathObject))
            continue
        String id = pathObject.getID().toString()
        boolean isRegion = regionIds.contains(id)
        boolean drawnWithin = !isRegion &&
                pathObject.getChildObjects().any { PathObject child -> !imported.containsKey(child.getID().toString()) }
        boolean inField = !isRegion && keptFields.any { PathObject field -> reaches(pathObject, field) }
        if (drawnWithin || inField || !imported[id]?.startsWith(digest(pathObject))) {
            kept << pathObject
            keptIds << id
        } else if (isRegion)
            oldRegions << pathObject
        else
            untouched << pathObject
    }

    // The rest of what we imported, a person changed or deleted, or has in a field: there the person's word counts.
    Map<String, String> decided = new LinkedHashMap<>(imported)
    decided.keySet().removeAll(regionIds)
    decided.keySet().removeAll(fieldMarks.keySet())
    for (PathObject pathObject : untouched)
        decided.remove(pathObject.getID().toString())
    if (forget || untouched.isEmpty() && Collections.disjoint(decided.keySet(), keptIds)) {
        decided.clear()   // all of it deleted: start afresh
        if (forget || keptFields.isEmpty())
            fieldMarks.clear()
    }

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
                !overlapsAny(nucleus.getROI(), keptOutlines, maxOverlap) &&
                !keptFields.any { PathObject field -> reaches(nucleus, field) }
    }
    // One that has a mark is there, or a person deleted it.
    List<PathObject> addedFields = suggestions.findAll { PathObject field ->
        !fieldMarks.containsKey(field.getID().toString()) &&
                !keptFields.any { PathObject other -> meet(field.getROI(), other.getROI()) }
    }
    added = added.collect { PathObject nucleus ->
        addedFields.any { PathObject field -> reaches(nucleus, field) } ? toAnnotation(nucleus) : nucleus
    }

    Map<String, String> now = decided
    for (PathObject nucleus : added)
        now[nucleus.getID().toString()] = digestAndCentroid(nucleus)
    for (PathObject field : keptFields + suggestions) {
        String id = field.getID().toString()
        if (fieldMarks.containsKey(id))
            now[id] = fieldMarks[id]
    }
    for (PathObject field : addedFields)
        now[field.getID().toString()] = digestAndCentroid(field) + ' field ' + contents(field, kept + added)

    hierarchy.getSelectionModel().deselectObjects(oldFields)
    hierarchy.removeObjects(oldFields, true)   // first: one may lie within a region, and hold others
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
    hierarchy.addObjects(addedFields)
    writeImported(imageData, now)
    return [added : added.size(), left_out: nuclei.size() - added.size(), removed: untouched.size(), kept: kept.size(),
            fields: addedFields.size(), fields_kept: keptFields.size()]
}

/** Classes of fields: of those to correct, and of those that are corrected. */
@CompileStatic
static List<PathClass> fieldClasses() {
    return [PathClass.fromString('PatchCL: correct here', ColorTools.packRGB(255, 140, 0)),
            PathClass.fromString('PatchCL: corrected', ColorTools.packRGB(0, 160, 80))]
}

@CompileStatic
static boolean isField(PathObject pathObject) {
    return pathObject.isAnnotation() && pathObject.getROI()?.isArea() &&
            fieldClasses().contains(pathObject.getPathClass())
}

/** The fields that patchcl-qp suggested; what is beyond the image is cut off. */
static List<PathObject> newFields(ImageData<?> imageData, JsonObject suggested) {
    def server = imageData.getServer()
    return suggested.getAsJsonArray('fields').collect {
        JsonObject part = it.getAsJsonObject()
        def (x, y, width, height) = ['x', 'y', 'width', 'height'].collect { key -> part.get(key).getAsDouble() }
        ROI roi = ROIs.createRectangleROI(x, y, Math.min(width, server.getWidth() - x),
                Math.min(height, server.getHeight() - y), ImagePlane.getDefaultPlane())
        PathObject field = PathObjects.createAnnotationObject(roi, fieldClasses().first())
        field.setID(UUID.fromString(text(part, 'id')))
        field.setName(text(part, 'name'))
        field.setDescription(text(part, 'description'))
        field.setLocked(true)
        field
    }
}

/** Has QuPath list classes where a person chooses one. */
static void offer(Project<?> project, List<PathClass> classes) {
    def gui = QuPathGUI.getInstance()
    if (gui != null) {
        def listed = gui.getAvailablePathClasses()   // the window keeps the project's list the same
        Platform.runLater { listed.addAll(classes.findAll { !listed.contains(it) }) }
        return
    }
    def usual = PathClass.StandardPathClasses   // which QuPath lists where a project has no list
    List<PathClass> listed = project.getPathClasses() ?: [
        usual.TUMOR, usual.STROMA, usual.IMMUNE_CELLS, usual.NECROSIS, usual.OTHER, usual.REGION, usual.IGNORE,
        usual.POSITIVE, usual.NEGATIVE,
    ]
    project.setPathClasses(listed + classes.findAll { !listed.contains(it) })
}

/** The same nucleus, for a person to reshape: QuPath lets nobody reshape a detection. */
@CompileStatic
static PathObject toAnnotation(PathObject nucleus) {
    if (nucleus.isAnnotation())
        return nucleus
    PathObject annotation = PathObjects.createAnnotationObject(
            nucleus.getROI(), nucleus.getPathClass(), nucleus.getMeasurementList())
    annotation.setID(nucleus.getID())
    return annotation
}

/** Whether an object is in a field, in part or whole; what is not much smaller is no nucleus. */
@CompileStatic
static boolean reaches(PathObject pathObject, PathObject field) {
    ROI roi = PathObjectTools.getROI(pathObject, true)
    return roi?.isArea() && meet(roi, field.getROI()) && roi.getArea() < field.getROI().getArea() / 2
}

/** Whether two outlines overlap or touch; their boxes say it of most, and cheaply. */
@CompileStatic
static boolean meet(ROI one, ROI other) {
    return envelope(one).intersects(envelope(other)) && one.getGeometry().intersects(other.getGeometry())
}

/** What a person can change of all that reaches into a field. */
@CompileStatic
static String contents(PathObject field, Collection<PathObject> objects) {
    List<String> within = []
    for (PathObject pathObject : objects)
        if (reaches(pathObject, field))
            within << pathObject.getID().toString() + digest(pathObject)
    return sha(within.sort().toString().getBytes(StandardCharsets.UTF_8))
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

/** Counts the nuclei of a region, also what QuPath put into a field; by its tissue, where that is known. */
static void measure(PathObject region, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    int count = region.getChildObjects().sum(0) { isField(it) ? it.nChildObjects() : 1 }
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
    return sha(bytes.toByteArray())
}

@CompileStatic
static String sha(byte[] bytes) {
    return MessageDigest.getInstance('SHA-256').digest(bytes).encodeHex().toString().substring(0, 16)
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
