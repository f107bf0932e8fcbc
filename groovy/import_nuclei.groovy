/**
 * Shows the nuclei that `patchcl-qp run` found in the open image; with 'Run > Run for project', in every image chosen
 * there. Without a window, the images are saved at once:
 *
 *     QuPath script -p project.qpproj import_nuclei.groovy
 *
 * The script can be run repeatedly. Objects of an earlier import are replaced. Objects that a person drew or changed
 * stay as they are, nuclei that a person deleted stay deleted, and new nuclei in either place are left out. To restore
 * deleted nuclei, delete all nuclei, then run this script again.
 *
 * Detections of other programs (QuPath's own, StarDist's) stay as they are, too, and new nuclei are added beside them.
 * `patchcl-qp run --overlapping keep` leaves out new nuclei in their place, `--overlapping replace` removes those in
 * whose place a new nucleus is added.
 *
 * The nuclei lie in a locked annotation, 'PatchCL', with their number and density, and with the numbers of nuclei that
 * were found, added and left out; after a run within regions
 * (`--within`), in one for each region. The image shows the last run: a run within regions replaces one of the whole
 * image. After `patchcl-qp remove`, this script removes what it added, except objects that a person changed.
 *
 * After `patchcl-qp suggest`, it also adds the suggested ROIs: locked annotations of class 'PatchCL: correct here', in
 * which all nuclei are annotations, to be corrected: also those that you classified or locked, and cells, of which the
 * nucleus remains. The same is done in an ROI of that class that you drew. Set the class of a finished ROI to
 * 'PatchCL: corrected'. From then on, no nucleus that overlaps an ROI is added or removed. An ROI in which nobody
 * changed anything is removed when others are suggested.
 *
 * Writes a receipt for each image, patchcl/imported/<image id>.json, with the run that the image shows.
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
import qupath.lib.objects.PathCellObject
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.classes.PathClassTools
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
String folderName = 'patchcl'   // folder of patchcl-qp's results, beside project.qpproj
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
Path resultFile = folder.resolve('results').resolve(entry.getID()).resolve('result.json')
if (!Files.exists(resultFile)) {
    logger.warn("No nuclei for ${name}: run 'patchcl-qp run' on this project first (looked for ${resultFile}).")
    return
}

// Read everything before anything is changed: a damaged file must not cost the nuclei shown now.
ImageResults results = readResults(name, resultFile, folder.resolve('fields').resolve(entry.getID() + '.json'))
def counts = replaceNuclei(imageData, entry, results.nuclei, results.result, results.suggested, maxOverlap)
if (results.suggested != null)
    offerClasses(QP.getProject(), roiClasses())

// QuPath saves after 'Run for project' and 'QuPath script --save', a person saves the open image.
boolean savedByQuPath = getBinding().getVariables()[ScriptAttributes.BATCH_SAVE]
boolean inWindow = QuPathGUI.getInstance() != null
boolean savedHere = !savedByQuPath && !inWindow
if (savedHere)
    entry.saveImageData(imageData)
writeReceipt(folder.resolve('imported').resolve(entry.getID() + '.json'), [
    image   : name,
    run     : text(results.result, 'run'),
    imported: OffsetDateTime.now().toString(),
    saved   : savedHere,
    in_words: inWords(counts),
] + counts)
logger.info("${name}: ${inWords(counts)}; ${counts.removed} of an earlier import removed, ${counts.kept} other " +
        'objects kept.' +
        (results.suggested == null ? '' : " ROIs to correct: ${counts.fields} new, ${counts.fields_kept} kept.") +
        (counts.reshapable == 0 ? '' : " Detections that became annotations there: ${counts.reshapable}.") +
        (inWindow && !savedByQuPath ? ' Save the image to keep them.' : ''))


/** What patchcl-qp wrote for an image. */
class ImageResults {

    JsonObject result   // of result.json
    JsonObject suggested   // the ROIs to correct; null without any
    List<PathObject> nuclei = []
}


/** What earlier imports added: by object id, the digest and centroid of each, with a suffix for regions and ROIs. */
@CompileStatic
class Marks {

    final Map<String, String> nuclei = [:]
    final Map<String, String> regions = [:]
    final Map<String, String> rois = [:]

    boolean contains(String id) {
        return nuclei.containsKey(id) || regions.containsKey(id) || rois.containsKey(id)
    }
}


/** The objects of an image before an import. Unchanged objects are imported ones that nobody touched. */
@CompileStatic
class ExistingObjects {

    final List<PathObject> unchangedRois = []   // without those that are suggested again
    final Set<PathObject> unchangedRegions = new LinkedHashSet<>()
    final Set<PathObject> unchangedNuclei = new LinkedHashSet<>()
    final List<PathObject> keptRois = []
    final List<PathObject> kept = []   // a person's: drawn, changed, or made of nuclei of ours
    final Set<String> keptIds = new HashSet<>()   // of those
    final List<PathObject> foreign = []   // detections of other programs
    boolean hasConverted   // whether cells, say, were made of nuclei of ours
}


