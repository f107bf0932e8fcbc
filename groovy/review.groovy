/**
 * Opens a small window beside the image, from which the suggested ROIs of the whole project are corrected one after the
 * other, by keys. It opens the images, zooms to the ROI, walks through its nuclei by rising confidence, marks the ROI
 * as corrected, and saves. When all are done, it refines the model, finds nuclei again, and shows what changed.
 *
 * `patchcl-qp suggest`, or the script run_patchcl, suggests the ROIs: annotations of class 'PatchCL: correct here'.
 * Those that you drew and gave this class belong to them. The window lists the keys, which work in QuPath's main
 * window, too, while this one is open. Closed and opened again, it goes on where it was (patchcl/review.json).
 *
 * Without a window, this script logs how many ROIs are left. The other scripts must lie beside this one.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonArray
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import groovy.transform.CompileStatic
import java.awt.BasicStroke
import java.awt.Graphics2D
import java.awt.Shape
import java.awt.geom.Path2D
import java.awt.image.BufferedImage
import java.lang.reflect.Method
import java.nio.file.AccessDeniedException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.nio.file.attribute.FileTime
import java.util.concurrent.ExecutionException
import java.util.concurrent.FutureTask
import javafx.application.Platform
import javafx.event.EventHandler
import javafx.geometry.Insets
import javafx.geometry.Pos
import javafx.scene.Scene
import javafx.scene.control.Alert
import javafx.scene.control.Button
import javafx.scene.control.ButtonType
import javafx.scene.control.Label
import javafx.scene.control.ProgressBar
import javafx.scene.control.Separator
import javafx.scene.control.TextInputControl
import javafx.scene.input.KeyCode
import javafx.scene.input.KeyEvent
import javafx.scene.layout.GridPane
import javafx.scene.layout.Region
import javafx.scene.layout.VBox
import javafx.stage.Stage
import javafx.stage.Window
import javafx.stage.WindowEvent
import org.locationtech.jts.algorithm.MinimumBoundingCircle
import org.locationtech.jts.geom.Geometry
import org.locationtech.jts.geom.Polygon
import org.locationtech.jts.operation.union.UnaryUnionOp
import org.slf4j.Logger
import org.slf4j.LoggerFactory
import qupath.lib.gui.QuPathGUI
import qupath.lib.gui.prefs.PathPrefs
import qupath.lib.gui.viewer.OverlayOptions
import qupath.lib.gui.viewer.QuPathViewer
import qupath.lib.gui.viewer.overlays.AbstractOverlay
import qupath.lib.gui.viewer.tools.PathTools
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.objects.PathCellObject
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.PathObjects
import qupath.lib.objects.PathROIObject
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.classes.PathClassTools
import qupath.lib.objects.hierarchy.PathObjectHierarchy
import qupath.lib.projects.Project
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.regions.ImagePlane
import qupath.lib.regions.ImageRegion
import qupath.lib.roi.GeometryTools
import qupath.lib.roi.ROIs
import qupath.lib.roi.interfaces.ROI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String nucleusClass = ''   // class of the nuclei that you add; if empty, that of most nuclei in the ROI
String folderName = 'patchcl'   // folder of patchcl-qp's results, beside project.qpproj
// -------------------------------------------------------------------------

def logger = LoggerFactory.getLogger('review')
Project<?> project = QP.getProject()
if (project == null) {
    logger.warn('Open a project first.')
    return
}
if (((getBinding().getVariables()[ScriptAttributes.BATCH_INDEX] ?: 0) as int) > 0)
    return   // the first image of a batch does all
QuPathGUI gui = QuPathGUI.getInstance()
Review review = new Review(project: project, folder: Paths.get(QP.buildPathInProject(folderName)),
        nucleusClass: nucleusClass)
review.findRois(QP.getCurrentImageData())
if (gui == null) {
    logger.info("${review.inWords()}.")
    return
}
if (review.rois.isEmpty()) {
    Platform.runLater { ReviewWindow.tell(gui.getStage(), Review.NO_ROIS) }
    return
}
String ownPath = getBinding().getVariables()[ScriptAttributes.FILE_PATH]
OtherScripts scripts = new OtherScripts(loader: getClass().getClassLoader(), ownPath: ownPath)
Platform.runLater { new ReviewWindow(gui, review, scripts).open() }


/** A correction ROI of an image of the project. */
class CorrectionRoi {

    String image   // id of the image
    String imageName
    String id
    String name
    String description
    double x, y, width, height
    boolean corrected
    boolean waiting   // it was suggested, and is not yet imported into the image

    int getNumber() {   // of 'ROI 2 of 6'
        def found = (name ?: '') =~ /\d+/
        return found ? found[0] as int : Integer.MAX_VALUE
    }
}


/** The metadata of objects, of which an annotation's description is one. Methods of QuPath that are not public read it:
 * the public one makes a map for each object, which is then saved. The same is in import_nuclei.groovy. */
@CompileStatic
class Metadata {

    private static final Method READ = method('getUnmodifiableMetadataMap')
    private static final Method STORE = method('storeMetadataValue', String, String)
    private static final Method PUBLIC = method('getMetadata')   // in QuPath 0.4 there is none

    static Map<String, String> of(PathObject pathObject) {
        return (Map<String, String>) (READ ?: PUBLIC).invoke(pathObject)
    }

    static void put(PathObject pathObject, Map<String, String> values) {
        values.each { String key, String value ->
            if (STORE == null)
                ((Map<String, String>) PUBLIC.invoke(pathObject)).put(key, value)
            else
                STORE.invoke(pathObject, key, value)
        }
    }

    private static Method method(String name, Class<?>... types) {
        Method found = (Method) PathObject.getDeclaredMethods().find { Method method ->
            method.getName() == name && Arrays.equals(method.getParameterTypes(), types)
        }
        found?.setAccessible(true)
        return found
    }
}

/** An outline, or a piece of one, without its holes. */
@CompileStatic
class Outline {

    PathObject owner
    Geometry shape
    double area
    boolean isRegion = false
    boolean isIgnored = false

    String getClassName() {
        return owner.getPathClass()?.toString() ?: ''
    }
}

/**
 * Which objects in an ROI outline nuclei, and which are regions or vessels: by the rules of `patchcl-qp refine`, in
 * patchcl_qupath/project/outlines.py, for this ROI alone.
 */
@CompileStatic
class Outlines {

    static final double MAX_AREA_UM2 = 2000
    static final double MAX_LENGTH_UM = 75
    static final double MIN_AREA_UM2 = 2
    static final double MAX_TIMES_MEDIAN = 20
    static final double MAX_COMMON_AREA_UM2 = 600
    static final int MIN_COMMON = 5
    static final double MIN_PIECE = 0.1
    static final double MAX_HELD = 0.25
    static final double MAX_SHARED = 0.2

    private final Geometry roi
    private final double pixelUm2
    private final List<PathObject> objects   // but for those of a class that QuPath ignores
    private final List<Outline> outlines = []

    Outlines(PathObject roi, List<PathObject> all, double pixelUm2) {
        this.roi = roi.getROI().getGeometry()
        this.pixelUm2 = pixelUm2
        objects = all.findAll { PathObject pathObject -> !isIgnoredClass(pathObject) }
        objects.each { PathObject owner -> outlines.addAll(outlinesOf(owner)) }
        findRegions()
        List<Geometry> ignored = all.findAll { PathObject pathObject -> isIgnoredClass(pathObject) }
                .collect { PathObject pathObject -> valid(pathObject.getROI().getGeometry()) }
        if (ignored) {
            Geometry area = UnaryUnionOp.union(ignored)
            outlines.each { it.isIgnored = it.shape.intersection(area).getArea() > it.area / 2 }
        }
    }

    /** The nuclei: also specks, slips of the mouse that a person deletes. */
    List<PathObject> getNuclei() {
        Map<PathObject, List<Outline>> byOwner = outlines.groupBy { Outline outline -> outline.owner }
        return objects.findAll { PathObject owner ->
            List<Outline> own = byOwner[owner] ?: []
            !own.any { Outline outline -> outline.isRegion } &&
                    (own.isEmpty() || !own.every { Outline outline -> outline.isIgnored })
        }
    }

