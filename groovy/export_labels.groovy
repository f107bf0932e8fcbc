/**
 * Exports the ROIs in which a person corrected all nuclei, for `patchcl-qp refine --labels-from CLASS`, of all images
 * of the project: of the open one as it is now, of the others as they were saved. Without a window:
 *
 *     QuPath script -p project.qpproj export_labels.groovy
 *
 * An ROI is an annotation of the class below: one that `patchcl-qp suggest` chose and that you marked as done, or one
 * that you drew (squares of about 250 µm are large enough). Correct every nucleus in it: reshape contours, delete
 * false nuclei, draw missing ones. The nuclei in an ROI then are the ground truth, the rest of it is background. The
 * image is not changed. All objects in the ROIs are exported; `patchcl-qp refine` reports which of them it does not
 * read as nuclei, such as regions, points, and objects of a class that QuPath ignores.
 *
 * Writes patchcl/labels/<image id>.geojson.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonObject
import com.google.gson.JsonParser
import java.nio.charset.StandardCharsets
import java.nio.file.AccessDeniedException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.text.Normalizer
import org.slf4j.LoggerFactory
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.hierarchy.PathObjectHierarchy
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.roi.interfaces.ROI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String roiClass = 'PatchCL: corrected'   // class of the annotations that are corrected ROIs
String folderName = 'patchcl'   // folder in which patchcl-qp reads labels, beside project.qpproj
// -------------------------------------------------------------------------

def logger = LoggerFactory.getLogger('export_labels')
def imageData = QP.getCurrentImageData()
def entry = QP.getProjectEntry()
if (imageData == null || entry == null) {
    logger.warn('Open an image of a project first.')
    return
}
Map variables = getBinding().getVariables()
// The first of a batch does all; so does one for which run_patchcl.groovy asks, as that cannot be opened.
boolean isForAll = ((variables[ScriptAttributes.BATCH_INDEX] ?: 0) as int) == 0 || variables['patchcl_all_images']
for (other in isForAll ? QP.getProject().getImageList() : [entry])
    try {
        Path file = Paths.get(QP.buildPathInProject(folderName, 'labels', other.getID() + '.geojson'))
        Map<String, Integer> counts = exportImage(other, other.getID() == entry.getID() ? imageData : null, roiClass,
                file)
        logger.info("${other.getImageName()}: ${counts.rois} ROIs with ${counts.nuclei} contours exported to ${file}.")
    } catch (Exception e) {   // of a lost slide, say: the other images are exported
        logger.error("${other.getImageName()}: its ROIs were not exported: ${e.getMessage()}")
    }


/** Exports an image of the project: as it is 'open', or as it was saved. */
static Map<String, Integer> exportImage(ProjectImageEntry<?> entry, ImageData<?> open, String roiClass, Path file) {
    Path data = entry.getEntryPath().resolve('data.qpdata')
    IOException unread = new IOException("${data} is damaged, or was written after the image was opened. Open the " +
            'image again. If its objects are not there, restore the file, or move it away.')
    if (open == null ? Files.exists(data) && !isWhole(data) : isUnread(open, entry))
        throw unread
    if (open != null)
        return exportLabels(open.getHierarchy(), imported(open), roiClass, file)
    PathObjectHierarchy hierarchy = entry.readHierarchy()   // which never ends in a file that was cut off
    if (!hierarchy.getAnnotationObjects().any { isOfClass(it, roiClass) })
        return exportLabels(hierarchy, imported(null), roiClass, file)
    ImageData<?> saved = entry.readImageData()   // which takes longer, and needs the slide
    try {
        if (isUnread(saved, entry))
            throw unread
        return exportLabels(hierarchy, imported(saved), roiClass, file)
    } finally {
        saved.getServer().close()
    }
}

/** What import_nuclei.groovy added to an image, and the size of its pixels in µm, null without one. */
class ImportedNuclei {

    final Map<String, List<Double>> centroids = [:]   // of nuclei, by id
    final Set<String> places = []   // of these, at which cells are that were made of them
    final Set<String> regions = []   // ids of annotations that hold nuclei
    List<Double> pixelSize

    /** Whether an object was imported, or made of a nucleus that was. */
    boolean contains(PathObject pathObject) {
        ROI roi = PathObjectTools.getROI(pathObject, true)
        return centroids.containsKey(pathObject.getID().toString()) ||
                isNear(roi.getCentroidX(), roi.getCentroidY(), places)
    }