/** The objects that an import adds to an image. */
@CompileStatic
class NewObjects {

    List<PathObject> nuclei = []
    List<PathObject> rois = []
    List<PathObject> regions = []
    final Map<String, Integer> leftOut = noneLeftOut()
    final Map<PathObject, String> whyLeftOut = [:]   // the nuclei, and which of these reasons it is
    List<PathObject> replaced = []   // objects of other programs
    final Map<PathObject, PathObject> reshapable = [:]   // detections in ROIs to correct, and annotations for them

    /** The reasons why nuclei are left out, as in the receipt; each with 0 of them. */
    static Map<String, Integer> noneLeftOut() {
        return [left_out_kept: 0, left_out_deleted: 0, left_out_others: 0, left_out_fields: 0]
    }
}


static ImageResults readResults(String image, Path resultFile, Path roisFile) {
    Path folder = resultFile.getParent()
    ImageResults results = new ImageResults()
    try {
        results.result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
        for (file in results.result.getAsJsonArray('files'))
            results.nuclei.addAll(PathIO.readObjects(folder.resolve(file.getAsString())))
        if (results.nuclei.size() != results.result.get('nuclei').getAsInt())
            throw new IOException("${results.nuclei.size()} of ${results.result.get('nuclei')} nuclei")
        if (Files.exists(roisFile))
            results.suggested = JsonParser.parseString(Files.readString(roisFile)).getAsJsonObject()
    } catch (Exception e) {
        // Without its cause: QuPath would show the message of the cause in place of this one.
        throw new IOException("The results of ${image} are damaged (${e.message}): run 'patchcl-qp run' again " +
                "(${folder}).")
    }
    return results
}

/**
 * Replaces the nuclei of earlier imports; returns how many were added, left out, removed and kept. 'result' is the
 * content of result.json, 'suggested' that of the file of ROIs to correct, null without any. patchcl-qp calls this,
 * too, when it writes by itself. In files and marks, ROIs are called 'fields', as in version 0.1.
 */
@CompileStatic
static Map<String, Integer> replaceNuclei(ImageData<?> imageData, ProjectImageEntry<?> entry, List<PathObject> nuclei,
                                          JsonObject result, JsonObject suggested, double maxOverlap) {
    boolean removing = result.has('removed')   // by patchcl-qp remove
    Marks marks = readMarks(imageData)
    List<PathObject> suggestions = removing || suggested == null ? [] as List<PathObject> :
            suggestedRois(imageData, suggested)
    ExistingObjects existing = sortObjects(imageData.getHierarchy().getAllObjects(false), marks, suggestions, nuclei)
    Marks decided = decidedByPerson(existing, marks, removing)

    NewObjects added = new NewObjects()
    added.rois = newRois(suggestions, existing, decided)
    chooseNuclei(added, nuclei, existing, decided, overlapping(result), maxOverlap)
    makeReshapable(added, existing, marks, overlapping(result) == 'keep')
    List<PathObject> regions = removing ? [] as List<PathObject> : newRegions(imageData, entry, result)
    added.regions = regions.findAll { PathObject region ->
        !existing.keptIds.contains(region.getID().toString())   // a person changed it
    }
    Map<String, String> newMarks = marksAfter(existing, added, decided, suggestions)
    exchange(imageData, existing, added)
    writeMarks(imageData, newMarks)
    measureRegions(imageData, regions, nuclei, added)
    countNuclei(imageData, toMarks(newMarks), result)
    return [found   : nuclei.size(), added: added.nuclei.size(), left_out: added.whyLeftOut.size(),
            removed : existing.unchangedNuclei.size(), replaced: added.replaced.size(),
            kept    : existing.kept.size() + existing.foreign.size() - added.replaced.size(),
            fields  : added.rois.size(), fields_kept: existing.keptRois.size(),
            reshapable: added.reshapable.size()] + added.leftOut
}

/** What to do where nuclei overlap objects of other programs: 'both', 'keep' or 'replace', as the run was asked to. */
static String overlapping(JsonObject result) {
    JsonObject settings = result.getAsJsonObject('config')?.getAsJsonObject('result')
    return settings?.get('overlapping')?.getAsString() ?: 'both'   // results of earlier versions have no such setting
}

/** The numbers of an import as a sentence. The same words are in patchcl_qupath/storage/records.py. */
static String inWords(Map<String, Integer> counts) {
    List<String> reasons = [
        left_out_kept   : 'in place of objects of yours',
        left_out_deleted: 'that you deleted',
        left_out_others : 'in place of objects of other programs',
        left_out_fields : 'in correction ROIs',
    ].findAll { key, words -> counts[key] > 0 }.collect { key, words -> "${counts[key]} ${words}".toString() }
    return "${counts.found} nuclei found, ${counts.added} added, ${counts.left_out} left out" +
            (reasons ? ": ${reasons.join(', ')}" : '') +
            (counts.replaced > 0 ? "; ${counts.replaced} objects of other programs replaced" : '')
}