    /** A nucleus that shares too much with a larger one, of what is shared some in the ROI; null if none does. */
    PathObject getOverlapping() {
        List<Outline> nuclei = outlines.findAll { Outline outline -> !outline.isRegion && !outline.isIgnored }
        return nuclei.find { Outline one ->
            nuclei.any { Outline other ->
                one !== other && one.area <= other.area && meet(one, other) && isShared(one, other)
            }
        }?.owner
    }

    private boolean isShared(Outline smaller, Outline larger) {
        Geometry shared = smaller.shape.intersection(larger.shape)
        return shared.getArea() > MAX_SHARED * smaller.area && shared.intersects(roi)
    }

    private static boolean isIgnoredClass(PathObject pathObject) {
        PathClass pathClass = pathObject.getPathClass()
        return pathClass != null && PathClassTools.isIgnoredClass(pathClass)
    }

    private static Geometry valid(Geometry geometry) {
        return geometry.isValid() ? geometry : geometry.buffer(0)
    }

    private List<Outline> outlinesOf(PathObject owner) {
        Geometry geometry = valid(owner.getROI().getGeometry())
        List<Geometry> pieces = (0..<geometry.getNumGeometries()).collect { int k -> geometry.getGeometryN(k) }
        double largest = pieces.collect { Geometry piece -> piece.getArea() }.max() ?: 0d
        return pieces.findAll { Geometry piece -> piece instanceof Polygon && piece.getArea() >= MIN_PIECE * largest }
                .collect { Geometry piece -> withoutHoles((Polygon) piece) }
                .findAll { Geometry piece -> piece.getArea() * pixelUm2 >= MIN_AREA_UM2 && piece.intersects(roi) }
                .collect { Geometry piece -> new Outline(owner: owner, shape: piece, area: piece.getArea()) }
    }

    private static Geometry withoutHoles(Polygon polygon) {
        return polygon.getFactory().createPolygon(polygon.getExteriorRing().getCoordinateSequence())
    }

    private void findRegions() {
        double median = medianUm2
        outlines.each { Outline outline ->
            double area = outline.area * pixelUm2
            outline.isRegion = exceeds(outline.shape, pixelUm2) ||
                    area > MAX_COMMON_AREA_UM2 && area > MAX_TIMES_MEDIAN * median || isAroundOthers(outline)
        }
    }

    /** The median area; NaN of too few. */
    private double getMedianUm2() {
        List<Double> areas = outlines.collect { Outline outline -> outline.area * pixelUm2 }.sort()
        int count = areas.size()
        if (count < MIN_COMMON)
            return Double.NaN
        return (areas[count.intdiv(2)] + areas[(count - 1).intdiv(2)]) / 2d
    }

    /** Whether a contour is larger or longer than nuclei are. */
    static boolean exceeds(Geometry shape, double pixelUm2) {
        return shape.getArea() * pixelUm2 > MAX_AREA_UM2 ||
                2 * new MinimumBoundingCircle(shape).getRadius() * Math.sqrt(pixelUm2) > MAX_LENGTH_UM
    }

    /** Whether it was drawn around several outlines, across three, or around a much smaller one of another class. */
    private boolean isAroundOthers(Outline outer) {
        int held = 0, crossed = 0
        for (Outline inner : outlines)
            if (inner.area < outer.area && meet(inner, outer)) {
                double shared = outer.shape.intersection(inner.shape).getArea() / inner.area
                if (shared > 0.5 && inner.area < MAX_HELD * outer.area &&
                        (outer.className.isEmpty() || outer.className != inner.className))
                    return true
                held += shared > 0.5 ? 1 : 0
                crossed += shared > MAX_SHARED ? 1 : 0
            }
        return held >= 2 || crossed >= 3
    }

    private static boolean meet(Outline one, Outline other) {
        return one.shape.getEnvelopeInternal().intersects(other.shape.getEnvelopeInternal())
    }
}

/**
 * The correction of the ROIs of a project: which there are, which comes next, and what is done to the nuclei of the
 * present one. Nothing of this needs a window.
 */
class Review {

    static final String TO_CORRECT = 'PatchCL: correct here'
    static final String CORRECTED = 'PatchCL: corrected'
    static final String CONFIDENCE = 'Detection probability'
    static final String NO_ROIS = "No image has an ROI of class '${TO_CORRECT}'.\n\nRun the script run patchcl, and " +
            'choose \'Suggest ROIs to correct\'; or give this class to annotations of about 250 µm that you drew.'

    Project<?> project
    Path folder   // of the results
    String nucleusClass = ''
    List<CorrectionRoi> rois = []
    int index = -1   // of the present ROI
    ImageData<?> imageData   // of the present ROI
    PathObject nucleus   // the present one, or null
    List<PathObject> nuclei = []   // of the present ROI, by rising confidence
    private Outlines outlines   // of the present ROI, and of what is no nucleus
    private Set<String> regions = []   // ids of annotations that hold imported nuclei
    final Map<String, Set<String>> accepted = [:]   // by image and ROI: ids of nuclei
    private final List<PathObject> visited = []
    private boolean askedIfEmpty = false
    final Map<String, Set<String>> locked = [:]   // by image: ids of what is locked while its ROI is the present one
    private FileTime savedUnlocked   // when the image was last saved before; null if it may be saved with these locks
    private final List<Closure<?>> undoing = []

    // ------------------------------------------------ the ROIs of the project

    /** Finds the ROIs of all images, in the order of the project, and where the review was when it was closed. */
    void findRois(ImageData<?> open) {
        CorrectionRoi present = current
        ProjectImageEntry<?> openEntry = open == null ? null : project.getEntry(open)
        rois = project.getImageList().collectMany { entry ->
            boolean isOpen = entry.getID() == openEntry?.getID()
            List<CorrectionRoi> suggested = suggestedRois(entry)
            if (!isOpen && suggested.isEmpty() && !isListed(entry))
                return []
            PathObjectHierarchy hierarchy = isOpen ? open.getHierarchy() : savedObjects(entry)
            return hierarchy == null ? [] : sorted(inImage(entry, hierarchy) + suggested.findAll { roi ->
                !hierarchy.getAnnotationObjects().any { it.getID().toString() == roi.id }
            })
        }
        JsonObject state = readJson(stateFile)
        [accepted: accepted, locked: locked].each { key, known ->
            if (known.isEmpty() && state?.has(key))
                state.getAsJsonObject(key).entrySet().each { each ->
                    known[each.key] = each.value.collect { it.getAsString() } as LinkedHashSet
                }
        }
        String id = present?.id, image = present?.image
        if (present == null) {
            id = text(state, 'roi')
            image = text(state, 'image')   // null where an earlier version wrote it
        }
        index = rois.findIndexOf { it.id == id && (image == null || it.image == image) }
        if (index < 0)
            index = rois.findIndexOf { !it.corrected }
    }

    /** The objects of an image as it was saved; null where they cannot be read: it costs no other image. */
    private static PathObjectHierarchy savedObjects(ProjectImageEntry<?> entry) {
        PathObjectHierarchy found = null
        Path data = dataOf(entry)
        try {
            if (!Files.exists(data))
                return new PathObjectHierarchy()
            if (isWhole(data))   // in a file that was cut off, QuPath's reader never ends
                found = entry.readHierarchy()
        } catch (Exception e) {
            LoggerFactory.getLogger('review').error('Not read', e)
        }
        if (found == null)
            LoggerFactory.getLogger('review').warn("${entry.getImageName()}: its ROIs are not listed, as ${data} is " +
                    'damaged: restore it, or move it away.')
        return found
    }

    private static Path dataOf(ProjectImageEntry<?> entry) {
        return entry.getEntryPath().resolve('data.qpdata')
    }

    /** Whether QuPath's summary of an image, which is quickly read, counts annotations of one of the classes. */
    private boolean isListed(ProjectImageEntry<?> entry) {
        if (!entry.hasImageData())
            return false
        Path summary = folder.resolveSibling('data').resolve(entry.getID()).resolve('summary.json')
        if (!Files.exists(summary))
            return true
        String text = Files.readString(summary)
        return text.contains('"' + TO_CORRECT + '"') || text.contains('"' + CORRECTED + '"')
    }