    /** Whether a point lies within 0.1 px of one of the places. */
    static boolean isNear(double x, double y, Set<String> places) {
        return [-0.1d, 0.1d].any { dx -> [-0.1d, 0.1d].any { dy -> places.contains(place(x + dx, y + dy)) } }
    }

    /** A square of 0.2 px that holds a point, as text. */
    static String place(double x, double y) {
        return "${Math.round(5 * x)} ${Math.round(5 * y)}".toString()
    }
}


/** What was imported into an image, by a line for each object of a property of the image. */
static ImportedNuclei imported(ImageData<?> imageData) {
    ImportedNuclei found = new ImportedNuclei()
    def pixels = imageData?.getServer()?.getPixelCalibration()
    if (pixels?.hasPixelSizeMicrons())
        found.pixelSize = [pixels.getPixelWidthMicrons(), pixels.getPixelHeightMicrons()]
    String lines = imageData == null ? '' : marksOfImports(imageData).first()
    for (line in lines.readLines()) {
        def (id, _, x, y) = line.tokenize(' ')
        if (line.endsWith(' region'))
            found.regions << id
        else if (!line.contains(' field ')) {
            found.centroids[id] = [x as double, y as double]
            found.places << ImportedNuclei.place(x as double, y as double)
        }
    }
    return found
}

/**
 * The lines of the marks of each import, the last one first, from that whose objects are there, as in
 * import_nuclei.groovy: QuPath's 'Undo' of imports restores the objects, but not the property.
 */
static List<String> marksOfImports(ImageData<?> imageData) {
    List<String> imports = [(imageData.getProperty('patchcl.imported') ?: '').toString()]
    String before = imageData.getProperty('patchcl.imported.before') ?: ''
    if (before.isEmpty())
        return imports
    imports.addAll(before.split('\n\n').toList())
    Set<String> present = imageData.getHierarchy().getAllObjects(false)
            .collect { PathObject pathObject -> pathObject.getID().toString() }.toSet()
    List<Set<String>> found = imports.collect { String lines ->
        lines.readLines().collect { String line -> line.substring(0, 36) }.findAll { present.contains(it) }.toSet()
    }
    Set<String> all = found.flatten().toSet() as Set<String>
    int now = found.findIndexOf { Set<String> ids -> ids.containsAll(all) }
    return imports.drop(Math.max(0, now))   // where there is none, a person brought some back
}

/**
 * Whether QuPath shows an image without what its file of objects holds, as in import_nuclei.groovy: a file that it
 * cannot read it takes for none, and of one that was cut off it may read a part.
 */
static boolean isUnread(ImageData<?> imageData, ProjectImageEntry<?> entry) {
    // QuPath itself reads the second one where saving the first one was cut off.
    List<Path> files = ['data.qpdata', 'data.qpdata.bkp'].collect { String name ->
        entry.getEntryPath().resolve(name)
    }.findAll { Path file -> Files.exists(file) }
    if (files.isEmpty())
        return false
    String path = imageData.getLastSavedPath()   // that of the file that was read
    return path == null || !isWhole(files.find { Path file -> file.toString() == path } ?: files.first())
}

/** Whether a file of QuPath's objects is whole, by both its ends: those of Java's objects, the last one 'EOF'. */
static boolean isWhole(Path file) {
    byte[] ends = new byte[10]
    new RandomAccessFile(file.toFile(), 'r').withCloseable { RandomAccessFile data ->
        if (data.length() < ends.length)
            return
        data.readFully(ends, 0, 4)
        data.seek(data.length() - 6)
        data.readFully(ends, 4, 6)
    }
    return HexFormat.of().formatHex(ends) == 'aced0005' + '740003454f46'
}

/** Whether an annotation is of a class, however a person wrote its name. */
static boolean isOfClass(PathObject pathObject, String name) {
    def composed = { Object text -> Normalizer.normalize(text.toString(), Normalizer.Form.NFC) }
    PathClass own = pathObject.getPathClass()
    return own != null && composed(own) == composed(PathClass.fromString(name))
}