/** Sorts the objects of an image by what a person did with them. */
@CompileStatic
static ExistingObjects sortObjects(Collection<PathObject> all, Marks marks, List<PathObject> suggestions,
                                   List<PathObject> nuclei) {
    ExistingObjects existing = new ExistingObjects()
    sortRois(existing, all, marks, suggestions)
    Set<PathObject> foreign = foreignObjects(all, marks, nuclei)
    Set<PathObject> rois = new HashSet<>(existing.unchangedRois)
    rois.addAll(existing.keptRois)
    for (PathObject pathObject : all) {
        if (rois.contains(pathObject))
            continue
        if (foreign.contains(pathObject)) {
            existing.foreign << pathObject
            continue
        }
        String id = pathObject.getID().toString()
        boolean isRegion = marks.regions.containsKey(id)
        String mark = isRegion ? marks.regions[id] : marks.nuclei[id]
        // A person may draw within a region. A nucleus with a drawing within, or in an ROI, is a person's now. But
        // QuPath's 'Resolve hierarchy' puts detections of other programs within annotations, without a person's doing.
        boolean unchanged = mark != null && mark.startsWith(digest(pathObject)) && (isRegion ||
                pathObject.getChildObjects().every { PathObject child ->
                    marks.contains(child.getID().toString()) || pathObject.isAnnotation() && foreign.contains(child)
                } &&
                !existing.keptRois.any { PathObject roi -> liesIn(pathObject, roi) })
        if (!unchanged) {
            existing.kept << pathObject
            existing.keptIds << id
            existing.hasConverted |= mark == null && pathObject.isDetection()
        } else if (isRegion)
            existing.unchangedRegions << pathObject
        else
            existing.unchangedNuclei << pathObject
    }
    return existing
}

/**
 * Detections that neither this program made nor a person drew: QuPath's own, StarDist's. A detection at the centroid of
 * an imported nucleus that is gone was made of it, as cells are, and is a person's; so is one with the id of a new
 * nucleus, whose file a person dragged into QuPath.
 */
@CompileStatic
static Set<PathObject> foreignObjects(Collection<PathObject> all, Marks marks, List<PathObject> nuclei) {
    Collection<PathObject> unknown = all.findAll { PathObject pathObject ->
        pathObject.isDetection() && !marks.contains(pathObject.getID().toString())
    }
    if (unknown.isEmpty())
        return Collections.emptySet()
    STRtree gone = placesOfMissing(all, marks)
    Set<UUID> newIds = new HashSet<>()
    for (PathObject nucleus : nuclei)
        newIds.add(nucleus.getID())
    Set<PathObject> foreign = new LinkedHashSet<>()
    for (PathObject pathObject : unknown)
        if (!newIds.contains(pathObject.getID()) && !isConverted(pathObject, gone))
            foreign.add(pathObject)
    return foreign
}

/** Where imported nuclei were that are no longer in the image. */
@CompileStatic
static STRtree placesOfMissing(Collection<PathObject> all, Marks marks) {
    Set<String> present = new HashSet<>()
    for (PathObject pathObject : all)
        present.add(pathObject.getID().toString())
    STRtree gone = new STRtree()
    marks.nuclei.each { String id, String mark ->
        if (!present.contains(id)) {
            Coordinate place = centroid(mark)
            gone.insert(new Envelope(place), place)
        }
    }
    return gone
}

/** Whether a detection has the contour of an imported nucleus that is gone, as a cell that was made of it. */
@CompileStatic
static boolean isConverted(PathObject pathObject, STRtree gone) {
    ROI roi = PathObjectTools.getROI(pathObject, true)
    if (roi == null || !roi.isArea())
        return false
    double x = roi.getCentroidX()
    double y = roi.getCentroidY()
    return !gone.query(new Envelope(x - 0.05d, x + 0.05d, y - 0.05d, y + 0.05d)).isEmpty()
}

/** Sorts the ROIs to correct: one is unchanged if nobody touched it or the nuclei in it. */
@CompileStatic
static void sortRois(ExistingObjects existing, Collection<PathObject> all, Marks marks, List<PathObject> suggestions) {
    for (PathObject roi : all) {
        String mark = marks.rois[roi.getID().toString()]
        if (mark == null && !isCorrectionRoi(roi))
            continue
        boolean unchanged = mark != null && mark.startsWith(digest(roi)) && mark.endsWith(contentDigest(roi, all))
        if (unchanged && !suggestions.any { PathObject suggestion -> suggestion.getID() == roi.getID() })
            existing.unchangedRois << roi
        else
            existing.keptRois << roi
    }
}

/**
 * Marks of imported nuclei that a person changed or deleted, or that lie in a kept ROI: no nucleus is added there.
 * And marks of the ROIs of earlier imports, which are not added again.
 */
