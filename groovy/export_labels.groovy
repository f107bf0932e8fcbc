/**
 * Exports the ROIs in which a person corrected all nuclei, for `patchcl-qp refine --labels-from CLASS`, of all images
 * of the project: of the open one as it is now, of the others as they were saved. Without a window:
 *
 *     QuPath script -p project.qpproj export_labels.groovy
 *
 * An ROI is an annotation of the class below: one that `patchcl-qp suggest` chose and that you marked as done, or one
 * that you drew (squares of about 250 µm are large enough). Correct every nucleus in it: reshape contours, delete
 * false nuclei, draw missing ones. The nuclei in an ROI then are the ground truth, the rest of it is background. The
 * image is not changed.
 *
 * Writes patchcl/labels/<image id>.geojson.
 *
 * Needs QuPath 0.4 or later.
 */

import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import org.slf4j.LoggerFactory
import qupath.lib.images.ImageData
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.hierarchy.PathObjectHierarchy
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
int batchIndex = (getBinding().getVariables()[ScriptAttributes.BATCH_INDEX] ?: 0) as int
for (other in batchIndex > 0 ? [entry] : QP.getProject().getImageList()) {   // the first of a batch does all
    Path file = Paths.get(QP.buildPathInProject(folderName, 'labels', other.getID() + '.geojson'))
    boolean isOpen = other.getID() == entry.getID()
    def hierarchy = isOpen ? imageData.getHierarchy() : other.readHierarchy()
    // Reading all of an image takes longer, and needs its slide.
    boolean corrected = hierarchy.getAnnotationObjects().any { it.getPathClass()?.toString() == roiClass }
    def data = isOpen ? imageData : corrected ? other.readImageData() : null
    Map<String, Integer> counts = exportLabels(hierarchy, imported(data), roiClass, file)
    if (!isOpen)
        data?.getServer()?.close()
    logger.info("${other.getImageName()}: ${counts.rois} ROIs with ${counts.nuclei} contours " +
            "exported to ${file}.")
}


/**
 * The objects that import_nuclei.groovy added to an image, by a line of this property: their ids, and the places of
 * their centroids, at which cells are that were made of them.
 */
static Set<String> imported(ImageData<?> imageData) {
    String lines = imageData?.getProperty('patchcl.imported') ?: ''
    Set<String> found = [] as Set
    for (line in lines.readLines()) {
        def (id, _, x, y) = line.tokenize(' ')
        found << id << place(x as double, y as double)
    }
    return found
}

/** A square of 0.2 px that holds a point, as text. */
static String place(double x, double y) {
    return "${Math.round(5 * x)} ${Math.round(5 * y)}".toString()
}

/** Whether a detection was imported, or made of a nucleus that was. */
static boolean isOurs(PathObject pathObject, Set<String> imported) {
    ROI roi = PathObjectTools.getROI(pathObject, true)
    return imported.contains(pathObject.getID().toString()) || [-0.1d, 0.1d].any { dx ->
        [-0.1d, 0.1d].any { dy -> imported.contains(place(roi.getCentroidX() + dx, roi.getCentroidY() + dy)) }
    }
}

/**
 * Writes a file with the corrected ROIs of an image, and with the nuclei that lie in them, in part or whole; returns
 * the numbers of both. Where nuclei were imported, these are what a person corrects: detections of other programs
 * beside them are left out. patchcl-qp calls this, too, when it reads by itself.
 */
static Map<String, Integer> exportLabels(PathObjectHierarchy hierarchy, Set<String> imported, String roiClass,
                                         Path file) {
    List<PathObject> rois = hierarchy.getAnnotationObjects().toList().findAll {
        it.getROI()?.isArea() && it.getPathClass()?.toString() == roiClass
    }
    List<PathObject> nuclei = hierarchy.getAllObjects(false).toList().findAll { PathObject pathObject ->
        ROI roi = PathObjectTools.getROI(pathObject, true)
        (pathObject.isAnnotation() || pathObject.isDetection()) && roi?.isArea() && !rois.contains(pathObject) &&
                rois.any { PathObject other -> intersect(roi, other.getROI()) } &&
                (pathObject.isAnnotation() || !imported || isOurs(pathObject, imported))
    }
    Files.createDirectories(file.getParent())
    Path temporary = Files.createTempFile(file.getParent(), file.getFileName().toString(), '.partial')
    Files.newOutputStream(temporary).withCloseable {
        PathIO.exportObjectsAsGeoJSON(it, rois + nuclei, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    }
    Files.move(temporary, file, StandardCopyOption.REPLACE_EXISTING)
    return [rois: rois.size(), nuclei: nuclei.size()]
}

/** Whether two contours overlap or touch; most pairs are excluded cheaply, by their bounding boxes. */
static boolean intersect(ROI one, ROI other) {
    boolean near = one.getBoundsX() < other.getBoundsX() + other.getBoundsWidth() &&
            other.getBoundsX() < one.getBoundsX() + one.getBoundsWidth() &&
            one.getBoundsY() < other.getBoundsY() + other.getBoundsHeight() &&
            other.getBoundsY() < one.getBoundsY() + one.getBoundsHeight()
    return near && one.getGeometry().intersects(other.getGeometry())
}