    /** The ROIs that were suggested for an image and are not imported. A person deleted those that were. */
    private List<CorrectionRoi> suggestedRois(ProjectImageEntry<?> entry) {
        Path file = folder.resolve('fields').resolve(entry.getID() + '.json')
        if (!Files.exists(file) || isImportedSince(file, entry) && !isUnsaved(entry))
            return []
        return readJson(file)?.getAsJsonArray('fields')?.collect {
            JsonObject roi = it.getAsJsonObject()
            def (x, y, width, height) = ['x', 'y', 'width', 'height'].collect { key -> roi.get(key).getAsDouble() }
            new CorrectionRoi(image: entry.getID(), imageName: entry.getImageName(), id: roi.get('id').getAsString(),
                    name: roi.get('name').getAsString(), description: roi.get('description').getAsString(),
                    x: x, y: y, width: width, height: height, waiting: true)
        } ?: []
    }

    private static List<CorrectionRoi> inImage(ProjectImageEntry<?> entry, PathObjectHierarchy hierarchy) {
        return hierarchy.getAnnotationObjects().findAll { isCorrectionRoi(it) && it.getROI().isArea() }.collect {
            ROI roi = it.getROI()
            new CorrectionRoi(image: entry.getID(), imageName: entry.getImageName(), id: it.getID().toString(),
                    name: it.getName(), description: it.getDescription(), x: roi.getBoundsX(), y: roi.getBoundsY(),
                    width: roi.getBoundsWidth(), height: roi.getBoundsHeight(),
                    corrected: it.getPathClass().toString() == CORRECTED)
        }
    }

    static List<CorrectionRoi> sorted(List<CorrectionRoi> rois) {
        return rois.sort { one, other ->
            one.number <=> other.number ?: one.y <=> other.y ?: one.x <=> other.x
        }
    }

    static boolean isCorrectionRoi(PathObject pathObject) {
        return pathObject.getPathClass()?.toString() in [TO_CORRECT, CORRECTED]
    }

    CorrectionRoi getCurrent() {
        return index >= 0 && index < rois.size() ? rois[index] : null
    }

    int getLeft() {
        return rois.count { !it.corrected } as int
    }

    /** The ROIs that are left, as a sentence without its full stop. */
    String inWords() {
        if (rois.isEmpty())
            return 'No ROIs to correct'
        int images = rois.collect { it.image }.unique().size()
        return "${rois.size()} ROIs in ${images} ${images == 1 ? 'image' : 'images'}: " +
                "${rois.size() - left} corrected, ${left} left"
    }

    /** The number of the ROI that comes after the present one, of those that are not corrected; -1 if none is left. */
    int nextUncorrected() {
        List<Integer> order = (1..rois.size()).collect { (index + it) % rois.size() }
        Integer next = order.find { int number -> !rois[number].corrected }
        return next == null ? -1 : next
    }

    ProjectImageEntry<?> entryOf(CorrectionRoi roi) {
        return project.getImageList().find { it.getID() == roi.image }
    }

    // ------------------------------------------------ the nuclei of the present ROI

    /**
     * Begins with an ROI in its image, as it is open. Nuclei there that are detections become annotations, which can be
     * reshaped. Returns the annotation of the ROI; null if a person deleted it.
     */
    PathObject begin(int number, ImageData<?> image) {
        release()
        index = number
        imageData = image
        savedUnlocked = null
        unlock()   // what a person saved locked
        nucleus = null
        visited.clear()
        undoing.clear()
        askedIfEmpty = false
        PathObject roi = annotation
        if (roi == null)
            return null
        current.waiting = false
        List<String> marks = marksOfImports(image).first().readLines()
        regions = marks.findAll { it.endsWith(' region') }.collect { it.tokenize(' ').first() } as Set
        toAnnotations(image, roi, marks)
        refresh()
        if (areLockedByCommand(image, marks))
            nuclei*.setLocked(false)
        if (!current.corrected)
            nucleus = nuclei.find { !seen.contains(it.getID().toString()) }
        protect()
        return roi
    }

    /**
     * Locks the ROI, and regions around it or in it, such as a tumour: where the brush begins in one, it would change
     * that, in place of drawing a nucleus. Their ids are remembered: a person can save them locked, and QuPath's 'Undo'
     * puts locked copies in their place.
     */
    void protect() {
        release()
        PathObject roi = annotation
        List<PathObject> others = roi == null ? [] : imageData.getHierarchy().getAnnotationObjects().findAll {
            !it.isLocked() && it.getROI()?.isArea() && !nuclei.contains(it) && boxesMeet(it.getROI(), roi.getROI())
        }.toList()
        others*.setLocked(true)
        savedUnlocked = locked.containsKey(imageId) ? null : lastSaved
        if (others)
            locked[imageId] = (locked[imageId] ?: []) + others.collect { it.getID().toString() } as LinkedHashSet
        writeState()
    }

    private String getImageId() {
        return imageData == null ? null : project.getEntry(imageData)?.getID()
    }

    private FileTime getLastSaved() {
        Path data = imageId == null ? null : dataOf(project.getEntry(imageData))   // it may be removed from the project
        return data != null && Files.exists(data) ? Files.getLastModifiedTime(data) : null
    }

    /** Unlocks what was locked, and forgets it, unless a person may have saved it locked. */
    void release() {
        unlock()
        if (imageData != null && lastSaved == savedUnlocked)
            locked.remove(imageId)
    }

    private void unlock() {
        Set<String> ids = locked[imageId]
        if (ids)
            imageData.getHierarchy().getAnnotationObjects().findAll { ids.contains(it.getID().toString()) }
                    *.setLocked(false)
    }

    static boolean boxesMeet(ROI one, ROI other) {
        return one.getBoundsX() < other.getBoundsX() + other.getBoundsWidth() &&
                other.getBoundsX() < one.getBoundsX() + one.getBoundsWidth() &&
                one.getBoundsY() < other.getBoundsY() + other.getBoundsHeight() &&
                other.getBoundsY() < one.getBoundsY() + one.getBoundsHeight()
    }

    /** The annotation of the present ROI in its image. */
    PathObject getAnnotation() {
        return imageData?.getHierarchy()?.getAnnotationObjects()?.find { it.getID().toString() == current?.id }
    }

    /** The ids of nuclei that a person accepted in the ROI. A duplicate of its image has an ROI of the same id. */
    Set<String> getSeen() {
        String key = "${current.image} ${current.id}"
        if (!accepted.containsKey(key))   // earlier versions had the ROI alone
            accepted[key] = accepted.remove(current.id) ?: new LinkedHashSet<String>()
        return accepted[key]
    }

    /** Reads the nuclei of the ROI anew: a person can change them at any time. */
    void refresh() {
        PathObject roi = annotation
        outlines = roi == null ? null : outlinesIn(roi)
        nuclei = roi == null ? [] : sortedNuclei(outlines.nuclei)
        if (nucleus != null && !nuclei.contains(nucleus))
            nucleus = null
    }

    /** What lies in the ROI, in part or whole, beside ROIs and the annotations that hold imported nuclei. */
    private Outlines outlinesIn(PathObject roi) {
        List<PathObject> objects = imageData.getHierarchy().getAnnotationObjects().findAll {
            it !== roi && isIn(it, roi) && !regions.contains(it.getID().toString())
        }.toList()
        return new Outlines(roi, objects, pixelUm2(imageData))
    }

    /** By rising confidence; at last those that a person drew. */
    private static List<PathObject> sortedNuclei(List<PathObject> nuclei) {
        return nuclei.sort { one, other ->
            confidence(one) <=> confidence(other) ?: one.getROI().getCentroidY() <=> other.getROI().getCentroidY() ?:
                    one.getROI().getCentroidX() <=> other.getROI().getCentroidX()
        }
    }

    /** Whether an object with an area lies in an ROI, in part or whole, and is none itself. */
    static boolean isIn(PathObject pathObject, PathObject roi) {
        ROI contour = PathObjectTools.getROI(pathObject, true)
        return contour?.isArea() && boxesMeet(contour, roi.getROI()) && !isCorrectionRoi(pathObject) &&
                contour.getGeometry().intersects(roi.getROI().getGeometry())
    }

    /** Whether a detection can be one of a nucleus in an ROI. */
    static boolean isNucleusIn(PathObject detection, PathObject roi, double pixelUm2) {
        PathClass pathClass = detection.getPathClass()
        return isOutlined(detection) && isIn(detection, roi) &&
                (pathClass == null || !PathClassTools.isIgnoredClass(pathClass)) &&
                !Outlines.exceeds(PathObjectTools.getROI(detection, true).getGeometry(), pixelUm2)
    }