@CompileStatic
static Marks decidedByPerson(ExistingObjects existing, Marks marks, boolean removing) {
    Marks decided = new Marks()
    decided.nuclei.putAll(marks.nuclei)
    decided.rois.putAll(marks.rois)
    for (PathObject nucleus : existing.unchangedNuclei)
        decided.nuclei.remove(nucleus.getID().toString())
    boolean allDeleted = existing.unchangedNuclei.isEmpty() && !existing.hasConverted &&
            Collections.disjoint(decided.nuclei.keySet(), existing.keptIds)
    if (removing || allDeleted)
        decided.nuclei.clear()
    if (removing || allDeleted && existing.keptRois.isEmpty())
        decided.rois.clear()
    return decided
}

/** The suggested ROIs to add: one that has a mark is in the image, or a person deleted it. */
@CompileStatic
static List<PathObject> newRois(List<PathObject> suggestions, ExistingObjects existing, Marks decided) {
    return suggestions.findAll { PathObject roi ->
        !decided.rois.containsKey(roi.getID().toString()) &&
                !existing.keptRois.any { PathObject other -> intersect(roi.getROI(), other.getROI()) }
    }
}

/** Sorts new nuclei into those to add, and those that are left out and why; and what they replace. */
@CompileStatic
static void chooseNuclei(NewObjects added, List<PathObject> nuclei, ExistingObjects existing, Marks decided,
                         String overlapping, double maxOverlap) {
    STRtree kept = contours(existing.kept)
    STRtree foreign = contours(overlapping == 'keep' ? existing.foreign : [] as List<PathObject>)
    STRtree changedPlaces = new STRtree()
    STRtree deletedPlaces = new STRtree()
    decided.nuclei.each { String id, String mark ->
        Coordinate place = centroid(mark)
        (existing.keptIds.contains(id) ? changedPlaces : deletedPlaces).insert(new Envelope(place), place)
    }
    for (PathObject nucleus : nuclei) {
        String id = nucleus.getID().toString()
        ROI roi = nucleus.getROI()
        String why = null
        if (existing.keptRois.any { PathObject correctionRoi -> liesIn(nucleus, correctionRoi) })
            why = 'left_out_fields'
        else if (existing.keptIds.contains(id) || coversAny(roi, changedPlaces) || overlapsAny(roi, kept, maxOverlap))
            why = 'left_out_kept'
        else if (decided.nuclei.containsKey(id) || coversAny(roi, deletedPlaces))
            why = 'left_out_deleted'
        else if (overlapsAny(roi, foreign, maxOverlap))
            why = 'left_out_others'
        if (why != null) {
            added.whyLeftOut[nucleus] = why
            added.leftOut[why] = added.leftOut[why] + 1
        } else
            added.nuclei << (added.rois.any { PathObject correctionRoi -> liesIn(nucleus, correctionRoi) } ?
                    toAnnotation(nucleus) : nucleus)
    }
    if (overlapping == 'replace')
        added.replaced = replacedBy(added.nuclei, existing, maxOverlap)
}

/** The objects of other programs in the place of new nuclei, but for those that show the work of a person. */
@CompileStatic
static List<PathObject> replacedBy(List<PathObject> nuclei, ExistingObjects existing, double maxOverlap) {
    STRtree places = contours(nuclei)
    return existing.foreign.findAll { PathObject other ->
        ROI roi = PathObjectTools.getROI(other, true)
        !other.isLocked() && other.getName() == null && !other.hasChildObjects() && roi?.isArea() &&
                overlapsAny(roi, places, maxOverlap) &&
                !existing.keptRois.any { PathObject correctionRoi -> liesIn(other, correctionRoi) }
    }
}

/** The contours of objects, those of the nuclei of cells, to be found by place. */
@CompileStatic
static STRtree contours(Collection<PathObject> objects) {
    STRtree tree = new STRtree()
    for (PathObject pathObject : objects) {
        ROI roi = PathObjectTools.getROI(pathObject, true)
        if (roi?.isArea())
            tree.insert(envelope(roi), roi)
    }
    return tree
}

/** The marks to keep with the image after an import. */
@CompileStatic
static Map<String, String> marksAfter(ExistingObjects existing, NewObjects added, Marks decided,
                                      List<PathObject> suggestions) {
    Map<String, String> marks = new LinkedHashMap<>(decided.nuclei)
    for (PathObject nucleus : added.nuclei)
        marks[nucleus.getID().toString()] = digestAndCentroid(nucleus)
    for (PathObject roi : existing.keptRois + suggestions) {
        String id = roi.getID().toString()
        if (decided.rois.containsKey(id))
            marks[id] = decided.rois[id]
    }
    List<PathObject> present = existing.kept + added.nuclei
    Set<PathObject> replaced = new HashSet<>(added.replaced)
    present.addAll(existing.foreign.findAll { PathObject other -> !replaced.contains(other) })
    for (PathObject roi : added.rois)
        marks[roi.getID().toString()] = digestAndCentroid(roi) + ' field ' +
                contentDigest(roi, present)
    for (PathObject region : added.regions)
        marks[region.getID().toString()] = digestAndCentroid(region) + ' region'
    return marks
}