/**
 * Writes a file with the corrected ROIs of an image, and with all objects that lie in them, in part or whole; returns
 * the numbers of both. Where nuclei were imported, these are what a person corrects: detections of other programs
 * beside them are listed in the file, and not counted. patchcl-qp calls this, too, when it reads by itself.
 */
static Map<String, Integer> exportLabels(PathObjectHierarchy hierarchy, ImportedNuclei imported, String roiClass,
                                         Path file) {
    Collection<PathObject> all = hierarchy.getAllObjects(false)
    List<PathObject> rois = all.findAll {
        it.isAnnotation() && it.getROI()?.isArea() && isOfClass(it, roiClass)
    }.toList()
    List<PathObject> objects = all.findAll { PathObject pathObject ->
        ROI roi = PathObjectTools.getROI(pathObject, true)
        (pathObject.isAnnotation() || pathObject.isDetection()) && roi != null && !roi.isEmpty() &&
                !rois.contains(pathObject) && !imported.regions.contains(pathObject.getID().toString()) &&
                rois.any { PathObject other -> intersect(roi, other.getROI()) }
    }.toList()
    List<PathObject> others = !imported.centroids ? [] : objects.findAll { PathObject pathObject ->
        pathObject.isDetection() && !imported.contains(pathObject)
    }
    JsonObject content = toJson(rois + objects)
    content.add('patchcl', GsonTools.getInstance().toJsonTree([
        roi_class     : roiClass,
        pixel_size_um : imported.pixelSize,
        imported      : imported.centroids.size(),
        deleted       : deletedNuclei(all, rois, imported),
        other_programs: others*.getID()*.toString(),
    ]))
    Files.createDirectories(file.getParent())
    Path temporary = file.resolveSibling("${file.getFileName()}.${UUID.randomUUID()}.partial")
    Files.writeString(temporary, GsonTools.getInstance().toJson(content))
    moveOver(temporary, file)
    int contours = objects.count { PathObjectTools.getROI(it, true).isArea() }
    return [rois: rois.size(), nuclei: contours - others.size()]
}

/** Renames a file in place of another: again, for two seconds, where Windows says that a program has one of them open,
 * as a virus scanner that looks at each new file. */
static void moveOver(Path temporary, Path file) {
    for (int attempt = 0; ; attempt++) {
        try {
            Files.move(temporary, file, StandardCopyOption.ATOMIC_MOVE)   // else Windows deletes the file first
            return
        } catch (AccessDeniedException e) {
            if (attempt == 20 || !System.getProperty('os.name').startsWith('Windows'))
                throw e
            Thread.sleep(100)
        }
    }
}

/** Objects as GeoJSON. */
static JsonObject toJson(List<PathObject> objects) {
    def bytes = new ByteArrayOutputStream()
    PathIO.exportObjectsAsGeoJSON(bytes, objects, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    return JsonParser.parseString(new String(bytes.toByteArray(), StandardCharsets.UTF_8)).getAsJsonObject()
}

/** By the id of each ROI, how many imported nuclei a person deleted in it. */
static Map<String, Integer> deletedNuclei(Collection<PathObject> all, List<PathObject> rois, ImportedNuclei imported) {
    Set<String> present = all.collect { it.getID().toString() } as Set
    Set<String> places = all.findAll { it.isDetection() && it.getROI() != null }.collect {
        ROI roi = PathObjectTools.getROI(it, true)
        ImportedNuclei.place(roi.getCentroidX(), roi.getCentroidY())
    } as Set   // cells that were made of nuclei
    def gone = imported.centroids.findAll { id, xy ->
        !present.contains(id) && !ImportedNuclei.isNear(xy[0], xy[1], places)
    }
    return rois.collectEntries { PathObject roi ->
        [roi.getID().toString(), gone.values().count { roi.getROI().contains(it[0], it[1]) }]
    }
}

/** Whether two shapes overlap or touch; most pairs are excluded cheaply, by their bounding boxes. */
static boolean intersect(ROI one, ROI other) {
    boolean near = one.getBoundsX() <= other.getBoundsX() + other.getBoundsWidth() &&
            other.getBoundsX() <= one.getBoundsX() + one.getBoundsWidth() &&
            one.getBoundsY() <= other.getBoundsY() + other.getBoundsHeight() &&
            other.getBoundsY() <= one.getBoundsY() + one.getBoundsHeight()
    return near && one.getGeometry().intersects(other.getGeometry())
}