    /** The area of a pixel in µm²; where it is not known, as patchcl-qp takes it. */
    static double pixelUm2(ImageData<?> imageData) {
        def pixels = imageData.getServer().getPixelCalibration()
        return pixels.hasPixelSizeMicrons() ? pixels.getPixelWidthMicrons() * pixels.getPixelHeightMicrons() : 0.0625d
    }

    /** What the network found of a nucleus, from 0 to 1; infinite for one that a person drew. */
    static double confidence(PathObject nucleus) {
        double value = nucleus.getMeasurementList().get(CONFIDENCE)
        return Double.isNaN(value) ? Double.POSITIVE_INFINITY : value
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

    /** Makes annotations of the detections in an ROI; of those that were imported, by its marks, where some were. */
    static int toAnnotations(ImageData<?> imageData, PathObject roi, List<String> marks) {
        Set<String> ours = marks.collect { it.tokenize(' ').first() } as Set
        List<PathObject> detections = imageData.getHierarchy().getDetectionObjects().findAll {
            (ours.isEmpty() || ours.contains(it.getID().toString())) && !it.hasChildObjects() &&
                    isNucleusIn(it, roi, pixelUm2(imageData))
        }
        if (detections.isEmpty())
            return 0
        detections.groupBy { it.getParent() }.each { parent, children ->
            parent.removeChildObjects(children)
            parent.addChildObjects(children.collect { toAnnotation(it) })
        }
        imageData.getHierarchy().fireHierarchyChangedEvent(roi)
        return detections.size()
    }

    /**
     * Whether more than half of the nuclei of an image are locked, and at least 20: by a command, not by a person. 'Add
     * intensity features' locks what it measures, but nuclei of an ROI are there to be reshaped.
     */
    private static boolean areLockedByCommand(ImageData<?> imageData, List<String> marks) {
        Set<String> ours = marks.findAll { !it.endsWith(' region') && !it.contains(' field ') }
                .collect { it.tokenize(' ').first() } as Set
        Collection<PathObject> nuclei = imageData.getHierarchy().getAllObjects(false).findAll {
            ours.isEmpty() ? it.isAnnotation() || isOutlined(it) : ours.contains(it.getID().toString())
        }
        int lockedNuclei = nuclei.count { it.isLocked() } as int
        return lockedNuclei >= 20 && 2 * lockedNuclei > nuclei.size()
    }

    /** Whether an object is a detection of a nucleus, or a cell that has one. The same is in import_nuclei.groovy. */
    static boolean isOutlined(PathObject pathObject) {
        return pathObject.isDetection() && !pathObject.isTile() &&
                (!(pathObject instanceof PathCellObject) || ((PathCellObject) pathObject).getNucleusROI() != null)
    }

    static PathObject toAnnotation(PathObject detection) {
        PathObject annotation = PathObjects.createAnnotationObject(PathObjectTools.getROI(detection, true),
                detection.getPathClass(), detection.getMeasurementList())
        annotation.setID(detection.getID())
        annotation.setName(detection.getName())
        if (detection.getColor() != null)
            annotation.setColor(detection.getColor())
        annotation.setLocked(detection.isLocked())
        Metadata.put(annotation, Metadata.of(detection))
        return annotation
    }

    // ------------------------------------------------ what the keys do; each returns a message, or null

    /** The present nucleus is right: goes to the one with the next higher confidence. */
    String accept() {
        refresh()
        if (nucleus != null) {
            seen << nucleus.getID().toString()
            visited << nucleus
        }
        return toNext(nucleus)
    }

    private String toNext(PathObject from) {
        int start = from == null ? 0 : nuclei.indexOf(from) + 1
        List<PathObject> order = start < nuclei.size() ? nuclei.drop(start) + nuclei.take(start) : nuclei
        nucleus = order.find { !seen.contains(it.getID().toString()) }
        writeState()
        return nucleus != null ? null : 'You have seen all nuclei here. Outline those that are missing, then press Y.'
    }

    /** Back to the nucleus before, as if it had not been accepted. */
    String back() {
        refresh()
        visited.removeAll { !nuclei.contains(it) }
        if (visited.isEmpty())
            return 'There is no nucleus before this one.'
        nucleus = visited.removeLast()
        seen.remove(nucleus.getID().toString())
        writeState()
        return null
    }

    /** Deletes the present nucleus, and goes to the next one. */
    String delete() {
        refresh()
        if (nucleus == null)
            return 'No nucleus is selected: press E, or click one.'
        if (nucleus.isLocked())
            return 'This nucleus is locked: unlock it first.'
        PathObject gone = nucleus, parent = nucleus.getParent()
        PathObjectHierarchy hierarchy = imageData.getHierarchy()
        int place = nuclei.indexOf(gone)
        hierarchy.getSelectionModel().clearSelection()
        hierarchy.removeObject(gone, true)
        undoing << {
            hierarchy.addObjectBelowParent(parent, gone, true)
            nucleus = gone
        }
        refresh()
        return toNext(place > 0 ? nuclei[place - 1] : null)
    }

    /** Adds a round nucleus of the median size of those in the ROI, with its centre at a point of the image. */
    String insert(double x, double y) {
        refresh()
        List<Double> areas = nuclei.collect { it.getROI().getArea() }.sort()
        double diameter = areas ? 2 * Math.sqrt(areas[areas.size().intdiv(2)] / Math.PI) : 8 / micronsPerPixel
        ROI circle = ROIs.createEllipseROI(x - diameter / 2, y - diameter / 2, diameter, diameter,
                ImagePlane.getDefaultPlane())
        PathObject added = PathObjects.createAnnotationObject(circle, classOfNuclei())
        PathObjectHierarchy hierarchy = imageData.getHierarchy()
        hierarchy.addObject(added)
        undoing << { hierarchy.removeObject(added, true) }
        refresh()
        nucleus = added
        seen << added.getID().toString()
        return 'Move it by Shift and the arrow keys; 1 makes it smaller, 2 larger.'
    }

    PathClass classOfNuclei() {
        if (nucleusClass)
            return PathClass.fromString(nucleusClass)
        def counts = nuclei.countBy { it.getPathClass() }.findAll { pathClass, count -> pathClass != null }
        return counts ? counts.max { it.value }.key : PathClass.fromString('Nucleus')
    }

    String move(double dx, double dy) {
        return reshape { ROI roi -> roi.translate(dx / micronsPerPixel, dy / micronsPerPixel) }
    }

    /** Moves the contour outwards, or inwards, by this many µm. */
    String grow(double microns) {
        return reshape { ROI roi -> grown(roi, microns / micronsPerPixel) }
    }

    /** The contour, moved outwards by a distance in pixels, inwards if negative; the same if nothing is left. */
    static ROI grown(ROI roi, double distance) {
        Geometry geometry = roi.getGeometry().buffer(distance)
        if (geometry.isEmpty() || geometry.getNumGeometries() > 1)
            return roi
        return GeometryTools.geometryToROI(geometry, roi.getImagePlane())
    }

    private String reshape(Closure<ROI> change) {
        refresh()
        if (nucleus == null)
            return 'No nucleus is selected: press E, or click one.'
        if (nucleus.isLocked())
            return 'This nucleus is locked: unlock it first.'
        PathObject changed = nucleus
        ROI before = changed.getROI()
        Map<String, Number> measured = new LinkedHashMap<>(changed.getMeasurements())
        setContour(changed, change(before), measured.findAll { name, value -> !isOfContour(name) })
        undoing << { setContour(changed, before, measured) }
        return null
    }

    /** Sets a contour and measurements: with a new contour, QuPath removes them all. */
    private void setContour(PathObject pathObject, ROI roi, Map<String, Number> measured) {
        PathObject parent = pathObject.getParent()
        PathObjectHierarchy hierarchy = imageData.getHierarchy()
        hierarchy.removeObjectWithoutUpdate(pathObject, true)
        ((PathROIObject) pathObject).setROI(roi)
        measured.each { name, value -> pathObject.getMeasurementList().put(name, value.doubleValue()) }
        hierarchy.addObjectBelowParent(parent, pathObject, true)
        nucleus = pathObject
    }

    /** Whether a measurement is of the contour or of the pixels in it, as patchcl-qp measures them. */
    private static boolean isOfContour(String name) {
        String shape = name.replaceFirst('^(Nucleus|Cell): ', '')   // of a nucleus that was a cell's
        return shape in ['Area µm^2', 'Length µm', 'Circularity', 'Solidity', 'Max diameter µm',
                         'Min diameter µm', 'Nucleus/Cell area ratio'] || name ==~ /.*: (Mean|Std\.Dev\.|Min|Max)/
    }

    /** Takes back the last deletion, insertion or change of these keys. */
    String undo() {
        if (undoing.isEmpty())
            return 'Nothing to undo here. Ctrl+Z is QuPath\'s own.'
        undoing.removeLast().call()
        refresh()
        return null
    }

    double getMicronsPerPixel() {
        def pixels = imageData.getServer().getPixelCalibration()
        return pixels.hasPixelSizeMicrons() ? pixels.getAveragedPixelSizeMicrons().doubleValue() : 0.25d
    }

    /**
     * Why patchcl-qp could not refine with the ROI as it is, null if it could; selects the nucleus in question. Of an
     * empty ROI, a person is asked once.
     */
    String problem() {
        refresh()
        if (nuclei.isEmpty() && !askedIfEmpty) {
            askedIfEmpty = true
            return 'There is no nucleus in this ROI: all of it is taken as background. If that is right, press Y again.'
        }
        PathObject twice = outlines?.overlapping
        if (twice == null)
            return null
        nucleus = twice
        return 'This nucleus overlaps another one: delete one of them (X), or make it smaller (1). Then press Y.'
    }

    /** Marks the ROI as corrected, and saves. */
    void markCorrected() {
        PathObject roi = annotation
        if (roi.getPathClass().toString() != CORRECTED) {
            roi.setPathClass(PathClass.fromString(CORRECTED))
            imageData.getHierarchy().fireObjectClassificationsChangedEvent(roi, [roi])
        }
        current.corrected = true
        save()
    }

    /**
     * Saves the image, if anything in it changed; what was locked for the ROI is saved as it was before, also where a
     * person saved it locked by QuPath's own command.
     */
    void save() {
        if (imageId == null || !imageData.isChanged() && (!locked[imageId] || lastSaved == savedUnlocked))
            return
        release()
        try {
            saveWithProject(imageData)
            locked.remove(imageId)
        } finally {
            protect()
        }
    }

    /** Saves an image, and the project, which has the size of its pixels. */
    void saveWithProject(ImageData<?> changed) {
        ProjectImageEntry<?> entry = project.getEntry(changed)
        if (entry == null)
            return   // an image of another project
        if (isUnread(changed, entry))
            throw new IOException("${dataOf(entry)} is damaged, or was written after the image was opened")
        entry.saveImageData(changed)
        project.syncChanges()
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

    // ------------------------------------------------ what is remembered

    Path getStateFile() {
        return folder.resolve('review.json')
    }

    void writeState() {
        Files.createDirectories(folder)
        Path temporary = folder.resolve("review.json.${UUID.randomUUID()}.partial")
        Files.writeString(temporary, GsonTools.getInstance(true).toJson([
            image   : current.image,
            roi     : current.id,
            nucleus : nucleus?.getID()?.toString(),
            accepted: accepted.findAll { key, nuclei -> nuclei },
            locked  : locked,
        ]))
        moveOver(temporary, stateFile)
    }

    /** Renames a file in place of another: again, for two seconds, where Windows says that a program has one of them
     * open, as a virus scanner that looks at each new file. */
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

    /** The id of the nucleus that was selected when the review was closed; null if there was none. */
    String rememberedNucleus() {
        return text(readJson(stateFile), 'nucleus')
    }

    /** Selects a nucleus of the present ROI by its id, if it is still there. */
    void select(String id) {
        nucleus = nuclei.find { it.getID().toString() == id } ?: nucleus
        writeState()
    }

    /** Makes the object that a person selected, if any, the present nucleus; none, if it is no nucleus of the ROI. */
    void choose(PathObject selected) {
        if (selected === nucleus)
            return
        refresh()
        nucleus = nuclei.find { it === selected }
    }

    private static String text(JsonObject json, String key) {
        return json?.has(key) && !json.get(key).isJsonNull() ? json.get(key).getAsString() : null
    }

    /** The content of a JSON file; null if there is none, or it is damaged. */
    static JsonObject readJson(Path file) {
        JsonObject content = null
        try {
            if (Files.exists(file)) {
                content = JsonParser.parseString(Files.readString(file)).getAsJsonObject()
            }
        } catch (Exception ignored) {
            content = null
        }
        return content
    }

    /** Whether an image has results that are not imported, or were imported and not saved. */
    boolean isWaiting(ProjectImageEntry<?> entry) {
        return Files.exists(resultOf(entry)) && (!isImported(entry) || isUnsaved(entry))
    }

    /** Whether the results of an image were imported, saved or not. */
    boolean isImported(ProjectImageEntry<?> entry) {
        return isImportedSince(resultOf(entry), entry)
    }

    private Path resultOf(ProjectImageEntry<?> entry) {
        return folder.resolve('results').resolve(entry.getID()).resolve('result.json')
    }

    private Path receiptOf(ProjectImageEntry<?> entry) {
        return folder.resolve('imported').resolve(entry.getID() + '.json')
    }

    private boolean isImportedSince(Path file, ProjectImageEntry<?> entry) {
        Path receipt = receiptOf(entry)
        return Files.exists(receipt) && Files.getLastModifiedTime(receipt) >= Files.getLastModifiedTime(file)
    }

    /** Whether the last import was left to a person to save, and is not saved: the image is open, or was closed. */
    private boolean isUnsaved(ProjectImageEntry<?> entry) {
        JsonObject receipt = readJson(receiptOf(entry))
        if (!receipt?.has('saved') || receipt.get('saved').getAsBoolean())
            return false
        Path data = dataOf(entry)
        return !Files.exists(data) || Files.getLastModifiedTime(data) < Files.getLastModifiedTime(receiptOf(entry))
    }

    // ------------------------------------------------ what the refined model changed

    /** What a refined model does in the corrected ROIs of an image, as patchcl-qp saved it. */
    private JsonObject changes(String image) {
        return readJson(folder.resolve('changes').resolve(image).resolve('changes.json'))
    }

    /** The same of the present ROI, by its place; null without a run. */
    JsonObject changesHere() {
        JsonObject here = changes(current.image)
        return !here?.has('run') ? null : here.getAsJsonArray('rois')?.collect { it.getAsJsonObject() }?.find { roi ->
            def (x, y, width, height) = ['x', 'y', 'width', 'height'].collect { key -> roi.get(key).getAsDouble() }
            Math.abs(x - current.x) + Math.abs(y - current.y) + Math.abs(width - current.width) +
                    Math.abs(height - current.height) < 4
        }
    }

    /** What the refined model does by itself of the corrections in all ROIs; null without a run of it. */
    String changesInWords() {
        List<JsonObject> images = rois.collect { it.image }.unique().collect { changes(it) }.findAll()
        // Images that the last refining left out have those of the model before it.
        String newest = text(images.max { text(it, 'made') }, 'model')
        List<JsonObject> all = images.findAll { it.has('run') && text(it, 'model') == newest }.collectMany {
            it.getAsJsonArray('rois').collect { roi -> roi.getAsJsonObject() }
        }
        return all.isEmpty() ? null : inWords(all)
    }

    static String inWords(List<JsonObject> rois) {
        Closure<Integer> sum = { String key -> rois.sum { it.get(key).getAsInt() } as int }
        int made = sum('deleted') + sum('added') + sum('reshaped')
        int now = sum('deleted_now') + sum('added_now') + sum('reshaped_now')
        return "The new model makes ${now} of your ${made} corrections by itself: " +
                "${sum('deleted_now')} of ${sum('deleted')} deleted, ${sum('added_now')} of ${sum('added')} added, " +
                "${sum('reshaped_now')} of ${sum('reshaped')} reshaped"
    }
}


/** The other scripts, which lie beside this one or in the project. */
class OtherScripts {

    ClassLoader loader
    String ownPath

    /** Runs a script for an image, in this thread. */
    void run(String name, Project<?> project, ImageData<?> imageData, Map<String, Object> variables = [:]) {
        List<Path> places = [Paths.get(project.getPath().toString()).resolveSibling('scripts').resolve(name)]
        if (ownPath != null)
            places.add(0, Paths.get(ownPath).resolveSibling(name))
        Path script = places.find { Files.isRegularFile(it) }
        if (script == null)
            throw new FileNotFoundException("${name} must lie beside this script: `patchcl-qp scripts PROJECT` " +
                    'copies it.')
        Binding binding = new Binding(new LinkedHashMap<>(variables))
        binding.setVariable(ScriptAttributes.FILE_PATH, script.toString())
        QP.setBatchProjectAndImage(project, imageData)
        try {
            new GroovyShell(loader, binding).evaluate(Files.readString(script), name)
        } finally {
            QP.resetBatchProjectAndImage()
        }
    }
}


/** Contours of the models before and after, over the image. */
class ChangesOverlay extends AbstractOverlay {

    List<Shape> before = []
    List<Shape> after = []
    ImageData<?> shownIn

    ChangesOverlay(OverlayOptions options) {
        super(options)
    }

    @Override
    void paintOverlay(Graphics2D g2d, ImageRegion region, double downsample, ImageData<BufferedImage> imageData,
                      boolean paintCompletely) {
        if (imageData !== shownIn)
            return
        float width = (float) (2.5d * downsample)
        float[] dashes = [2.5d * width, 1.5d * width]
        Graphics2D pen = (Graphics2D) g2d.create()
        pen.setStroke(new BasicStroke(width))
        pen.setColor(new java.awt.Color(235, 120, 0))
        before.each { pen.draw(it) }
        pen.setStroke(new BasicStroke(width, BasicStroke.CAP_BUTT, BasicStroke.JOIN_ROUND, 1f, dashes, 0f))
        pen.setColor(new java.awt.Color(0, 220, 255))
        after.each { pen.draw(it) }
        pen.dispose()
    }

    static List<Shape> shapes(JsonArray contours) {
        return contours.collect { contour ->
            List<Double> xy = contour.getAsJsonArray().collect { it.getAsDouble() }
            Path2D path = new Path2D.Double()
            path.moveTo(xy[0], xy[1])
            for (int i = 2; i + 1 < xy.size(); i += 2)
                path.lineTo(xy[i], xy[i + 1])
            path.closePath()
            path
        }
    }
}


/** The window: shows the state of a review, and hands keys on to it. */
class ReviewWindow {

    static final String TITLE = 'PatchCL: review'
    private static final List<String> SHOWN = ['nothing', 'the model before', 'the refined model', 'both models']

    final Logger logger = LoggerFactory.getLogger('review')
    final QuPathGUI gui
    final Review review
    final OtherScripts scripts
    Stage stage
    private final Label place = new Label()
    private final Label image = new Label()
    private final Label why = new Label()
    private final Label nucleusText = new Label()
    private final Label message = new Label()
    private final Label changes = new Label()
    private final ProgressBar bar = new ProgressBar(0)
    private final Button refineButton = new Button('Refine and find nuclei again (U)')
    private final ChangesOverlay overlay
    private int shown = 0
    private boolean busy = false
    private boolean asked = false   // whether to refine with some ROIs only
    private List<Closure<?>> restoring = []
    private final EventHandler<KeyEvent> keys = { KeyEvent event -> handle(event) } as EventHandler<KeyEvent>
    // QuPath 0.6 and later keep what is shown for the next session, and would keep what a review hides.
    private final EventHandler<WindowEvent> quitting = { close() } as EventHandler<WindowEvent>

    ReviewWindow(QuPathGUI gui, Review review, OtherScripts scripts) {
        this.gui = gui
        this.review = review
        this.scripts = scripts
        overlay = new ChangesOverlay(viewer.getOverlayOptions())
    }

    /** Shows a message until it is closed. QuPath's own dialogs have other names in each version. */
    static void tell(Window owner, String text) {
        Alert alert = new Alert(Alert.AlertType.WARNING, text, ButtonType.OK)
        alert.initOwner(owner)
        alert.setTitle('PatchCL')
        alert.setHeaderText(null)
        alert.setResizable(true)
        alert.getDialogPane().setMinHeight(Region.USE_PREF_SIZE)
        alert.showAndWait()
    }

    QuPathViewer getViewer() {
        return gui.getViewer()
    }

    /** Opens the window in place of one that is open, at the ROI where the review was. */
    void open() {
        Window.getWindows().findAll { it instanceof Stage && it.getTitle() == TITLE }.each {
            it.fireEvent(new WindowEvent(it, WindowEvent.WINDOW_CLOSE_REQUEST))
        }
        // The script editor, from which this was started, covers the image. What is in it stays there.
        Window.getWindows().findAll { it instanceof Stage && it.getTitle()?.startsWith('Script Editor') }.each {
            it.hide()
        }
        offerClasses()
        stage = new Stage()
        stage.initOwner(gui.getStage())
        stage.setTitle(TITLE)
        stage.setScene(new Scene(content(), 380, -1))
        stage.setOnCloseRequest { close() }
        arrange()
        stage.show()
        placeBeside()
        stage.toFront()
        // At last: nobody would take them away if something failed before, and QuPath's window would lose these keys.
        [stage, gui.getStage()].each { it.getScene().addEventFilter(KeyEvent.ANY, keys) }
        gui.getStage().addEventFilter(WindowEvent.WINDOW_CLOSE_REQUEST, quitting)
        String nucleus = review.rememberedNucleus()
        go(Math.max(0, review.index))
        if (isShown()) {
            review.select(nucleus)
            showNucleus(review.left == 0 ? allDone() : null)
        }
    }

    private void close() {
        gui.getStage().getScene().removeEventFilter(KeyEvent.ANY, keys)
        gui.getStage().removeEventFilter(WindowEvent.WINDOW_CLOSE_REQUEST, quitting)
        viewer.getCustomOverlayLayers().remove(overlay)
        restoring.reverse().each { it.call() }
        saving { saveOpen() }   // not an image that a person closed: it may have other nuclei by now
        review.release()
        if (isShown())
            review.writeState()
        stage.close()
    }

    /** At the right border of QuPath's window, where the image is not covered as long as there is room. */
    private void placeBeside() {
        Stage main = gui.getStage()
        def screen = javafx.stage.Screen.getScreensForRectangle(main.getX(), main.getY(), main.getWidth(),
                main.getHeight()).find()?.getVisualBounds() ?: javafx.stage.Screen.getPrimary().getVisualBounds()
        stage.setX(Math.min(main.getX() + main.getWidth(), screen.getMaxX() - stage.getWidth()))
        stage.setY(Math.max(screen.getMinY(), Math.min(main.getY() + 60, screen.getMaxY() - stage.getHeight())))
    }

    private void offerClasses() {
        def listed = gui.getAvailablePathClasses()   // the window keeps the project's list the same
        listed.addAll([Review.TO_CORRECT, Review.CORRECTED].collect { PathClass.fromString(it) }.findAll {
            !listed.contains(it)
        })
    }

    /** Shows nuclei as contours without names, above all else; what was set before is restored at the end. */
    private void arrange() {
        OverlayOptions options = viewer.getOverlayOptions()
        List<List<?>> wanted = [
            [options.showAnnotationsProperty(), true], [options.fillAnnotationsProperty(), false],
            [options.showNamesProperty(), false], [options.showDetectionsProperty(), false],
            [options.showPixelClassificationProperty(), false], [options.opacityProperty(), 1f],
            [PathPrefs.autoSetAnnotationClassProperty(), PathPrefs.autoSetAnnotationClassProperty().get()],
        ]
        boolean showsSelected = options.metaClass.respondsTo(options, 'selectedClassVisibilityModeProperty')
        if (showsSelected) {   // since QuPath 0.6: or all classes but those that are selected
            def mode = options.selectedClassVisibilityModeProperty()
            wanted << [mode, mode.getValue().getClass().valueOf('HIDE_SELECTED')]
        }
        Set<PathClass> hidden = showsSelected ? options.selectedClassesProperty() : options.hiddenClassesProperty()
        List<PathClass> hiddenBefore = new ArrayList<>(hidden)
        restoring << {
            hidden.clear()
            hidden.addAll(hiddenBefore)
        }
        hidden.clear()
        wanted.each { property, value ->
            def before = property.getValue()
            restoring << { property.setValue(before) }
            property.setValue(value)
        }
        if (gui.metaClass.respondsTo(gui, 'getViewerManager'))   // since QuPath 0.5: what lies over the image
            [gui.getViewerManager().showOverviewProperty(), gui.getViewerManager().showLocationProperty()].each {
                boolean before = it.getValue()
                restoring << { it.setValue(before) }
                it.setValue(false)
            }
        def tool = tools(gui).getSelectedTool()
        restoring << { tools(gui).setSelectedTool(tool) }
    }

    /** What has the selected tool: in QuPath 0.4 the window itself. */
    static Object tools(Object gui) {
        return gui.metaClass.respondsTo(gui, 'getToolManager') ? gui.getToolManager() : gui
    }

    // ------------------------------------------------ what is in the window

    private VBox content() {
        place.setStyle('-fx-font-size: 1.3em; -fx-font-weight: bold')
        nucleusText.setStyle('-fx-font-weight: bold')
        changes.setStyle('-fx-text-fill: -fx-accent; -fx-font-weight: bold')
        [image, why, nucleusText, message, changes].each {
            it.setWrapText(true)
            it.setMinHeight(Region.USE_PREF_SIZE)   // else long texts are cut
        }
        message.setMinHeight(52)
        message.setAlignment(Pos.TOP_LEFT)
        bar.setMaxWidth(Double.MAX_VALUE)
        refineButton.setMaxWidth(Double.MAX_VALUE)
        refineButton.setFocusTraversable(false)
        refineButton.setOnAction { refineAndRun() }
        VBox box = new VBox(6, place, bar, image, why, new Separator(), nucleusText, keyTable(), new Separator(),
                message, changes, refineButton)
        box.setPadding(new Insets(10))
        return box
    }

    /** The keys, what they do in words, and what they do. QuPath 0.5 uses none of them, but B, for the same. */
    private List<List<?>> keyList() {
        return [
            ['E', 'right: the next nucleus', KeyCode.E, { review.accept() }],
            ['X', 'delete this nucleus', KeyCode.X, { review.delete() }],
            ['Q', 'back to the one before', KeyCode.Q, { review.back() }],
            ['1  2', 'contour smaller, larger', KeyCode.DIGIT1, { review.grow(-0.25d) }],
            [null, null, KeyCode.DIGIT2, { review.grow(0.25d) }],
            ['Shift+arrows', 'move it', null, null],
            ['B', 'outline a missing one: brush', KeyCode.B, { brush() }],
            ['I', 'add a round one, at the mouse', KeyCode.I, { insert() }],
            ['Z', 'undo X, I, 1, 2, or a move', KeyCode.Z, { review.undo() }],
            ['Y', 'ROI is corrected: to the next one', KeyCode.Y, { corrected() }],
            ['J  K', 'ROI before, ROI after', KeyCode.J, { step(-1) }],
            [null, null, KeyCode.K, { step(1) }],
            ['T', 'show what a refined model changed', KeyCode.T, { toggle() }],
            [null, null, KeyCode.U, { refineAndRun() }],
        ]
    }

    private GridPane keyTable() {
        GridPane grid = new GridPane()
        grid.setHgap(8)
        grid.setVgap(2)
        keyList().findAll { it[0] }.eachWithIndex { row, number ->
            Label key = new Label(row[0])
            key.setStyle('-fx-font-weight: bold; -fx-font-family: monospace')
            grid.addRow(number, key, new Label(row[1]))
        }
        return grid
    }

    private void show(String text) {
        CorrectionRoi roi = review.current
        int done = review.rois.size() - review.left
        place.setText("${review.left} of ${review.rois.size()} ROIs left")
        bar.setProgress(done / (double) review.rois.size())
        image.setText("${roi.imageName}: ${roi.name ?: 'an ROI without name'}${roi.corrected ? ', corrected' : ''}")
        why.setText((roi.description ?: '').replaceAll(/, then set the ROI's class.*/, '.'))   // Y does that
        int seen = review.nuclei.count { review.seen.contains(it.getID().toString()) } as int
        nucleusText.setText("${review.nuclei.size()} nuclei, ${seen} seen" + (review.nucleus == null ? '' :
                Double.isInfinite(Review.confidence(review.nucleus)) ? '; this one was drawn' :
                        String.format('; this one: confidence %.2f', Review.confidence(review.nucleus))))
        message.setText(text ?: '')
        String changed = review.changesInWords()
        changes.setText(changed ?: '')
        refineButton.setDisable(done == 0 || busy)
        stage.sizeToScene()   // for longer texts
        refineButton.setDefaultButton(review.left == 0 && changed == null)   // for Enter
    }

    // ------------------------------------------------ ROIs

    /** Opens the image of an ROI, and zooms to it. */
    private void go(int number) {
        CorrectionRoi roi = review.rois[number]
        review.index = number
        ProjectImageEntry<?> entry = review.entryOf(roi)
        if (!isOpen(roi)) {
            saving { saveOpen() }
            if (entry != null)   // its image is still in the project
                gui.openImageEntry(entry)
        }
        if (!isOpen(roi)) {
            show("${roi.imageName} cannot be opened. K goes to the next ROI.")
            return
        }
        if (roi.waiting)
            scripts.run('import_nuclei.groovy', review.project, gui.getImageData())
        PathObject annotation = review.begin(number, gui.getImageData())
        if (annotation == null) {
            show('This ROI is not in the image any more. K goes to the next one.')
            return
        }
        zoom(annotation.getROI())
        PathPrefs.autoSetAnnotationClassProperty().set(review.classOfNuclei())
        tools(gui).setSelectedTool(PathTools.MOVE)
        showChanges()
        showNucleus(roi.corrected ? 'This ROI is marked as corrected. You can go on correcting it.' : null)
    }

    /** Shows an ROI as large as it can be, in the part of the viewer that this window leaves free. */
    private void zoom(ROI roi) {
        def view = viewer.getView()
        def onScreen = view.localToScreen(view.getBoundsInLocal())
        double covered = onScreen == null ? 0 : Math.max(0d, onScreen.getMaxX() - stage.getX())
        if (covered > view.getWidth() / 2)
            covered = 0
        double downsample = 1.1d * Math.max(roi.getBoundsWidth() / (view.getWidth() - covered),
                roi.getBoundsHeight() / view.getHeight())
        viewer.setDownsampleFactor(downsample)
        viewer.setCenterPixelLocation(roi.getCentroidX() + covered / 2 * downsample, roi.getCentroidY())
    }

    private boolean isOpen(CorrectionRoi roi) {
        ImageData<?> open = gui.getImageData()
        return open != null && review.project.getEntry(open)?.getID() == roi.image
    }

    /** Whether the image of the present ROI is the open one. */
    private boolean isShown() {
        return review.imageData != null && gui.getImageData() === review.imageData && review.annotation != null
    }

    private void saveOpen() {
        ImageData<?> open = gui.getImageData()
        if (open != null && open === review.imageData)
            review.save()
        else if (open != null && open.isChanged())
            review.saveWithProject(open)
    }

    private void saving(Closure<?> save) {
        try {
            save()
        } catch (IOException e) {
            logger.error('Not saved', e)
            tell(stage, "The image was not saved: ${e.getMessage()}.\n\nNothing is lost yet: it is still open. " +
                    'Make room on the disk, or ask for the permission to write, and save it.')
        }
    }

    private String corrected() {
        String problem = review.problem()
        if (problem != null)
            return problem
        boolean saved = false
        saving {
            review.markCorrected()
            saved = true
        }
        if (!saved)
            return 'This ROI is marked, but the image is not saved.'
        int next = review.nextUncorrected()
        if (next < 0)
            return allDone()
        go(next)
        return null
    }

    private String allDone() {
        return review.changesInWords() != null ? 'J and K go through the ROIs; T shows the models before and after.' :
                'All ROIs are corrected. U refines the model with them, and finds nuclei again.'
    }

    private String step(int by) {
        saving { saveOpen() }
        go(Math.floorMod(review.index + by, review.rois.size()))
        return message.getText()
    }

    // ------------------------------------------------ nuclei

    private void showNucleus(String text) {
        def selection = viewer.getHierarchy()?.getSelectionModel()
        if (review.nucleus != null) {
            selection?.setSelectedObject(review.nucleus)
            ROI roi = review.nucleus.getROI()
            if (!viewer.getDisplayedRegionShape().contains(roi.getCentroidX(), roi.getCentroidY()))
                viewer.setCenterPixelLocation(roi.getCentroidX(), roi.getCentroidY())
        } else
            selection?.clearSelection()
        viewer.repaint()
        show(text)
    }

    /** The brush draws a new nucleus where none is selected, and changes one that it begins in. */
    private String brush() {
        review.nucleus = null
        tools(gui).setSelectedTool(PathTools.BRUSH)
        return 'Paint the nucleus. Within a contour, the brush enlarges it; with Alt, it cuts. E goes on.'
    }

    /** Adds a round nucleus at the mouse pointer, if that is in the ROI; else in the middle of the ROI. */
    private String insert() {
        ROI roi = review.annotation.getROI()
        def pointer = viewer.getMousePosition()
        def here = pointer == null ? null : viewer.componentPointToImagePoint(pointer, null, false)
        if (here == null || !roi.contains(here.getX(), here.getY()))
            return review.insert(roi.getCentroidX(), roi.getCentroidY())
        return review.insert(here.getX(), here.getY())
    }

    // ------------------------------------------------ keys

    private void handle(KeyEvent event) {
        if (busy || event.getTarget() instanceof TextInputControl || event.isShortcutDown() || event.isAltDown() ||
                event.isMetaDown())
            return
        Closure<String> action = actionOf(event)
        if (action == null)
            return
        event.consume()   // also what QuPath would do when the key is released
        if (event.getEventType() != KeyEvent.KEY_PRESSED)
            return
        try {
            act(event.getCode(), action)
        } catch (Exception e) {
            logger.error('The key failed', e)
            show("That did not work: ${e.getMessage()}")
        }
    }

    private void act(KeyCode code, Closure<String> action) {
        if (code in [KeyCode.J, KeyCode.K, KeyCode.U]) {
            String text = action()
            show(text)
            return
        }
        if (!isShown()) {   // a person opened another image, or deleted the ROI
            go(review.index)
            return
        }
        review.choose(viewer.getSelectedObject())   // by a click
        int before = review.index
        String text = action()
        if (review.index == before || text != null)
            showNucleus(text)
    }

    private Closure<String> actionOf(KeyEvent event) {
        KeyCode code = event.getCode()
        if (event.isShiftDown()) {
            Map<KeyCode, List<Double>> directions = [(KeyCode.LEFT): [-1d, 0d], (KeyCode.RIGHT): [1d, 0d],
                                                     (KeyCode.UP): [0d, -1d], (KeyCode.DOWN): [0d, 1d]]
            List<Double> direction = directions[code]
            return direction == null ? null : { review.move(0.5d * direction[0], 0.5d * direction[1]) }
        }
        return keyList().find { it[2] == code }?.get(3)
    }

    // ------------------------------------------------ refining, and what changed

    /** Refines the model, finds nuclei in all images with it, and imports them: in QuPath's background. */
    private String refineAndRun() {
        if (review.rois.every { !it.corrected })
            return 'No ROI is corrected yet.'
        if (review.left > 0 && !asked) {
            asked = true
            return "${review.left} ROIs are not corrected yet. Press U again to refine with the others."
        }
        asked = false
        saving { saveOpen() }
        review.release()   // else the import would take them for changed
        busy = true
        show('Refining, and finding nuclei again. You can go on working, but not with these keys.')
        ImageData<?> open = gui.getImageData()
        Thread.startDaemon('review') {
            List<String> problems = []
            Closure<?> task = { String what ->
                scripts.run('run_patchcl.groovy', review.project, open, [patchcl_task: what])
            }
            boolean refined = attempt('Refining', problems) { task('refine') }
            if (refined) {
                attempt('Finding nuclei', problems) { task('project') }
                // Also after a failure: one image fails, the others have their nuclei.
                attempt('Importing nuclei', problems) { importAll(problems) }
            }
            Platform.runLater { afterRun(refined, problems) }
        }
        return message.getText()
    }

    /** Does something, and returns true; after an error, false, with its message added to the problems. */
    private boolean attempt(String what, List<String> problems, Closure<?> work) {
        try {
            work()
            return true
        } catch (Exception e) {
            logger.error("${what} failed", e)
            problems << (e.getMessage() ?: "${what} failed: ${e}".toString())
            return false
        }
    }

    /** Imports the new nuclei into all images that wait for them, and saves these; one that fails costs no other. */
    private void importAll(List<String> problems) {
        for (entry in review.project.getImageList()) {
            String name = entry.getImageName()
            List<String> found = []
            if (review.isWaiting(entry))
                attempt("Importing the nuclei of ${name}", found) { importInto(entry) }
            problems.addAll(found.collect { it.contains(name) ? it : "${name}: ${it}".toString() })
        }
    }

    /**
     * Imports into an image as it is open: a person's next save would overwrite what was saved beside. Else into that
     * on disk, and again if it was opened meanwhile.
     */
    private void importInto(ProjectImageEntry<?> entry) {
        if (!importWhereOpen(entry)) {
            ImageData<?> imageData = entry.readImageData()
            try {
                importAndSave(entry, imageData, [(ScriptAttributes.BATCH_SAVE): true])
            } finally {
                imageData.getServer().close()
            }
            importWhereOpen(entry)
        }
        if (!review.isImported(entry))   // a person was asked about nuclei that would be lost
            throw new IllegalStateException("Nothing was changed in ${entry.getImageName()}: the script " +
                    'import nuclei imports its nuclei.')
    }

    /** Imports into an image if a viewer shows it, in the thread of the window: nobody can change it meanwhile. */
    private boolean importWhereOpen(ProjectImageEntry<?> entry) {
        def importing = new FutureTask<Boolean>({
            ImageData<?> open = openImages().find { review.project.getEntry(it)?.getID() == entry.getID() }
            if (open != null)
                importAndSave(entry, open, [:])
            return open != null
        })
        Platform.runLater(importing)
        try {
            return importing.get()
        } catch (ExecutionException e) {
            throw e.getCause()
        }
    }

    private List<ImageData<?>> openImages() {
        def viewers = gui.metaClass.respondsTo(gui, 'getAllViewers') ? gui.getAllViewers() : gui.getViewers()
        return viewers.collect { it.getImageData() }.findAll()
    }

    private void importAndSave(ProjectImageEntry<?> entry, ImageData<?> imageData, Map<String, Object> variables) {
        scripts.run('import_nuclei.groovy', review.project, imageData, variables)
        if (review.isImported(entry))
            review.saveWithProject(imageData)
    }

    /** Saves and shows what changed, if the model was refined, then all problems: that message waits for a person. */
    private void afterRun(boolean refined, List<String> problems) {
        busy = false
        if (refined) {
            saving { saveOpen() }
            review.findRois(gui.getImageData())
            shown = 3
            go(review.index < 0 ? 0 : review.index)
            String where = problems.isEmpty() ? 'in all images' : 'in all images that did not fail'
            show(changesText() ?: "The nuclei of the refined model are ${where}.")
        } else {
            show('Failed: see the message.')
        }
        if (!problems.isEmpty())
            tell(stage, problems.join('\n\n'))
    }

    private String toggle() {
        if (review.changesHere() == null)
            return 'No refined model has found nuclei in this ROI yet.'
        shown = (shown + 1) % SHOWN.size()
        showChanges()
        return changesText()
    }

    private String changesText() {
        JsonObject here = review.changesHere()
        return here == null ? null : "Shown: ${SHOWN[shown]} (before: orange, refined: light blue, dashed). Here: " +
                "${Review.inWords([here])}."
    }

    private void showChanges() {
        JsonObject here = review.changesHere()
        overlay.shownIn = gui.getImageData()
        overlay.before = here == null || !(shown in [1, 3]) ? [] : ChangesOverlay.shapes(here.getAsJsonArray('before'))
        overlay.after = here == null || !(shown in [2, 3]) ? [] : ChangesOverlay.shapes(here.getAsJsonArray('after'))
        if (!viewer.getCustomOverlayLayers().contains(overlay))
            viewer.getCustomOverlayLayers().add(overlay)
        viewer.repaint()
    }
}