/** Removes the unchanged objects from the image, and adds the new ones. */
@CompileStatic
static void exchange(ImageData<?> imageData, ExistingObjects existing, NewObjects added) {
    PathObjectHierarchy hierarchy = imageData.getHierarchy()
    remove(hierarchy, existing.unchangedRois)   // first: one may lie within a region, and hold others
    remove(hierarchy, added.replaced)
    // Objects that a person drew within an old region are assigned to regions as the nuclei are.
    List<PathObject> members = []
    for (PathObject region : existing.unchangedRegions)
        members.addAll(region.getChildObjects().findAll { PathObject child ->
            !existing.unchangedNuclei.contains(child)
        })
    members.addAll(added.nuclei)
    Set<PathObject> unchanged = new LinkedHashSet<>(existing.unchangedNuclei)
    unchanged.addAll(existing.unchangedRegions)
    remove(hierarchy, unchanged)
    // Filled before they are in the hierarchy: there, QuPath takes long over many annotations.
    List<PathObject> elsewhere = assignToRegions(members, added.regions)
    hierarchy.addObjects(elsewhere.findAll { PathObject pathObject -> pathObject.getParent() == null })   // new ones
    hierarchy.addObjects(added.regions)
    hierarchy.addObjects(added.rois)
    exchangeOneByOne(hierarchy, added.reshapable)
}

/** Puts each object in the place of another, below its parent and with its children. */
@CompileStatic
static void exchangeOneByOne(PathObjectHierarchy hierarchy, Map<PathObject, PathObject> successors) {
    if (successors.isEmpty())
        return
    hierarchy.getSelectionModel().deselectObjects(successors.keySet())
    successors.each { PathObject old, PathObject successor ->
        PathObject parent = old.getParent()
        successor.addChildObjects(new ArrayList<PathObject>(old.getChildObjects()))
        parent.removeChildObject(old)
        parent.addChildObject(successor)
    }
    hierarchy.fireHierarchyChangedEvent(hierarchy.getRootObject())
}

@CompileStatic
static void remove(PathObjectHierarchy hierarchy, Collection<PathObject> objects) {
    hierarchy.getSelectionModel().deselectObjects(objects)
    hierarchy.removeObjects(objects, true)
}

/** Classes of ROIs: of those to correct, and of those that are corrected. */
@CompileStatic
static List<PathClass> roiClasses() {
    return [PathClass.fromString('PatchCL: correct here', ColorTools.packRGB(255, 140, 0)),
            PathClass.fromString('PatchCL: corrected', ColorTools.packRGB(0, 160, 80))]
}

@CompileStatic
static boolean isCorrectionRoi(PathObject pathObject) {
    return pathObject.isAnnotation() && pathObject.getROI()?.isArea() &&
            roiClasses().contains(pathObject.getPathClass())
}

/** The ROIs that patchcl-qp suggested, cropped to the image. */
static List<PathObject> suggestedRois(ImageData<?> imageData, JsonObject suggested) {
    def server = imageData.getServer()
    return suggested.getAsJsonArray('fields').collect {
        JsonObject part = it.getAsJsonObject()
        def (x, y, width, height) = ['x', 'y', 'width', 'height'].collect { key -> part.get(key).getAsDouble() }
        ROI square = ROIs.createRectangleROI(x, y, Math.min(width, server.getWidth() - x),
                Math.min(height, server.getHeight() - y), ImagePlane.getDefaultPlane())
        PathObject roi = PathObjects.createAnnotationObject(square, roiClasses().first())
        roi.setID(UUID.fromString(text(part, 'id')))
        roi.setName(text(part, 'name'))
        roi.setDescription(text(part, 'description'))
        roi.setLocked(true)
        roi
    }
}

/** Adds classes to the list from which a person chooses in QuPath. */
static void offerClasses(Project<?> project, List<PathClass> classes) {
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

/** The same nucleus as an annotation: a person cannot reshape a detection in QuPath. */
@CompileStatic
static PathObject toAnnotation(PathObject nucleus) {
    if (nucleus.isAnnotation())
        return nucleus
    PathObject annotation = PathObjects.createAnnotationObject(
            nucleus.getROI(), nucleus.getPathClass(), nucleus.getMeasurementList())
    annotation.setID(nucleus.getID())
    return annotation
}

/**
 * Makes annotations of the detections of a person in ROIs to correct: new ones, and those that a person drew. Objects
 * of other programs stay, except where these are the nuclei.
 */
@CompileStatic
static void makeReshapable(NewObjects added, ExistingObjects existing, Marks marks, boolean withForeign) {
    PathClass toCorrect = roiClasses().first()
    List<PathObject> rois = added.rois + existing.keptRois.findAll { PathObject roi ->
        roi.getPathClass() == toCorrect && !marks.rois.containsKey(roi.getID().toString())
    }
    if (rois.isEmpty())
        return
    Map<PathObject, PathObject> made = added.reshapable
    for (PathObject pathObject : withForeign ? existing.kept + existing.foreign : existing.kept)
        if (isOutlined(pathObject) && rois.any { PathObject roi -> liesIn(pathObject, roi) })
            made[pathObject] = withAllOf(pathObject)
    existing.kept.replaceAll { PathObject pathObject -> made[pathObject] ?: pathObject }
    existing.foreign.replaceAll { PathObject pathObject -> made[pathObject] ?: pathObject }
}

/** Whether an object is a detection of a nucleus, or a cell that has one. */
@CompileStatic
static boolean isOutlined(PathObject pathObject) {
    return pathObject.isDetection() && !pathObject.isTile() &&
            (!(pathObject instanceof PathCellObject) || ((PathCellObject) pathObject).getNucleusROI() != null)
}

/** A detection as an annotation, with all that a person put on it; a cell as its nucleus. */
@CompileStatic
static PathObject withAllOf(PathObject detection) {
    PathObject annotation = PathObjects.createAnnotationObject(
            PathObjectTools.getROI(detection, true), detection.getPathClass(), detection.getMeasurementList())
    annotation.setID(detection.getID())
    annotation.setName(detection.getName())
    if (detection.getColor() != null)
        annotation.setColor(detection.getColor())
    annotation.setLocked(detection.isLocked())
    return annotation
}

/** Whether an object lies in an ROI, in part or whole. An object that is not much smaller is no nucleus. */
@CompileStatic
static boolean liesIn(PathObject pathObject, PathObject correctionRoi) {
    ROI contour = PathObjectTools.getROI(pathObject, true)
    ROI roi = correctionRoi.getROI()
    return contour?.isArea() && intersect(contour, roi) && contour.getArea() < roi.getArea() / 2
}

/** Whether two contours overlap or touch; most pairs are excluded cheaply, by their bounding boxes. */
@CompileStatic
static boolean intersect(ROI one, ROI other) {
    return envelope(one).intersects(envelope(other)) && one.getGeometry().intersects(other.getGeometry())
}

/** A digest of what a person can change of the objects in an ROI. */
@CompileStatic
static String contentDigest(PathObject roi, Collection<PathObject> objects) {
    List<String> within = []
    for (PathObject pathObject : objects)
        if (liesIn(pathObject, roi))
            within << pathObject.getID().toString() + digest(pathObject)
    return sha(within.sort().toString().getBytes(StandardCharsets.UTF_8))
}

/** The annotations that hold the nuclei: one for each analysis region, or one for the whole image. */
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

/** An annotation that holds nuclei. Equal places of one image have equal ids. */
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

/** Adds objects to the regions that hold their centroids; returns the objects outside all regions. */
@CompileStatic
static List<PathObject> assignToRegions(List<PathObject> objects, List<PathObject> regions) {
    STRtree places = places(regions)
    Map<PathObject, List<PathObject>> members = [:]
    List<PathObject> elsewhere = []
    for (PathObject pathObject : objects) {
        List<PathObject> around = regionsOf(pathObject, places)
        if (around.isEmpty())
            elsewhere << pathObject
        else
            members.computeIfAbsent(around.first()) { [] as List<PathObject> } << pathObject
    }
    members.each { PathObject region, List<PathObject> within -> region.addChildObjects(within) }
    return elsewhere
}

@CompileStatic
static STRtree places(Collection<PathObject> regions) {
    STRtree places = new STRtree()
    for (PathObject region : regions)
        places.insert(envelope(region.getROI()), region)
    return places
}

/**
 * The regions that hold the centroid of an object. A run decides by pixels: the contour of a nucleus on the border can
 * have its centroid outside of all regions, and then belongs to one that it meets.
 */
@CompileStatic
static List<PathObject> regionsOf(PathObject pathObject, STRtree places) {
    ROI roi = PathObjectTools.getROI(pathObject, true)
    double x = roi.getCentroidX()
    double y = roi.getCentroidY()
    List<PathObject> around = []
    for (Object region : places.query(new Envelope(new Coordinate(x, y))))
        if (((PathObject) region).getROI().contains(x, y))
            around << (PathObject) region
    if (around.isEmpty()) {
        Object near = places.query(envelope(roi)).find {
            ((PathObject) it).getROI().getGeometry().intersects(roi.getGeometry())
        }
        if (near != null)
            around << (PathObject) near
    }
    return around
}

/**
 * Measures the regions of a run, also those that a person unlocked or renamed: the nuclei that are there, and how many
 * were found, added and left out, for each reason.
 */
@CompileStatic
static void measureRegions(ImageData<?> imageData, List<PathObject> regions, List<PathObject> nuclei,
                           NewObjects added) {
    Map<UUID, PathObject> fresh = [:]
    for (PathObject region : regions)
        fresh[region.getID()] = region
    Collection<PathObject> shown = imageData.getHierarchy().getAnnotationObjects().findAll { PathObject annotation ->
        fresh.containsKey(annotation.getID())
    }
    Map<PathObject, Map<String, Integer>> counts = [:]
    for (PathObject region : shown) {
        refreshTissue(region, fresh[region.getID()])
        counts[region] = [found: 0, added: 0] + NewObjects.noneLeftOut()
    }
    STRtree places = places(shown)
    for (PathObject nucleus : nuclei)
        for (PathObject region : regionsOf(nucleus, places)) {
            Map<String, Integer> count = counts[region]
            String what = added.whyLeftOut[nucleus] ?: 'added'
            count['found'] = count['found'] + 1
            count[what] = count[what] + 1
        }
    counts.each { PathObject region, Map<String, Integer> count -> measureImport(region, count) }
}

/** Gives a region that a person kept the area of tissue of the last run; none if its shape is another one now. */
static void refreshTissue(PathObject region, PathObject fresh) {
    if (region === fresh)
        return
    String tissue = 'PatchCL: Tissue mm^2'
    boolean sameShape = digest(PathObjects.createAnnotationObject(region.getROI())) ==
            digest(PathObjects.createAnnotationObject(fresh.getROI()))
    region.getMeasurementList().put(tissue, sameShape ? fresh.getMeasurementList().get(tissue) : Double.NaN)
}

/** Measures what an import did in a region: the same numbers as in its receipt, which are those of all regions. */
static void measureImport(PathObject region, Map<String, Integer> count) {
    def measured = region.getMeasurementList()
    measured.put('PatchCL: Found', count.found)
    measured.put('PatchCL: Added', count.added)
    measured.put('PatchCL: Left out', count.found - count.added)
    measured.put('PatchCL: Left out for objects of yours', count.left_out_kept)
    measured.put('PatchCL: Left out as deleted by you', count.left_out_deleted)
    measured.put('PatchCL: Left out for other programs', count.left_out_others)
    measured.put('PatchCL: Left out in correction ROIs', count.left_out_fields)
}

/**
 * Counts the nuclei in the 'PatchCL' regions of an image anew, as they are now: after nuclei were drawn, deleted, moved
 * to other parents or made into cells. 'result' is the content of result.json, null without any. Returns what was
 * measured of each region. groovy/summarise.groovy and patchcl-qp call this.
 */
static List<Map<String, Object>> summarise(ImageData<?> imageData, ProjectImageEntry<?> entry, JsonObject result) {
    Marks marks = readMarks(imageData)
    if (result != null && !result.has('removed')) {
        Map<UUID, PathObject> fresh = newRegions(imageData, entry, result).collectEntries { [it.getID(), it] }
        for (region in shownRegions(imageData, marks).findAll { fresh.containsKey(it.getID()) })
            refreshTissue(region, fresh[region.getID()])
    }
    return countNuclei(imageData, marks, result).collect { region ->
        def measured = region.getMeasurementList()
        boolean hasTissue = !Double.isNaN(measured.get('PatchCL: Tissue mm^2'))
        [name: region.getName() ?: region.getDisplayedName(), x: region.getROI().getCentroidX(),
         y: region.getROI().getCentroidY(), nuclei: measured.get('PatchCL: Nuclei') as int, is_tissue: hasTissue,
         area_mm2: measured.get(hasTissue ? 'PatchCL: Tissue mm^2' : 'PatchCL: Area mm^2'),
         per_mm2: measured.get('PatchCL: Nuclei per mm^2')]
    }
}

/** The annotations of earlier imports that hold nuclei, also those that a person unlocked, renamed or reshaped. */
@CompileStatic
static List<PathObject> shownRegions(ImageData<?> imageData, Marks marks) {
    return imageData.getHierarchy().getAnnotationObjects().toList().findAll { PathObject annotation ->
        marks.regions.containsKey(annotation.getID().toString())
    }
}

/** Measures number and density of the nuclei in the regions, by position; returns the regions. */
@CompileStatic
static List<PathObject> countNuclei(ImageData<?> imageData, Marks marks, JsonObject result) {
    List<PathObject> regions = shownRegions(imageData, marks)
    if (regions.isEmpty())
        return regions
    Map<PathObject, Integer> counts = [:]
    for (PathObject region : regions)
        counts[region] = 0
    STRtree places = places(regions)
    boolean withForeign = result != null && overlapping(result) == 'keep'
    nucleiPresent(imageData, marks, withForeign).each { PathObject nucleus, Boolean onBorder ->
        for (PathObject region : regionsOf(nucleus, places))
            if (onBorder || region.getROI().contains(nucleusX(nucleus), nucleusY(nucleus)))
                counts[region] = counts[region] + 1
    }
    counts.each { PathObject region, Integer count -> measure(region, count, imageData) }
    imageData.getHierarchy().fireObjectMeasurementsChangedEvent(imageData, regions)
    return regions
}

@CompileStatic
static double nucleusX(PathObject nucleus) {
    return PathObjectTools.getROI(nucleus, true).getCentroidX()
}

@CompileStatic
static double nucleusY(PathObject nucleus) {
    return PathObjectTools.getROI(nucleus, true).getCentroidY()
}

/**
 * The nuclei of an image, whatever their parent: those that were imported, cells that were made of them, and those that
 * a person drew; and whether one on the border of a region belongs to it. Regions, ROIs and objects of a class that
 * QuPath ignores ('Ignore*') are none. Detections of other programs are nuclei only where ours were left out for them.
 */
@CompileStatic
static Map<PathObject, Boolean> nucleiPresent(ImageData<?> imageData, Marks marks, boolean withForeign) {
    Collection<PathObject> all = imageData.getHierarchy().getAllObjects(false)
    Set<PathObject> foreign = foreignObjects(all, marks, [] as List<PathObject>)
    Map<PathObject, Boolean> nuclei = [:]
    List<PathObject> drawn = []
    for (PathObject pathObject : all) {
        String id = pathObject.getID().toString()
        ROI roi = PathObjectTools.getROI(pathObject, true)
        boolean ignored = pathObject.getPathClass() != null &&   // of no class, QuPath says the same
                PathClassTools.isIgnoredClass(pathObject.getPathClass())
        if (roi == null || !roi.isArea() || ignored ||
                marks.regions.containsKey(id) || marks.rois.containsKey(id) || isCorrectionRoi(pathObject))
            continue
        if (marks.nuclei.containsKey(id) || pathObject.isDetection() && !foreign.contains(pathObject))
            nuclei[pathObject] = true
        else if (withForeign && pathObject.isDetection() && !pathObject.isTile())
            nuclei[pathObject] = false
        else if (pathObject.isAnnotation())
            drawn << pathObject
    }
    for (PathObject annotation : drawnNuclei(drawn, nuclei.keySet(), imageData))
        nuclei[annotation] = false
    return nuclei
}

/** Of the annotations that a person drew, the nuclei: at most 2,000 µm² large, and without several nuclei within. */
@CompileStatic
static List<PathObject> drawnNuclei(List<PathObject> drawn, Collection<PathObject> nuclei, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    double pixelArea = pixels.hasPixelSizeMicrons() ?
            pixels.getPixelWidthMicrons() * pixels.getPixelHeightMicrons() : 0.25d * 0.25d
    STRtree centroids = new STRtree()
    for (PathObject nucleus : nuclei + drawn) {
        Coordinate place = new Coordinate(nucleusX(nucleus), nucleusY(nucleus))
        centroids.insert(new Envelope(place), place)
    }
    return drawn.findAll { PathObject annotation ->
        ROI roi = annotation.getROI()
        roi.getArea() * pixelArea <= 2000 && centroids.query(envelope(roi)).count {
            Coordinate place = (Coordinate) it
            roi.contains(place.x, place.y)
        }.intValue() <= 2   // its own, and one of a nucleus that it was drawn over
    }
}

/** Measures number and density of the nuclei of a region; per area of tissue, where that is known. */
static void measure(PathObject region, int count, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
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

/** Reads the marks from a property of the image, which QuPath saves, discards and duplicates with the objects. */
@CompileStatic
static Marks readMarks(ImageData<?> imageData) {
    String lines = imageData.getProperty('patchcl.imported') ?: ''
    Map<String, String> marks = [:]
    for (String line : lines.readLines())
        marks[line.substring(0, 36)] = line.substring(37)
    return toMarks(marks)
}

@CompileStatic
static Marks toMarks(Map<String, String> all) {
    Marks marks = new Marks()
    all.each { String id, String mark ->
        Map<String, String> kind = mark.endsWith(' region') ? marks.regions :
                mark.contains(' field ') ? marks.rois : marks.nuclei
        kind[id] = mark
    }
    return marks
}

static void writeMarks(ImageData<?> imageData, Map<String, String> marks) {
    imageData.setProperty('patchcl.imported', marks.collect { id, mark -> id + ' ' + mark }.join('\n'))
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
 * A digest of what a person can change of an object: kind, contour, class, name, colour, lock, description.
 * Coordinates are float, as QuPath saves them: the digest is the same after saving.
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

/** Whether one of the places lies inside the contour. */
@CompileStatic
static boolean coversAny(ROI roi, STRtree places) {
    return places.query(envelope(roi)).any { roi.contains(((Coordinate) it).x, ((Coordinate) it).y) }
}

/** Whether the intersection with one of the contours is more than maxOverlap of the union. */
@CompileStatic
static boolean overlapsAny(ROI roi, STRtree contours, double maxOverlap) {
    double area = roi.getArea()
    return contours.query(envelope(roi)).any {
        ROI other = (ROI) it
        double otherArea = other.getArea()
        // Cheap first: the areas alone exclude a match of a nucleus with a large annotation.
        if (Math.min(area, otherArea) <= maxOverlap * Math.max(area, otherArea))
            return false
        double shared = roi.getGeometry().intersection(other.getGeometry()).getArea()
        return shared > maxOverlap * (area + otherArea - shared)
    }
}
