/**
 * Shows the nuclei that `patchcl-qp run` found in the open image; with 'Run > Run for project', in every image chosen
 * there. Without a window, the images are saved at once:
 *
 *     QuPath script -p project.qpproj import_nuclei.groovy
 *
 * The script can be run repeatedly. Nuclei of an earlier import are replaced; what a person or a command of QuPath put
 * on them (class, foreign measurements, name, colour, metadata, children, a command's lock) is carried over to the new
 * nucleus in their place. Objects that a person drew, reshaped or locked stay as they are, nuclei that a person deleted
 * stay deleted, and new nuclei in either place are left out. To restore deleted nuclei, delete all nuclei, then run
 * this again.
 *
 * Detections of other programs (QuPath's own, StarDist's) stay as they are, too, and new nuclei are added beside them.
 * `patchcl-qp run --overlapping keep` leaves out new nuclei in their place, `--overlapping replace` removes those in
 * whose place a new nucleus is added.
 *
 * After `patchcl-qp run --expand`, nuclei are QuPath's cells, with their nucleus within; they replace nuclei of an
 * earlier import, and the other way round. What a person decided of a nucleus holds for its cell: all comparisons are
 * of nuclei.
 *
 * The nuclei lie in a locked annotation, 'PatchCL', with their number and density, and with the numbers of nuclei that
 * were found, added and left out; after a run within regions (`--within`), in one for each region: such a run replaces
 * what lies in these regions, and nothing else. Where a person nested nuclei in annotations or TMA cores, the new ones
 * are nested again. After `patchcl-qp remove`, this script removes what it added, except objects that a person changed.
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

import com.google.gson.JsonArray
import com.google.gson.JsonElement
import com.google.gson.JsonObject
import com.google.gson.JsonParser
import groovy.transform.CompileStatic
import java.lang.reflect.Method
import java.nio.ByteBuffer
import java.nio.charset.StandardCharsets
import java.nio.file.AccessDeniedException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.security.MessageDigest
import java.text.Normalizer
import java.time.LocalDateTime
import java.time.OffsetDateTime
import java.time.format.DateTimeFormatter
import java.util.concurrent.TimeUnit
import java.util.stream.IntStream
import javafx.application.Platform
import org.locationtech.jts.algorithm.locate.IndexedPointInAreaLocator
import org.locationtech.jts.geom.Coordinate
import org.locationtech.jts.geom.Envelope
import org.locationtech.jts.geom.Geometry
import org.locationtech.jts.geom.Location
import org.locationtech.jts.geom.prep.PreparedGeometry
import org.locationtech.jts.geom.prep.PreparedGeometryFactory
import org.locationtech.jts.index.strtree.STRtree
import org.slf4j.LoggerFactory
import qupath.lib.common.ColorTools
import qupath.lib.geom.Point2
import qupath.lib.gui.QuPathGUI
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.measurements.MeasurementList
import qupath.lib.objects.PathAnnotationObject
import qupath.lib.objects.PathCellObject
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.objects.PathObjects
import qupath.lib.objects.TMACoreObject
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.classes.PathClassTools
import qupath.lib.objects.hierarchy.PathObjectHierarchy
import qupath.lib.objects.hierarchy.TMAGrid
import qupath.lib.projects.Project
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.PolygonROI
import qupath.lib.roi.ROIs
import qupath.lib.roi.RectangleROI
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
Path backups = folder.resolve('backups').resolve(entry.getID())
if (isUnread(imageData, entry))
    throw new IOException("${name}: ${keepUnread(entry, backups)}")
Path resultFile = folder.resolve('results').resolve(entry.getID()).resolve('result.json')
if (!Files.exists(resultFile)) {
    logger.warn("No nuclei for ${name}: run 'patchcl-qp run' on this project first (looked for ${resultFile}).")
    return
}

// Read everything before anything is changed: a damaged file must not cost the nuclei shown now.
ImageResults results = readResults(name, resultFile, folder.resolve('fields').resolve(entry.getID() + '.json'))
// QuPath saves after 'Run for project' and 'QuPath script --save', a person saves the open image.
boolean savedByQuPath = getBinding().getVariables()[ScriptAttributes.BATCH_SAVE]
boolean inWindow = QuPathGUI.getInstance() != null
String otherImage = findOtherImage(imageData, results.result)
if (otherImage != null)
    throw new IOException("${name}: ${otherImage}")
def planned = { boolean keep ->
    planReplacement(imageData, entry, results.nuclei, results.result, results.suggested, maxOverlap, backups, keep)
}
def replacement = planned(false)
if (replacement.warning != null && inWindow && !savedByQuPath) {
    String answer = askToKeep("${name}: ${replacement.warning}.")
    if (answer == null) {
        logger.info("${name}: nothing was changed.")
        return
    }
    if (answer == 'keep')
        replacement = planned(true)
} else if (replacement.warning != null)
    logger.warn("${name}: ${replacement.warning}; they are kept in ${replacement.lostFile}. " +
            'To keep them in the image: `patchcl-qp run --keep`.')
def counts = replaceNuclei(imageData, replacement)
if (results.suggested != null)
    offerClasses(QP.getProject(), roiClasses())

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


/**
 * What earlier imports added: by object id, the digest and centroid of each, with a suffix for regions and ROIs, and
 * for nuclei that have the lock of a command.
 */
@CompileStatic
class Marks {

    static final String LOCKED = ' locked'

    final Map<UUID, String> nuclei = [:]
    final Map<UUID, String> regions = [:]
    final Map<UUID, String> rois = [:]

    boolean contains(UUID id) {
        return nuclei.containsKey(id) || regions.containsKey(id) || rois.containsKey(id)
    }

    void add(UUID id, String mark) {
        if (mark.endsWith(' region'))
            regions.put(id, mark)
        else if (mark.indexOf(' field ', 17) > 0)
            rois.put(id, mark)
        else
            nuclei.put(id, mark)
    }
}


/** The classes and measurements that imports gave nuclei: all others are a person's, or of a command of QuPath. */
@CompileStatic
class Given {

    // In marks, the class of a nucleus to which a person gave the very class that the run gave it.
    static final String BY_PERSON = '(given by a person)'

    final Set<String> classes = new LinkedHashSet<>([BY_PERSON])
    final Set<String> measurements = new LinkedHashSet<>()
    private List<String> lastNames
    private List<String> lastForeign

    /** Of names of measurements, those that imports did not give. Nuclei of one kind share their list of names. */
    List<String> foreign(List<String> names) {
        if (!names.is(lastNames)) {
            lastNames = names
            lastForeign = names.findAll { String name -> !measurements.contains(name) }
        }
        return lastForeign
    }

    /** Adds the names of all compartments of a cell where those of one were given: an earlier version missed some. */
    Given withAllCompartments() {
        for (String name : measurements.toList())
            if (name ==~ /.*(Mean|Std\.Dev\.|Min|Max)/)
                for (String compartment : ['Nucleus: ', 'Cytoplasm: ', 'Cell: '])
                    measurements.add(name.replaceFirst(/\b(Nucleus|Cytoplasm|Cell): /, compartment))
        return this
    }
}


/** What somebody put on an imported nucleus, whose contour is as it was. */
@CompileStatic
class Additions {

    boolean hasClass
    boolean hasNote   // a name, a colour, a description or other metadata
    boolean hasLock   // by a command: one that a person locked is none of the annotated nuclei
    List<String> measurements = []
    List<PathObject> children = []   // drawn within
    List<PathObject> strays = []   // within, by QuPath's 'Resolve hierarchy': detections of other programs

    /** Whether a person misses it where it is gone. */
    boolean isWork() {
        return hasClass || isMore()
    }

    /** Whether it is more than a class. */
    boolean isMore() {
        return hasNote || measurements || children
    }
}


/** SHA-256; asking Java for it anew takes as long as a short digest. */
@CompileStatic
class Sha {

    private static final MessageDigest UNUSED = MessageDigest.getInstance('SHA-256')

    static byte[] digest(byte[] bytes) {
        return ((MessageDigest) UNUSED.clone()).digest(bytes)
    }
}


/** The metadata of objects, of which an annotation's description is one. Methods of QuPath that are not public read it:
 * the public one makes a map for each object, which is then saved. */
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


/** Areas, and which of them hold a point; quick for areas of many corners and for many points. */
@CompileStatic
class Areas {

    final List<PathObject> objects
    private final STRtree tree = new STRtree()
    private final Map<PathObject, IndexedPointInAreaLocator> locators = new IdentityHashMap<>()
    private final Map<PathObject, PreparedGeometry> prepared = new IdentityHashMap<>()

    Areas(Collection<PathObject> objects) {
        this.objects = objects.toList()
        for (PathObject pathObject : objects) {
            ROI roi = pathObject.getROI()
            tree.insert(new Envelope(roi.getBoundsX(), roi.getBoundsX() + roi.getBoundsWidth(),
                    roi.getBoundsY(), roi.getBoundsY() + roi.getBoundsHeight()), pathObject)
            if (!(roi instanceof RectangleROI))
                locators[pathObject] = new IndexedPointInAreaLocator(roi.getGeometry())
        }
    }

    boolean isEmpty() {
        return objects.isEmpty()
    }

    /** Whether there is one area, which is the whole image. */
    boolean isWhole(int width, int height) {
        ROI roi = objects.size() == 1 ? objects.first().getROI() : null
        return roi instanceof RectangleROI && roi.getBoundsX() <= 0 && roi.getBoundsY() <= 0 &&
                roi.getBoundsX() + roi.getBoundsWidth() >= width && roi.getBoundsY() + roi.getBoundsHeight() >= height
    }

    List<PathObject> holding(Coordinate place) {
        if (objects.isEmpty())
            return Collections.emptyList()
        List<PathObject> found = new ArrayList<>(2)
        List<?> near = objects.size() == 1 ? objects : tree.query(new Envelope(place))
        for (Object one : near) {
            IndexedPointInAreaLocator locator = locators.get(one)
            boolean holds = locator == null ? ((PathObject) one).getROI().contains(place.x, place.y) :
                    locator.locate(place) != Location.EXTERIOR
            if (holds)
                found.add((PathObject) one)
        }
        return found
    }

    /** The first area that meets a contour; null if none does. */
    PathObject meeting(ROI roi) {
        if (objects.isEmpty())
            return null
        return (PathObject) tree.query(envelope(roi)).find { geometry((PathObject) it).intersects(roi.getGeometry()) }
    }

    boolean covers(PathObject area, ROI roi) {
        return geometry(area).covers(roi.getGeometry())
    }

    private PreparedGeometry geometry(PathObject area) {
        return prepared.computeIfAbsent(area) { PreparedGeometryFactory.prepare(area.getROI().getGeometry()) }
    }

    private static Envelope envelope(ROI roi) {
        return new Envelope(roi.getBoundsX(), roi.getBoundsX() + roi.getBoundsWidth(),
                roi.getBoundsY(), roi.getBoundsY() + roi.getBoundsHeight())
    }
}


/**
 * The objects of an image before an import. Of imported nuclei with the contour that they were given, the unchanged
 * ones are those that nobody touched, and annotated ones have additions. One outside lies in no region of the run.
 */
@CompileStatic
class ExistingObjects {

    final List<PathObject> unchangedRois = []   // without those that are suggested again
    final Set<PathObject> unchangedRegions = identitySet()   // without those outside
    final Set<PathObject> unchangedNuclei = identitySet()
    final Map<PathObject, Additions> annotated = [:]
    final Map<PathObject, Additions> outside = [:]   // with null where nobody touched it
    final List<PathObject> outsideRegions = []
    final List<PathObject> keptRois = []
    final List<PathObject> kept = []   // a person's: drawn, reshaped, locked, or made of nuclei of ours
    final Set<UUID> keptIds = new HashSet<>()   // of those
    final Set<UUID> intactIds = new HashSet<>()   // of imported nuclei with their contour
    final Set<PathObject> lockedByCommand = identitySet()   // of imported nuclei with their contour
    final List<PathObject> foreign = []   // detections of other programs
    final Set<PathObject> parents = identitySet()   // annotations and cores in which nuclei of ours are nested
    boolean hasConverted   // whether cells, say, were made of nuclei of ours

    static Set<PathObject> identitySet() {
        return Collections.newSetFromMap(new IdentityHashMap<PathObject, Boolean>())
    }

    /** The number of imported nuclei with the contour that they were given. */
    int getIntact() {
        return unchangedNuclei.size() + annotated.size() + outside.size()
    }
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
    Set<PathObject> unlocked = []   // nuclei there that a command locked

    void leaveOut(PathObject nucleus, String why) {
        whyLeftOut[nucleus] = why
        leftOut[why] = leftOut[why] + 1
    }

    /** The reasons why nuclei are left out, as in the receipt; each with 0 of them. */
    static Map<String, Integer> noneLeftOut() {
        return [left_out_kept: 0, left_out_deleted: 0, left_out_others: 0, left_out_fields: 0]
    }
}


/** The nuclei that are in an image. */
@CompileStatic
class PresentNuclei {

    final List<PathObject> onBorder = []   // one on the border of a region belongs to it
    final List<PathObject> others = []
}


/** The nuclei that were counted in a region, and their intensities by QuPath's classes. */
@CompileStatic
class Tally {

    int nuclei
    int negative
    int positive
    final int[] grades = new int[4]   // of 1+ to 3+, by number

    void add(PathObject nucleus) {
        nuclei++
        PathClass pathClass = nucleus.getPathClass()
        if (pathClass == null || PathClassTools.isNullClass(pathClass))
            return
        if (PathClassTools.isNegativeClass(pathClass))
            negative++
        else if (PathClassTools.isPositiveOrGradedIntensityClass(pathClass))
            positive++
        if (PathClassTools.isGradedIntensityClass(pathClass))
            grades[PathClassTools.isOnePlus(pathClass) ? 1 : PathClassTools.isTwoPlus(pathClass) ? 2 : 3]++
    }

    int getClassified() {
        return negative + positive
    }

    boolean isGraded() {
        return grades[1] + grades[2] + grades[3] > 0
    }

    /** As QuPath's: 0 to 300. */
    double getHScore() {
        return 100d * (grades[1] + 2 * grades[2] + 3 * grades[3]) / classified
    }

    /** As QuPath's: the score of the proportion, 0 to 5, and that of the mean grade, 0 to 3. */
    int getAllred() {
        if (positive == 0)
            return 0
        double share = positive / (double) classified
        int proportion = share >= 2 / 3d ? 5 : share >= 1 / 3d ? 4 : share >= 0.1d ? 3 : share >= 0.01d ? 2 : 1
        double mean = (grades[1] + 2 * grades[2] + 3 * grades[3]) / (double) positive
        return proportion + (mean > 7 / 3d ? 3 : mean > 5 / 3d ? 2 : 1)
    }
}


/** What an import is going to do: nothing is changed yet. */
@CompileStatic
class Replacement {

    JsonObject result   // of the run
    List<PathObject> nuclei   // of the run
    List<PathObject> regions   // of the run, also those that are in the image as a person's
    ExistingObjects existing
    NewObjects added
    Given given
    Map<UUID, String> marks   // after the import; those of new ROIs once it is done
    final Map<PathObject, PathObject> successors = [:]   // of annotated nuclei
    final List<PathObject> stayed = []   // annotated nuclei without a successor: they are kept,
    final List<PathObject> lost = []   // or removed
    Path lostFile   // to which the removed ones are written

    /** What a person loses, as a sentence; null if nothing is lost. */
    String getWarning() {
        if (lost.isEmpty())
            return null
        int classes = (int) lost.count { PathObject nucleus -> existing.annotated[nucleus].hasClass }
        int more = (int) lost.count { PathObject nucleus -> existing.annotated[nucleus].isMore() }
        int locked = (int) lost.count { PathObject nucleus -> existing.annotated[nucleus].hasLock }
        List<String> what = []
        if (classes > 0)
            what << "${classes} with a class of yours".toString()
        if (more > 0)
            what << "${more} with measurements or notes of yours".toString()
        if (locked > 0)
            what << "${locked} locked".toString()
        return "${lost.size()} nuclei that no new nucleus replaces are removed: ${what.join(', ')}"
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
        throw new IOException("The results of ${image} are damaged (${e.message}): remove ${folder} and run " +
                "'patchcl-qp run' again.")
    }
    return results
}

/**
 * Whether QuPath shows an image without what its file of objects holds: a file that
 * it cannot read it takes for none, and of one that was cut off it may read a part.
 */
@CompileStatic
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
@CompileStatic
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

/**
 * Copies the files of an image that QuPath shows without what they hold, and says what to do. Where nothing is done to
 * the image, 'Run for project' saves it all the same, in their place.
 */
@CompileStatic
static String keepUnread(ProjectImageEntry<?> entry, Path backups) {
    Files.createDirectories(backups)
    for (String name : ['data.qpdata', 'data.qpdata.bkp']) {
        Path file = entry.getEntryPath().resolve(name)
        if (!Files.exists(file))
            continue
        Path copy = backups.resolve("${name}.${Files.getLastModifiedTime(file).to(TimeUnit.NANOSECONDS)}.damaged")
        if (Files.exists(copy))
            continue
        Path temporary = copy.resolveSibling("${copy.getFileName()}.${UUID.randomUUID()}.partial")
        Files.copy(file, temporary, StandardCopyOption.COPY_ATTRIBUTES)
        Files.move(temporary, copy)
    }
    return "${entry.getEntryPath().resolve('data.qpdata')} is damaged, or was written after the image was opened: " +
            'QuPath shows the image without what is in it, and nothing was changed. Open the image again. If its ' +
            "objects are not there, restore the file, or move it away. A copy is in ${backups}"
}

/**
 * Why the nuclei of a run are those of another image than QuPath shows, and what to do; null where they are not. Of the
 * images of one file, QuPath and patchcl-qp may take different ones. patchcl-qp calls this, too.
 */
@CompileStatic
static String findOtherImage(ImageData<?> imageData, JsonObject result) {
    JsonArray size = result.getAsJsonObject('slide')?.getAsJsonArray('size')   // as of 0.2
    int width = imageData.getServer().getWidth()
    int height = imageData.getServer().getHeight()
    if (size == null || (size.get(0).getAsInt() == width && size.get(1).getAsInt() == height))
        return null
    return "QuPath shows an image of ${width} x ${height} px, but the nuclei are those of one of " +
            "${size.get(0)} x ${size.get(1)} px: remove it from the project in QuPath, add its file again, and run " +
            'again'
}

/**
 * Finds out how the nuclei of a run replace those of earlier imports; nothing is changed yet. 'result' is the content
 * of result.json, 'suggested' that of the file of ROIs to correct, null without any; 'backups' is the folder for what
 * is removed of a person's work, 'keep' whether nothing of it may be. patchcl-qp calls this, too, when it writes by
 * itself, and then replaceNuclei. In files and marks, ROIs are called 'fields', as in version 0.1.
 */
@CompileStatic
static Replacement planReplacement(ImageData<?> imageData, ProjectImageEntry<?> entry, List<PathObject> nuclei,
                                   JsonObject result, JsonObject suggested, double maxOverlap, Path backups,
                                   boolean keep) {
    boolean removing = result.has('removed')   // by patchcl-qp remove
    Marks marks = readMarks(imageData)
    List<PathObject> suggestions = removing || suggested == null ? [] as List<PathObject> :
            suggestedRois(imageData, suggested)
    Replacement plan = new Replacement(result: result, nuclei: nuclei, added: new NewObjects())
    plan.regions = removing ? [] as List<PathObject> : newRegions(imageData, entry, result)
    plan.given = readGiven(imageData, nuclei)
    plan.lostFile = backups.resolve('removed-' + DateTimeFormatter.ofPattern('yyyyMMdd-HHmmss')
            .format(LocalDateTime.now()) + '.geojson')
    Areas scope = removing || !result.has('regions') ? null : new Areas(plan.regions)   // null: the whole image
    ExistingObjects existing = sortObjects(imageData.getHierarchy().getAllObjects(false), marks, plan.given,
            suggestions, nuclei, scope)
    plan.existing = existing
    Marks decided = decidedByPerson(existing, marks, scope, removing)

    NewObjects added = plan.added
    added.rois = newRois(suggestions, existing, decided)
    chooseNuclei(added, nuclei, existing, decided, overlapping(result), maxOverlap)
    takeFromOutside(existing, added, scope, maxOverlap)
    findSuccessors(plan, maxOverlap, removing || keep || keepsWork(result))
    for (PathObject nucleus : removing ? [] as List<PathObject> : plan.stayed)
        decided.nuclei[nucleus.getID()] = marks.nuclei[nucleus.getID()]
    if (removing)
        decided.nuclei.putAll(marksOfDetections(existing, marks))
    convertToAnnotations(plan)
    makeReshapable(plan, marks)
    if (overlapping(result) == 'replace')
        added.replaced = replacedBy(added.nuclei, existing, maxOverlap)
    added.regions = plan.regions.findAll { PathObject region ->
        !existing.keptIds.contains(region.getID())   // a person changed it
    }
    plan.marks = marksAfter(plan, marks, decided, suggestions)
    return plan
}

/** Replaces nuclei as planned; returns how many were added, left out, removed and kept. */
@CompileStatic
static Map<String, Integer> replaceNuclei(ImageData<?> imageData, Replacement plan) {
    ExistingObjects existing = plan.existing
    NewObjects added = plan.added
    List<String> marksBefore = plan.result.has('removed') ? [] : marksOfImports(imageData)
    if (!plan.lost.isEmpty())
        writeObjects(plan.lostFile, plan.lost)
    Map<String, Integer> carried = [classes: 0, notes: 0]
    plan.successors.each { PathObject nucleus, PathObject successor ->
        Additions additions = existing.annotated[nucleus]
        handOver(nucleus, additions, successor)
        carried.classes = carried.classes + (additions.hasClass ? 1 : 0)
        carried.notes = carried.notes + (additions.isMore() ? 1 : 0)
    }
    handOverToRegions(existing, added)
    for (PathObject nucleus : added.unlocked)
        nucleus.setLocked(false)
    markRois(plan)   // with what successors took over
    exchange(imageData, plan)
    writeMarks(imageData, plan.marks)
    List<String> undoable = marksBefore.takeWhile { String lines ->
        !lines.isEmpty() && lines.readLines().size() <= 10000   // QuPath keeps no more objects, unless told to
    }
    imageData.setProperty('patchcl.imported.before', undoable.take(3).join('\n\n'))
    writeGiven(imageData, plan.given)
    imageData.setProperty('patchcl.run', text(plan.result, 'run'))   // patchcl-qp looks whether it was saved
    measureRegions(imageData, plan)
    countNuclei(imageData, toMarks(plan.marks), plan.result)
    return [found   : plan.nuclei.size(), added: added.nuclei.size(), left_out: added.whyLeftOut.size(),
            removed : existing.unchangedNuclei.size() + existing.annotated.size() - plan.stayed.size(),
            replaced: added.replaced.size(), stayed: plan.stayed.size(), lost: plan.lost.size(),
            kept    : existing.kept.size() + existing.outside.size() + existing.foreign.size() -
                    added.replaced.size(),
            fields  : added.rois.size(), fields_kept: existing.keptRois.size(),
            reshapable: added.reshapable.size()] + carried + added.leftOut
}

/** What to do where nuclei overlap objects of other programs: 'both', 'keep' or 'replace', as the run was asked to. */
@CompileStatic
static String overlapping(JsonObject result) {
    return setting(result, 'overlapping')?.getAsString() ?: 'both'   // results of earlier versions have no such setting
}

/** Whether the run was asked to remove no nucleus with a class, measurements or notes of a person. */
@CompileStatic
static boolean keepsWork(JsonObject result) {
    return setting(result, 'keep')?.getAsBoolean() ?: false
}

@CompileStatic
static JsonElement setting(JsonObject result, String name) {
    return result.getAsJsonObject('config')?.getAsJsonObject('result')?.get(name)
}

/** The numbers of an import as a sentence. The same words are in patchcl_qupath/storage/records.py. */
static String inWords(Map<String, Integer> counts) {
    def listed = { Map<String, String> words ->
        words.findAll { key, text -> counts[key] > 0 }.collect { key, text -> "${counts[key]} ${text}".toString() }
                .join(', ')
    }
    String reasons = listed(left_out_kept: 'in place of objects of yours', left_out_deleted: 'that you deleted',
            left_out_others: 'in place of objects of other programs', left_out_fields: 'in correction ROIs')
    String carried = listed(classes: 'classes', notes: 'nuclei with measurements or notes')
    String alone = listed(stayed: 'kept', lost: 'removed')
    return "${counts.found} nuclei found, ${counts.added} added, ${counts.left_out} left out" +
            (reasons ? ": ${reasons}" : '') +
            (counts.replaced > 0 ? "; ${counts.replaced} objects of other programs replaced" : '') +
            (carried ? "; carried over: ${carried}" : '') +
            (alone ? "; of yours without a new nucleus: ${alone}" : '')
}

/** Sorts the objects of an image by what a person did with them, and by whether the run looked there. */
@CompileStatic
static ExistingObjects sortObjects(Collection<PathObject> all, Marks marks, Given given, List<PathObject> suggestions,
                                   List<PathObject> nuclei, Areas scope) {
    ExistingObjects existing = new ExistingObjects()
    Set<PathObject> foreign = foreignObjects(all, marks, nuclei)
    PathObject[] objects = all.toArray(new PathObject[0])
    boolean[] intact = new boolean[objects.length]
    boolean[] hasItsClass = new boolean[objects.length]
    IntStream.range(0, objects.length).parallel().forEach { int k ->   // digests are what takes long
        String mark = marks.nuclei.get(objects[k].getID())
        hasItsClass[k] = mark != null && hasItsContour(objects[k], mark, String.valueOf(objects[k].getPathClass()))
        intact[k] = hasItsClass[k] || mark != null && given.classes.any { String other ->
            hasItsContour(objects[k], mark, other)
        }
    }
    findLocksOfCommands(existing, objects, intact, marks)
    sortRois(existing, all, marks, suggestions)
    Set<PathObject> rois = new HashSet<>(existing.unchangedRois)
    rois.addAll(existing.keptRois)
    for (int k = 0; k < objects.length; k++) {
        PathObject pathObject = objects[k]
        if (rois.contains(pathObject))
            continue
        if (foreign.contains(pathObject)) {
            existing.foreign << pathObject
            continue
        }
        UUID id = pathObject.getID()
        boolean lockedByHand = pathObject.isLocked() && !existing.lockedByCommand.contains(pathObject)
        if (intact[k] && !lockedByHand && !liesInAny(pathObject, existing.keptRois)) {
            Additions additions = additionsTo(pathObject, !hasItsClass[k], marks, given, foreign)
            existing.intactIds.add(id)
            PathObject parent = pathObject.getParent()
            if (parent != null && !parent.isRootObject() && !marks.contains(parent.getID()))
                existing.parents.add(parent)
            if (scope != null && !isInScope(pathObject, scope))
                existing.outside[pathObject] = additions
            else if (additions != null)
                existing.annotated[pathObject] = additions
            else
                existing.unchangedNuclei.add(pathObject)
        } else if (marks.regions[id]?.startsWith(digest(pathObject))) {
            if (scope == null || isCovered(pathObject, scope))
                existing.unchangedRegions << pathObject
            else
                existing.outsideRegions << pathObject
        } else {
            existing.kept << pathObject
            existing.keptIds << id
            existing.hasConverted |= pathObject.isDetection() && !marks.contains(id)
        }
    }
    return existing
}

/**
 * Finds the imported nuclei that a command of QuPath locked: some measure annotations, or make objects in them, and
 * lock them all. So more than half of the nuclei are locked, or an import carried the lock over from such a nucleus.
 */
@CompileStatic
static void findLocksOfCommands(ExistingObjects existing, PathObject[] objects, boolean[] intact, Marks marks) {
    int nuclei = 0
    for (int k = 0; k < objects.length; k++)
        if (intact[k]) {
            nuclei++
            if (objects[k].isLocked())
                existing.lockedByCommand.add(objects[k])
        }
    if (existing.lockedByCommand.size() < leastOfCommand(nuclei))
        existing.lockedByCommand.removeIf { PathObject nucleus ->
            !marks.nuclei[nucleus.getID()].endsWith(Marks.LOCKED)
        }
}

/** How many of some nuclei have what a command gave them, at least: no person does so one by one. */
@CompileStatic
static int leastOfCommand(int nuclei) {
    return Math.max(20, nuclei.intdiv(2) + 1)
}

/** Whether an imported nucleus, given a class, has the contour and kind that it was given. */
@CompileStatic
static boolean hasItsContour(PathObject nucleus, String mark, String className) {
    return mark.startsWith(pristineDigest(nucleus, className))
}

/**
 * What somebody put on an imported nucleus that no person locked; null without anything. 'hasClass' is whether its
 * class is another one.
 */
@CompileStatic
static Additions additionsTo(PathObject nucleus, boolean hasClass, Marks marks, Given given, Set<PathObject> foreign) {
    boolean hasNote = nucleus.getName() != null || nucleus.getColor() != null ||
            Metadata.of(nucleus).values().any { String value -> value }
    List<String> measurements = given.foreign(nucleus.getMeasurementList().getMeasurementNames())
    boolean hasLock = nucleus.isLocked()
    if (!hasClass && !hasNote && !hasLock && measurements.isEmpty() && !nucleus.hasChildObjects())
        return null
    Additions additions = new Additions(hasClass: hasClass, hasNote: hasNote, hasLock: hasLock,
            measurements: measurements)
    // QuPath's 'Resolve hierarchy' puts detections of other programs within annotations, without a person's doing.
    for (PathObject child : nucleus.getChildObjects())
        if (nucleus.isAnnotation() && foreign.contains(child))
            additions.strays << child
        else if (!marks.contains(child.getID()))
            additions.children << child
    return additions.isWork() || hasLock || additions.strays ? additions : null
}

/** Whether a run looked for a nucleus: its centroid is in a region of the run. */
@CompileStatic
static boolean isInScope(PathObject nucleus, Areas scope) {
    // By its parent, too: in a run of an earlier version pixels decided, and the centroid of a contour on the border
    // may be outside.
    PathObject parent = nucleus.getParent()
    return !scope.holding(centroidOf(nucleus)).isEmpty() ||
            parent != null && scope.objects.any { PathObject region -> region.getID() == parent.getID() }
}

/** Whether a region of an earlier run is one of this run, or lies within those. */
@CompileStatic
static boolean isCovered(PathObject region, Areas scope) {
    if (scope.objects.any { PathObject other -> other.getID() == region.getID() })
        return true
    Geometry rest = region.getROI().getGeometry()
    for (PathObject other : scope.objects)
        if (other.getROI().getGeometry().intersects(rest))
            rest = rest.difference(other.getROI().getGeometry())
    return rest.getArea() < 0.001d * region.getROI().getArea()
}

/**
 * Detections that neither this program made nor a person drew: QuPath's own, StarDist's. A detection at the centroid of
 * an imported nucleus that is gone was made of it, as cells are, and is a person's; so is one with the id of a new
 * nucleus, whose file a person dragged into QuPath.
 */
@CompileStatic
static Set<PathObject> foreignObjects(Collection<PathObject> all, Marks marks, List<PathObject> nuclei) {
    List<PathObject> unknown = []
    for (PathObject pathObject : all)
        if (pathObject.isDetection() && !marks.contains(pathObject.getID()))
            unknown.add(pathObject)
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
    Set<UUID> present = new HashSet<>()
    for (PathObject pathObject : all)
        present.add(pathObject.getID())
    STRtree gone = new STRtree()
    marks.nuclei.each { UUID id, String mark ->
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
    ROI roi = contourOf(pathObject)
    if (roi == null || !roi.isArea())
        return false
    return !gone.query(around(new Coordinate(roi.getCentroidX(), roi.getCentroidY()))).isEmpty()
}

/** What is so near to a centroid as that of what was made of a nucleus: files round coordinates. */
@CompileStatic
static Envelope around(Coordinate place) {
    Envelope near = new Envelope(place)
    near.expandBy(0.05d)
    return near
}

/** Sorts the ROIs to correct: one is unchanged if nobody touched it or the nuclei in it. */
@CompileStatic
static void sortRois(ExistingObjects existing, Collection<PathObject> all, Marks marks, List<PathObject> suggestions) {
    for (PathObject roi : all) {
        String mark = marks.rois.isEmpty() ? null : marks.rois.get(roi.getID())
        if (mark == null && !isCorrectionRoi(roi))
            continue
        boolean unchanged = mark != null && mark.startsWith(digest(roi)) &&
                mark.endsWith(contentDigest(roi, all, existing.lockedByCommand))
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
static Marks decidedByPerson(ExistingObjects existing, Marks marks, Areas scope, boolean removing) {
    Marks decided = new Marks()
    for (Map.Entry<UUID, String> entry : marks.nuclei.entrySet())
        if (!existing.intactIds.contains(entry.key))
            decided.nuclei.put(entry.key, entry.value)
    decided.rois.putAll(marks.rois)
    Map<UUID, String> here = scope == null ? decided.nuclei : decided.nuclei.findAll { UUID id, String mark ->
        Coordinate place = centroid(mark)
        !scope.holding(place).isEmpty()
    }
    boolean allDeleted = existing.unchangedNuclei.isEmpty() && existing.annotated.isEmpty() &&
            !existing.hasConverted && Collections.disjoint(here.keySet(), existing.keptIds)
    if (removing || allDeleted)
        decided.nuclei.keySet().removeAll(here.keySet().toList())
    if (removing || allDeleted && existing.keptRois.isEmpty() && existing.outside.isEmpty())
        decided.rois.clear()
    return decided
}

/**
 * Marks of the detections that stay when nuclei are removed, and of the nuclei that some were made of: without them,
 * the next import would take these detections for those of another program, and add nuclei upon them.
 */
@CompileStatic
static Map<UUID, String> marksOfDetections(ExistingObjects existing, Marks marks) {
    List<PathObject> detections = existing.kept.findAll { PathObject other -> other.isDetection() }
    Set<UUID> ids = detections.collect { PathObject detection -> detection.getID() }.toSet()
    STRtree places = new STRtree()
    for (PathObject detection : detections) {
        ROI roi = contourOf(detection)
        if (roi?.isArea())
            places.insert(new Envelope(new Coordinate(roi.getCentroidX(), roi.getCentroidY())), roi)
    }
    return marks.nuclei.findAll { UUID id, String mark ->
        ids.contains(id) || !existing.intactIds.contains(id) && !existing.keptIds.contains(id) &&
                !places.isEmpty() && !places.query(around(centroid(mark))).isEmpty()
    }
}

/** The suggested ROIs to add: one that has a mark is in the image, or a person deleted it. */
@CompileStatic
static List<PathObject> newRois(List<PathObject> suggestions, ExistingObjects existing, Marks decided) {
    return suggestions.findAll { PathObject roi ->
        !decided.rois.containsKey(roi.getID()) &&
                !existing.keptRois.any { PathObject other -> intersect(roi.getROI(), other.getROI()) }
    }
}

/** Sorts new nuclei into those to add, and those that are left out and why. */
@CompileStatic
static void chooseNuclei(NewObjects added, List<PathObject> nuclei, ExistingObjects existing, Marks decided,
                         String overlapping, double maxOverlap) {
    STRtree kept = contours(existing.kept)
    STRtree foreign = contours(overlapping == 'keep' ? existing.foreign : [] as List<PathObject>)
    STRtree changedPlaces = new STRtree()
    STRtree deletedPlaces = new STRtree()
    decided.nuclei.each { UUID id, String mark ->
        Coordinate place = centroid(mark)
        (existing.keptIds.contains(id) ? changedPlaces : deletedPlaces).insert(new Envelope(place), place)
    }
    for (PathObject nucleus : nuclei) {
        UUID id = nucleus.getID()
        ROI roi = contourOf(nucleus)
        if (liesInAny(nucleus, existing.keptRois))
            added.leaveOut(nucleus, 'left_out_fields')
        else if (existing.keptIds.contains(id) || coversAny(roi, changedPlaces) || overlapsAny(roi, kept, maxOverlap))
            added.leaveOut(nucleus, 'left_out_kept')
        else if (decided.nuclei.containsKey(id) || coversAny(roi, deletedPlaces))
            added.leaveOut(nucleus, 'left_out_deleted')
        else if (overlapsAny(roi, foreign, maxOverlap))
            added.leaveOut(nucleus, 'left_out_others')
        else
            added.nuclei.add(nucleus)
    }
}

/** Nuclei outside of the run's regions are replaced where a new nucleus is in their place: they lie on the border. */
@CompileStatic
static void takeFromOutside(ExistingObjects existing, NewObjects added, Areas scope, double maxOverlap) {
    if (existing.outside.isEmpty())
        return
    STRtree near = new STRtree()
    for (PathObject nucleus : existing.outside.keySet())
        if (scope.meeting(contourOf(nucleus)) != null)
            near.insert(envelope(contourOf(nucleus)), nucleus)
    for (PathObject nucleus : added.nuclei)
        for (Object other : near.query(envelope(contourOf(nucleus)))) {
            PathObject old = (PathObject) other
            Coordinate place = centroidOf(old)
            boolean inPlace = contourOf(nucleus).contains(place.x, place.y) ||
                    overlap(contourOf(nucleus), contourOf(old), maxOverlap) > maxOverlap
            if (!inPlace || !existing.outside.containsKey(old))
                continue
            Additions additions = existing.outside.remove(old)
            if (additions == null)
                existing.unchangedNuclei << old
            else
                existing.annotated[old] = additions
        }
}

/**
 * Finds the new nuclei that take over what somebody put on earlier ones: the same nucleus, or the one with the largest
 * IoU above maxOverlap. Without a successor, a nucleus stays if that was put on it by hand, or with 'keep'.
 */
@CompileStatic
static void findSuccessors(Replacement plan, double maxOverlap, boolean keep) {
    Map<PathObject, Additions> annotated = plan.existing.annotated
    if (annotated.isEmpty())
        return
    Map<PathObject, PathObject> predecessors = [:]   // by successor
    match(annotated.keySet(), plan.added.nuclei, maxOverlap).each { PathObject old, PathObject successor ->
        predecessors[successor] = old
    }
    Closure<Boolean> isByHand = byHand(plan.existing)
    boolean removing = plan.result.has('removed')   // for that, a command's lock is nobody's work
    Closure<Boolean> isMissed = { PathObject old ->
        annotated[old].isWork() || annotated[old].hasLock && !removing
    }
    Set<PathObject> matched = ExistingObjects.identitySet()   // a difference of lists compares each with each
    matched.addAll(predecessors.values())
    List<PathObject> alone = annotated.keySet().toList().findAll { PathObject old -> !matched.contains(old) }
    while (!alone.isEmpty()) {
        List<PathObject> stay = alone.findAll { PathObject old ->
            isMissed(old) && (keep || isByHand(annotated[old]))
        }
        plan.stayed.addAll(stay)
        plan.lost.addAll(alone.findAll { PathObject old ->
            isMissed(old) && !keep && !isByHand(annotated[old])
        })
        alone = leaveOutInPlaceOf(stay, plan.added, predecessors, maxOverlap)
    }
    predecessors.each { PathObject successor, PathObject old -> plan.successors[old] = successor }
    plan.existing.kept.addAll(plan.stayed)
    for (PathObject old : plan.stayed)
        plan.existing.keptIds << old.getID()
}

/** Leaves out new nuclei in the place of those that stay; returns the nuclei that lose their successor by that. */
@CompileStatic
static List<PathObject> leaveOutInPlaceOf(List<PathObject> stay, NewObjects added,
                                          Map<PathObject, PathObject> predecessors, double maxOverlap) {
    List<PathObject> alone = []
    if (stay.isEmpty())
        return alone
    STRtree kept = contours(stay)
    STRtree places = new STRtree()
    for (PathObject nucleus : stay) {
        Coordinate place = centroidOf(nucleus)
        places.insert(new Envelope(place), place)
    }
    added.nuclei = added.nuclei.findAll { PathObject nucleus ->
        ROI roi = contourOf(nucleus)
        boolean free = !coversAny(roi, places) && !overlapsAny(roi, kept, maxOverlap)
        if (!free) {
            added.leaveOut(nucleus, 'left_out_kept')
            PathObject old = predecessors.remove(nucleus)
            if (old != null)
                alone << old
        }
        return free
    }
    return alone
}

/**
 * Whether additions were made by hand. A class or a measurement that more than half of the nuclei have, and at least
 * twenty, was given by a command or a classifier of QuPath.
 */
@CompileStatic
static Closure<Boolean> byHand(ExistingObjects existing) {
    int many = leastOfCommand(existing.getIntact())
    int classes = 0
    Map<String, Integer> measured = [:]
    for (Collection<Additions> all : [existing.annotated.values(), existing.outside.values()])
        for (Additions additions : all)
            if (additions != null) {
                classes += additions.hasClass ? 1 : 0
                for (String name : additions.measurements)
                    measured.merge(name, 1) { Integer one, Integer other -> one + other }
            }
    return { Additions additions ->
        additions.hasNote || additions.children || additions.hasClass && classes < many ||
                additions.measurements.any { String name -> measured[name] < many }
    }
}

/** The new nucleus that each earlier one has become, one for one: of equal id, or of the largest IoU. */
@CompileStatic
static Map<PathObject, PathObject> match(Collection<PathObject> earlier, List<PathObject> nuclei, double maxOverlap) {
    Map<UUID, PathObject> byId = [:]
    for (PathObject old : earlier)
        byId[old.getID()] = old
    Map<PathObject, PathObject> successors = [:]
    List<PathObject> others = []
    for (PathObject nucleus : nuclei) {
        PathObject same = byId[nucleus.getID()]
        if (same != null)
            successors[same] = nucleus
        else
            others << nucleus
    }
    STRtree tree = new STRtree()
    for (PathObject old : earlier)
        if (!successors.containsKey(old))
            tree.insert(envelope(contourOf(old)), old)
    if (tree.isEmpty())
        return successors
    List<Tuple3<Double, PathObject, PathObject>> pairs = []
    for (PathObject nucleus : others)
        for (Object old : tree.query(envelope(contourOf(nucleus)))) {
            double iou = overlap(contourOf(nucleus), contourOf((PathObject) old), maxOverlap)
            if (iou > maxOverlap)
                pairs << new Tuple3<Double, PathObject, PathObject>(iou, (PathObject) old, nucleus)
        }
    Set<PathObject> taken = ExistingObjects.identitySet()
    pairs.sort { Tuple3<Double, PathObject, PathObject> pair -> -pair.v1 }
    for (Tuple3<Double, PathObject, PathObject> pair : pairs)
        if (!successors.containsKey(pair.v2) && taken.add(pair.v3))
            successors[pair.v2] = pair.v3
    return successors
}

/** Makes annotations of new nuclei in suggested ROIs, to be reshaped, and of successors that a detection cannot be. */
@CompileStatic
static void convertToAnnotations(Replacement plan) {
    Map<PathObject, PathObject> predecessors = new IdentityHashMap<>()
    plan.successors.each { PathObject old, PathObject successor -> predecessors[successor] = old }
    NewObjects added = plan.added
    if (added.rois.isEmpty() && predecessors.isEmpty())
        return
    added.nuclei = added.nuclei.collect { PathObject nucleus ->
        PathObject old = predecessors[nucleus]
        Additions additions = old == null ? null : plan.existing.annotated[old]
        boolean toCorrect = liesInAny(nucleus, added.rois)
        // QuPath shows neither the description nor the children of a detection.
        boolean convert = toCorrect ||
                old != null && old.isAnnotation() && (additions.hasNote || additions.children)
        PathObject made = convert ? toAnnotation(nucleus) : nucleus
        if (old != null) {
            plan.successors[old] = made
            additions.hasLock &= !toCorrect
        }
        return made
    }
}

/** Gives a new nucleus what somebody put on an earlier one. */
@CompileStatic
static void handOver(PathObject old, Additions additions, PathObject successor) {
    if (additions.hasClass)
        classifyAs(old, successor)
    if (additions.hasNote) {
        successor.setName(old.getName())
        if (old.getColor() != null)
            successor.setColor(old.getColor())
        Metadata.put(successor, Metadata.of(old))
    }
    if (additions.hasLock)
        successor.setLocked(true)
    if (additions.measurements) {
        MeasurementList measured = successor.getMeasurementList()
        for (String name : additions.measurements)
            measured.put(name, old.getMeasurementList().get(name))
        measured.close()
    }
    successor.addChildObjects(additions.children + (successor.isAnnotation() ? additions.strays : []))
}

/** Gives an object the class of another one, with the probability that a classifier found. */
@CompileStatic
static void classifyAs(PathObject other, PathObject pathObject) {
    double probability = other.getClassProbability()
    if (Double.isNaN(probability))
        pathObject.setPathClass(other.getPathClass())
    else
        pathObject.setPathClass(other.getPathClass(), probability)
}

/** Gives the regions that are there again what somebody, or a pixel classifier, put on the earlier ones. */
@CompileStatic
static void handOverToRegions(ExistingObjects existing, NewObjects added) {
    Map<UUID, PathObject> earlier = [:]
    for (PathObject region : existing.unchangedRegions)
        earlier[region.getID()] = region
    for (PathObject region : added.regions) {
        PathObject old = earlier[region.getID()]
        if (old == null)
            continue
        for (String name : old.getMeasurementList().getMeasurementNames())
            if (!name.startsWith('PatchCL: '))
                region.getMeasurementList().put(name, old.getMeasurementList().get(name))
        Set<String> ofRun = Metadata.of(region).keySet()   // the description
        Metadata.put(region, Metadata.of(old).findAll { String key, String value -> !ofRun.contains(key) })
    }
}

/** The objects of other programs in the place of new nuclei, but for those that show the work of a person. */
@CompileStatic
static List<PathObject> replacedBy(List<PathObject> nuclei, ExistingObjects existing, double maxOverlap) {
    STRtree places = contours(nuclei)
    return existing.foreign.findAll { PathObject other ->
        ROI roi = contourOf(other)
        !other.isLocked() && other.getName() == null && !other.hasChildObjects() && roi?.isArea() &&
                overlapsAny(roi, places, maxOverlap) &&
                !liesInAny(other, existing.keptRois)
    }
}

/** The contours of objects, those of the nuclei of cells, to be found by place. */
@CompileStatic
static STRtree contours(Collection<PathObject> objects) {
    STRtree tree = new STRtree()
    for (PathObject pathObject : objects) {
        ROI roi = contourOf(pathObject)
        if (roi?.isArea())
            tree.insert(envelope(roi), roi)
    }
    return tree
}

/** The marks to keep with the image after an import. */
@CompileStatic
static Map<UUID, String> marksAfter(Replacement plan, Marks marks, Marks decided, List<PathObject> suggestions) {
    ExistingObjects existing = plan.existing
    NewObjects added = plan.added
    Map<UUID, String> after = new LinkedHashMap<>(decided.nuclei)
    existing.outside.each { PathObject nucleus, Additions additions ->
        after.put(nucleus.getID(), withLock(marks.nuclei.get(nucleus.getID()), additions?.hasLock))
    }
    added.reshapable.each { PathObject detection, PathObject annotation ->
        String mark = after.get(detection.getID())
        if (mark != null)
            after.put(detection.getID(), markOfAnnotation(mark, detection, annotation, plan.given))
    }
    PathObject[] nuclei = added.nuclei.toArray(new PathObject[0])
    String[] digests = new String[nuclei.length]   // as a run made them, without what they take over
    IntStream.range(0, nuclei.length).parallel().forEach { int k -> digests[k] = digestAndCentroid(nuclei[k]) }
    Set<PathObject> agreed = nucleiOfClassesByPerson(plan)
    for (int k = 0; k < nuclei.length; k++)
        if (agreed.contains(nuclei[k]))
            digests[k] = pristineDigest(nuclei[k], Given.BY_PERSON) + digests[k].substring(digests[k].indexOf(' '))
    Set<PathObject> locked = lockedSuccessors(plan)
    for (int k = 0; k < nuclei.length; k++)
        after.put(nuclei[k].getID(), withLock(digests[k], locked.contains(nuclei[k])))
    for (PathObject roi : existing.keptRois + suggestions)
        if (decided.rois.containsKey(roi.getID()))
            after.put(roi.getID(), decided.rois.get(roi.getID()))
    boolean removing = plan.result.has('removed')   // what stays is a person's from then on
    for (PathObject region : existing.kept + existing.outsideRegions) {
        String mark = marks.regions.get(region.getID())
        if (mark != null && !removing)
            after.put(region.getID(), mark)
    }
    for (PathObject region : added.regions)
        after[region.getID()] = digestAndCentroid(region) + ' region'
    return after
}

/**
 * The mark of a nucleus that was a detection and becomes an annotation: it tells both apart, so that the annotation
 * would count as changed by a person. That of a nucleus that a person changed stays.
 */
@CompileStatic
static String markOfAnnotation(String mark, PathObject detection, PathObject annotation, Given given) {
    String className = ([String.valueOf(detection.getPathClass())] + given.classes).find { String name ->
        hasItsContour(detection, mark, name)
    }
    return className == null ? mark : pristineDigest(annotation, className) + mark.substring(mark.indexOf(' '))
}

/** The mark of a nucleus, with a note of whether it has the lock of a command: it may soon be one of few. */
@CompileStatic
static String withLock(String mark, boolean hasLock) {
    String plain = mark - Marks.LOCKED
    return hasLock ? plain + Marks.LOCKED : plain
}

/** The new nuclei that take over the lock of a command. */
@CompileStatic
static Set<PathObject> lockedSuccessors(Replacement plan) {
    Set<PathObject> locked = ExistingObjects.identitySet()
    plan.successors.each { PathObject old, PathObject successor ->
        if (plan.existing.annotated[old].hasLock)
            locked.add(successor)
    }
    return locked
}

/** The new nuclei that a run gave the very class that a person had given the nucleus before. */
@CompileStatic
static Set<PathObject> nucleiOfClassesByPerson(Replacement plan) {
    Set<PathObject> agreed = ExistingObjects.identitySet()
    plan.successors.each { PathObject old, PathObject successor ->
        if (plan.existing.annotated[old].hasClass && old.getPathClass() == successor.getPathClass())
            agreed.add(successor)
    }
    return agreed
}

/** Adds the marks of new ROIs: of what is in them when the import is done. */
@CompileStatic
static void markRois(Replacement plan) {
    ExistingObjects existing = plan.existing
    NewObjects added = plan.added
    if (added.rois.isEmpty())
        return
    Set<PathObject> replaced = new HashSet<>(added.replaced)
    List<PathObject> present = existing.kept + added.nuclei + existing.outside.keySet()
    present.addAll(existing.foreign.findAll { PathObject other -> !replaced.contains(other) })
    present.replaceAll { PathObject other -> added.reshapable[other] ?: other }
    for (PathObject roi : added.rois)
        plan.marks[roi.getID()] = digestAndCentroid(roi) + ' field ' +
                contentDigest(roi, present, existing.lockedByCommand)
}

/** Removes the replaced objects from the image, and adds the new ones. */
@CompileStatic
static void exchange(ImageData<?> imageData, Replacement plan) {
    PathObjectHierarchy hierarchy = imageData.getHierarchy()
    ExistingObjects existing = plan.existing
    NewObjects added = plan.added
    remove(hierarchy, existing.unchangedRois)   // first: one may lie within a region, and hold others
    remove(hierarchy, added.replaced)
    List<PathObject> held = existing.kept.findAll { PathObject other ->   // regions of ours that a person changed
        plan.regions.any { PathObject region -> region.getID() == other.getID() }
    }
    Areas parents = new Areas(parentsFor(hierarchy, plan))
    Map<PathObject, PathObject> places = coresOfRegions(imageData, plan) + parentsOfRegions(existing, added)

    Set<PathObject> gone = ExistingObjects.identitySet()
    gone.addAll(existing.unchangedNuclei)
    gone.addAll(existing.unchangedRegions)
    gone.addAll(existing.annotated.keySet())
    gone.removeAll(plan.stayed)
    List<PathObject> homeless = []   // what a person drew within those, say
    List<PathObject> tops = []   // with which the others go
    for (PathObject old : gone) {
        if (old.hasChildObjects())
            for (PathObject child : old.getChildObjects())
                if (!gone.contains(child))
                    homeless << child
        if (!gone.contains(old.getParent()))
            tops << old
    }
    hierarchy.getSelectionModel().deselectObjects(gone)
    hierarchy.removeObjects(tops, false)

    // Filled before they are in the hierarchy: there, QuPath takes long over many annotations.
    Areas regions = new Areas(added.regions + held)
    int width = imageData.getServer().getWidth()
    int height = imageData.getServer().getHeight()
    List<PathObject> elsewhere = assign(added.nuclei, regions, parents, width, height)
    Areas all = new Areas(added.regions + held + existing.outsideRegions)
    elsewhere.addAll(assign(homeless, all, new Areas([]), width, height))
    hierarchy.addObjects(elsewhere)
    places.each { PathObject region, PathObject parent -> parent.addChildObject(region) }
    hierarchy.addObjects(added.regions.findAll { PathObject region -> !places.containsKey(region) })
    hierarchy.addObjects(added.rois)
    exchangeOneByOne(hierarchy, added.reshapable)
    hierarchy.fireHierarchyChangedEvent(hierarchy.getRootObject())   // of what was added within others
}

/** Puts each object in the place of another, below its parent and with its children. */
@CompileStatic
static void exchangeOneByOne(PathObjectHierarchy hierarchy, Map<PathObject, PathObject> successors) {
    hierarchy.getSelectionModel().deselectObjects(successors.keySet())
    successors.each { PathObject old, PathObject successor ->
        PathObject parent = old.getParent()
        successor.addChildObjects(new ArrayList<PathObject>(old.getChildObjects()))
        parent.removeChildObject(old)
        parent.addChildObject(successor)
    }
}

/**
 * The annotations and TMA cores for new nuclei to be nested in: those in which nuclei were, and others of their
 * classes. There are none where nobody resolved the hierarchy.
 */
@CompileStatic
static List<PathObject> parentsFor(PathObjectHierarchy hierarchy, Replacement plan) {
    Set<PathObject> parents = plan.existing.parents.findAll { PathObject parent ->
        parent.isTMACore() || parent.isAnnotation() && !isCorrectionRoi(parent)
    }.toSet()
    if (parents.isEmpty())
        return []
    Set<PathClass> classes = parents.findAll { PathObject parent -> parent.isAnnotation() }
            .collect { PathObject parent -> parent.getPathClass() }.findAll { PathClass one -> one != null }.toSet()
    boolean cores = parents.any { PathObject parent -> parent.isTMACore() }
    return hierarchy.getAllObjects(false).findAll { PathObject other ->
        other.getROI()?.isArea() && (parents.contains(other) || cores && other.isTMACore() ||
                other.isAnnotation() && classes.contains(other.getPathClass()) &&
                !plan.marks.containsKey(other.getID()))
    }.toList()
}

/** The parents of the regions that are there again, where these are nested in other objects. */
@CompileStatic
static Map<PathObject, PathObject> parentsOfRegions(ExistingObjects existing, NewObjects added) {
    Map<UUID, PathObject> parents = [:]
    for (PathObject region : existing.unchangedRegions) {
        PathObject parent = region.getParent()
        if (parent != null && !parent.isRootObject() && !existing.unchangedRegions.contains(parent))
            parents[region.getID()] = parent
    }
    return added.regions.findAll { PathObject region -> parents.containsKey(region.getID()) }
            .collectEntries { PathObject region -> [region, parents[region.getID()]] }
}

/** The TMA cores in which the regions of a run within cores lie; empty for other runs. */
@CompileStatic
static Map<PathObject, PathObject> coresOfRegions(ImageData<?> imageData, Replacement plan) {
    Map<PathObject, PathObject> places = [:]
    List<PathObject> cores = countedCores(imageData, plan.result)
    if (cores.isEmpty())
        return places
    Areas areas = new Areas(cores)
    for (PathObject region : plan.added.regions)
        for (PathObject core : areas.holding(centroidOf(region)))
            places[region] = core
    return places
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
    return pathObject.isAnnotation() && pathObject.getPathClass()?.toString()?.startsWith('PatchCL: ') &&
            roiClasses().contains(pathObject.getPathClass()) && pathObject.getROI()?.isArea()
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

/** QuPath's dialogs: of 0.5 and later, or of 0.4. */
static Class<?> dialogs() {
    return ['qupath.fx.dialogs.Dialogs', 'qupath.lib.gui.dialogs.Dialogs'].findResult { name ->
        try {
            QuPathGUI.class.getClassLoader().loadClass(name)
        } catch (ClassNotFoundException ignored) {
            null
        }
    }
}

/** Asks what to do with nuclei that carry work of a person: 'keep', 'remove', or null, to change nothing. */
static String askToKeep(String warning) {
    Map<String, String> choices = ['Keep them': 'keep', 'Remove them; a copy is kept in a file': 'remove']
    List<String> names = choices.keySet() as List
    return choices[dialogs().showChoiceDialog('PatchCL', warning, names, names.first())]
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

/** The contour of an object, or of the nucleus of a cell; that of the cell if it has none. */
@CompileStatic
static ROI contourOf(PathObject nucleus) {
    return PathObjectTools.getROI(nucleus, true)
}

/** The same nucleus as an annotation, that of a cell, too: a person cannot reshape a detection in QuPath. */
@CompileStatic
static PathObject toAnnotation(PathObject nucleus) {
    if (nucleus.isAnnotation())
        return nucleus
    PathObject annotation = PathObjects.createAnnotationObject(
            contourOf(nucleus), nucleus.getPathClass(), nucleus.getMeasurementList())
    annotation.setID(nucleus.getID())
    return annotation
}

/**
 * Makes annotations of the detections of a person in ROIs to correct: new ones, and those that a person drew. Objects
 * of other programs stay, except where these are the nuclei.
 */
@CompileStatic
static void makeReshapable(Replacement plan, Marks marks) {
    ExistingObjects existing = plan.existing
    PathClass toCorrect = roiClasses().first()
    List<PathObject> rois = plan.added.rois + existing.keptRois.findAll { PathObject roi ->
        roi.getPathClass() == toCorrect && !marks.rois.containsKey(roi.getID())
    }
    if (rois.isEmpty())
        return
    plan.added.unlocked = existing.lockedByCommand.findAll { PathObject nucleus -> liesInAny(nucleus, rois) }
    List<PathObject> detections = existing.kept + existing.outside.keySet() + plan.stayed
    if (overlapping(plan.result) == 'keep')
        detections.addAll(existing.foreign)
    for (PathObject pathObject : detections)
        if (isOutlined(pathObject) && liesInAny(pathObject, rois))
            plan.added.reshapable[pathObject] = withAllOf(pathObject, plan.added.unlocked)
}

/** Whether an object is a detection of a nucleus, or a cell that has one. */
@CompileStatic
static boolean isOutlined(PathObject pathObject) {
    return pathObject.isDetection() && !pathObject.isTile() &&
            (!(pathObject instanceof PathCellObject) || ((PathCellObject) pathObject).getNucleusROI() != null)
}

/** A detection as an annotation, with all that a person put on it; a cell as its nucleus. Some are 'unlocked'. */
@CompileStatic
static PathObject withAllOf(PathObject detection, Set<PathObject> unlocked) {
    PathObject annotation = PathObjects.createAnnotationObject(
            contourOf(detection), detection.getPathClass(), detection.getMeasurementList())
    classifyAs(detection, annotation)
    annotation.setID(detection.getID())
    annotation.setName(detection.getName())
    if (detection.getColor() != null)
        annotation.setColor(detection.getColor())
    annotation.setLocked(detection.isLocked() && !unlocked.contains(detection))
    Metadata.put(annotation, Metadata.of(detection))
    return annotation
}

/** Whether an object lies in one of the ROIs, in part or whole. */
@CompileStatic
static boolean liesInAny(PathObject pathObject, List<PathObject> correctionRois) {
    for (PathObject roi : correctionRois)
        if (liesIn(pathObject, roi))
            return true
    return false
}

/** Whether an object lies in an ROI, in part or whole. An object that is not much smaller is no nucleus. */
@CompileStatic
static boolean liesIn(PathObject pathObject, PathObject correctionRoi) {
    ROI contour = contourOf(pathObject)
    ROI roi = correctionRoi.getROI()
    return contour?.isArea() && intersect(contour, roi) && contour.getArea() < roi.getArea() / 2
}

/** Whether two contours overlap or touch; most pairs are excluded cheaply, by their bounding boxes. */
@CompileStatic
static boolean intersect(ROI one, ROI other) {
    return envelope(one).intersects(envelope(other)) && one.getGeometry().intersects(other.getGeometry())
}

/** A digest of what a person can change of the objects in an ROI; the lock of some is a command's. */
@CompileStatic
static String contentDigest(PathObject roi, Collection<PathObject> objects, Set<PathObject> lockedByCommand) {
    List<String> within = []
    for (PathObject pathObject : objects)
        if (liesIn(pathObject, roi)) {
            boolean locked = pathObject.isLocked() && !lockedByCommand.contains(pathObject)
            within << pathObject.getID().toString() + digest(pathObject, locked)
        }
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

/**
 * Adds objects to the smallest area that holds them, as QuPath does: of regions, by the centroid; of a person's
 * annotations, annotations as a whole. Returns the objects outside all.
 */
@CompileStatic
static List<PathObject> assign(List<PathObject> objects, Areas regions, Areas parents, int width, int height) {
    Map<PathObject, List<PathObject>> members = [:]
    List<PathObject> elsewhere = []
    if (parents.isEmpty() && regions.isWhole(width, height)) {   // most imports
        regions.objects.first().addChildObjects(objects)
        return elsewhere
    }
    for (PathObject pathObject : objects) {
        PathObject smallest = null
        if (!parents.isEmpty())
            for (PathObject parent : parents.holding(centroidOf(pathObject)))
                if (parent.getROI().getArea() > 2 * contourOf(pathObject).getArea() &&
                        (!pathObject.isAnnotation() || parents.covers(parent, pathObject.getROI())))
                    smallest = smaller(smallest, parent)
        for (PathObject region : regionsOf(pathObject, regions))
            smallest = smaller(smallest, region)
        if (smallest == null)
            elsewhere.add(pathObject)
        else
            members.computeIfAbsent(smallest) { [] as List<PathObject> }.add(pathObject)
    }
    members.each { PathObject region, List<PathObject> within -> region.addChildObjects(within) }
    return elsewhere
}

@CompileStatic
static PathObject smaller(PathObject one, PathObject other) {
    return one == null || other.getROI().getArea() < one.getROI().getArea() ? other : one
}

/**
 * The regions that hold the centroid of an object. In a run of an earlier version pixels decided: the contour of a
 * nucleus on the border can have its centroid outside of all regions, and then belongs to one that it meets.
 */
@CompileStatic
static List<PathObject> regionsOf(PathObject pathObject, Areas regions) {
    List<PathObject> around = regions.holding(centroidOf(pathObject))
    if (!around.isEmpty())
        return around
    PathObject near = regions.meeting(contourOf(pathObject))
    return near == null ? around : [near]
}

/**
 * Measures the regions of a run, also those that a person unlocked or renamed: how many nuclei were found, added and
 * left out, for each reason.
 */
@CompileStatic
static void measureRegions(ImageData<?> imageData, Replacement plan) {
    Map<UUID, PathObject> fresh = [:]
    for (PathObject region : plan.regions)
        fresh[region.getID()] = region
    Collection<PathObject> shown = imageData.getHierarchy().getAnnotationObjects().findAll { PathObject annotation ->
        fresh.containsKey(annotation.getID())
    }
    Map<PathObject, Map<String, Integer>> counts = [:]
    for (PathObject region : shown) {
        refreshTissue(region, fresh[region.getID()])
        counts[region] = [found: 0, added: 0] + NewObjects.noneLeftOut()
    }
    Areas areas = new Areas(shown)
    if (areas.isWhole(imageData.getServer().getWidth(), imageData.getServer().getHeight()))
        counts[shown.first()] = [found: plan.nuclei.size(), added: plan.added.nuclei.size()] + plan.added.leftOut
    else for (PathObject nucleus : plan.nuclei)
        for (PathObject region : regionsOf(nucleus, areas)) {
            Map<String, Integer> count = counts[region]
            String what = plan.added.whyLeftOut[nucleus] ?: 'added'
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
 * Counts the nuclei in the 'PatchCL' regions of an image anew, and in the annotations and cores that the run
 * summarised, as they are now: after nuclei were drawn, deleted, classified, moved to other parents or made into
 * cells. 'result' is the content of result.json, null without any. Returns what was measured of each region.
 * groovy/summarise.groovy and patchcl-qp call this.
 */
static List<Map<String, Object>> summarise(ImageData<?> imageData, ProjectImageEntry<?> entry, JsonObject result) {
    Marks marks = readMarks(imageData)
    if (result != null && !result.has('removed')) {
        Map<UUID, PathObject> fresh = newRegions(imageData, entry, result).collectEntries { [it.getID(), it] }
        for (region in shownRegions(imageData, marks).findAll { fresh.containsKey(it.getID()) })
            refreshTissue(region, fresh[region.getID()])
    }
    List<PathObject> counted = countNuclei(imageData, marks, result).findAll { region ->
        !region.getParent().isTMACore() || !marks.regions.containsKey(region.getID())   // the core has the same nuclei
    }
    return counted.collect { region ->
        def measured = region.getMeasurementList()
        boolean hasTissue = !Double.isNaN(measured.get('PatchCL: Tissue mm^2'))
        [name: region.getName() ?: region.getDisplayedName(), x: region.getROI().getCentroidX(),
         y: region.getROI().getCentroidY(), nuclei: measured.get('PatchCL: Nuclei') as int, is_tissue: hasTissue,
         area_mm2: measured.get(hasTissue ? 'PatchCL: Tissue mm^2' : 'PatchCL: Area mm^2'),
         per_mm2: measured.get('PatchCL: Nuclei per mm^2'),
         positive_percent: measured.get('PatchCL: Positive %'), h_score: measured.get('PatchCL: H-score')]
    }
}

/** The annotations of earlier imports that hold nuclei, also those that a person unlocked, renamed or reshaped. */
@CompileStatic
static List<PathObject> shownRegions(ImageData<?> imageData, Marks marks) {
    return imageData.getHierarchy().getAnnotationObjects().toList().findAll { PathObject annotation ->
        marks.regions.containsKey(annotation.getID())
    }
}

/**
 * The annotations of a person to count nuclei in: those of the classes that the last run was asked to summarise, but
 * for the regions of imports.
 */
@CompileStatic
static List<PathObject> countedAnnotations(ImageData<?> imageData, Marks marks, JsonObject result) {
    JsonElement names = result == null ? null : setting(result, 'summarise')
    return drawnOf(names, imageData).findAll { PathObject annotation -> !marks.contains(annotation.getID()) }
}

/** The annotations of some classes, by their names. */
@CompileStatic
static List<PathObject> drawnOf(JsonElement names, ImageData<?> imageData) {
    Set<String> classes = new HashSet<>()
    for (JsonElement name : names == null ? new JsonArray() : names.getAsJsonArray())
        classes.add(composed(PathClass.fromString(name.getAsString())))
    if (classes.isEmpty())
        return []
    return imageData.getHierarchy().getAnnotationObjects().toList().findAll { PathObject annotation ->
        classes.contains(composed(annotation.getPathClass())) && annotation.getROI()?.isArea()
    }
}

/** The name of a class, however a person wrote it: macOS has letters with accents in two parts. */
@CompileStatic
static String composed(PathClass name) {
    return Normalizer.normalize(String.valueOf(name), Normalizer.Form.NFC)
}

/** The annotations that were selected for a run within these: those in the place of its regions, of any class. */
@CompileStatic
static List<PathObject> selectedFor(JsonObject result, ImageData<?> imageData) {
    boolean withinSelected = result?.has('within') && result.has('regions') &&
            result.getAsJsonArray('within').any { JsonElement name -> name.getAsString() == '(selected)' }
    if (!withinSelected)
        return []
    List<ROI> regions = regionsOfRun(result)
    return imageData.getHierarchy().getAnnotationObjects().toList().findAll { PathObject annotation ->
        ROI roi = annotation.getROI()
        roi?.isArea() && regions.any { ROI region ->
            isInPlace(roi, region.getCentroidX(), region.getCentroidY(), region.getArea())
        }
    }
}

/** The regions of a run that was limited to some. */
@CompileStatic
static List<ROI> regionsOfRun(JsonObject result) {
    return result.getAsJsonArray('regions').collect { JsonElement region ->
        (ROI) GsonTools.getInstance().fromJson(region.getAsJsonObject().get('geometry'), ROI)
    }
}

/** Whether a contour has a centroid and an area, but for what becomes of it in files: ellipses become polygons. */
@CompileStatic
static boolean isInPlace(ROI roi, double x, double y, double area) {
    return Math.abs(x - roi.getCentroidX()) < 1 && Math.abs(y - roi.getCentroidY()) < 1 &&
            Math.abs(area / roi.getArea() - 1) < 0.01d
}

/** The cores of the TMA grid that are not missing, where the last run was within these; else none. */
@CompileStatic
static List<PathObject> countedCores(ImageData<?> imageData, JsonObject result) {
    TMAGrid grid = imageData.getHierarchy().getTMAGrid()
    if (grid == null || !result?.has('within') ||
            !result.getAsJsonArray('within').any { JsonElement name -> name.getAsString() == '(TMA core)' })
        return []
    return grid.getTMACoreList().findAll { TMACoreObject core -> !core.isMissing() }
            .collect { TMACoreObject core -> (PathObject) core }
}

/**
 * Measures number and density of the nuclei in the regions, by position, and percentages and scores where they have
 * classes of positive and negative ones; likewise of annotations and cores that the run summarised. Returns all these.
 */
@CompileStatic
static List<PathObject> countNuclei(ImageData<?> imageData, Marks marks, JsonObject result) {
    List<PathObject> regions = shownRegions(imageData, marks)
    List<PathObject> cores = countedCores(imageData, result)
    List<PathObject> annotations = countedAnnotations(imageData, marks, result)
    if (result != null)
        forgetCounts(imageData, regions + cores + annotations)
    if (regions.isEmpty() && cores.isEmpty() && annotations.isEmpty())
        return regions
    Map<PathObject, Tally> tallies = [:]
    for (PathObject counted : regions + cores + annotations)
        tallies[counted] = new Tally()
    boolean withForeign = result != null && overlapping(result) == 'keep'
    // Regions of the run, however small, are no nuclei.
    Set<PathObject> asked = (annotations + drawnOf(result?.get('within'), imageData) +
            selectedFor(result, imageData)).toSet()
    PresentNuclei present = nucleiPresent(imageData, marks, asked, withForeign)
    boolean whole = new Areas(regions).isWhole(imageData.getServer().getWidth(), imageData.getServer().getHeight())
    if (whole)
        for (PathObject nucleus : present.onBorder + present.others)
            tallies[regions.first()].add(nucleus)
    Areas ours = new Areas(whole ? [] as List<PathObject> : regions)
    for (PathObject nucleus : ours.isEmpty() ? [] as List<PathObject> : present.onBorder)
        for (PathObject region : regionsOf(nucleus, ours))
            tallies[region].add(nucleus)
    for (PathObject nucleus : ours.isEmpty() ? [] as List<PathObject> : present.others)
        for (PathObject region : ours.holding(centroidOf(nucleus)))
            tallies[region].add(nucleus)
    // Beside cores and annotations there are nuclei of other runs, which may touch them.
    for (Areas areas : [new Areas(cores), new Areas(annotations)])
        for (PathObject nucleus : areas.isEmpty() ? [] as List<PathObject> : present.onBorder + present.others)
            for (PathObject counted : areas.holding(centroidOf(nucleus)))
                tallies[counted].add(nucleus)
    refreshTissueOfCounted(cores + annotations, result)
    boolean graded = tallies.values().any { Tally tally -> tally.isGraded() } || hasGrades(result)
    tallies.each { PathObject region, Tally tally -> measure(region, tally, graded, imageData) }
    if (result != null) {
        List<PreparedGeometry> failed = failedIn(result)
        List<PreparedGeometry> segmented = segmentedIn(imageData, result)
        for (PathObject region : regions)   // which a run segmented, this one or an earlier one
            if (!(tissueOf(region) > 0) && meet(region, failed))
                forgetDensityOfNone(region)
        for (PathObject counted : cores + annotations)
            if (Double.isNaN(tissueOf(counted)) && (!meet(counted, segmented) || meet(counted, failed)))
                forgetDensityOfNone(counted)
    }
    imageData.getHierarchy().fireObjectMeasurementsChangedEvent(imageData, tallies.keySet().toList())
    return tallies.keySet().toList()
}

/** Takes the numbers of earlier runs from annotations and cores that are 'counted' no more: their nuclei are others. */
@CompileStatic
static void forgetCounts(ImageData<?> imageData, List<PathObject> counted) {
    List<PathObject> others = new ArrayList<PathObject>(imageData.getHierarchy().getAnnotationObjects())
    others.addAll(imageData.getHierarchy().getTMAGrid()?.getTMACoreList() ?: [])
    others.removeAll(counted.toSet())
    List<PathObject> measured = others.findAll { PathObject other ->
        !Double.isNaN(other.getMeasurementList().get('PatchCL: Nuclei'))
    }
    for (PathObject other : measured)
        for (String name : new ArrayList<String>(other.getMeasurementList().getMeasurementNames()))
            if (name.startsWith('PatchCL: '))
                setOrForget(other, name, Double.NaN)
    if (!measured.isEmpty())
        imageData.getHierarchy().fireObjectMeasurementsChangedEvent(imageData, measured)
}

/** Whether the last run sorted nuclei into 1+, 2+ and 3+. */
@CompileStatic
static boolean hasGrades(JsonObject result) {
    return result?.has('positivity') && result.getAsJsonObject('positivity').getAsJsonArray('thresholds').size() == 3
}

/** Gives annotations and cores the area of tissue of the last run; none if their shape is another one now. */
@CompileStatic
static void refreshTissueOfCounted(List<PathObject> counted, JsonObject result) {
    Map<String, JsonObject> summaries = [:]
    for (JsonElement one : result?.getAsJsonArray('summaries') ?: new JsonArray())
        if (one.getAsJsonObject().has('id'))
            summaries[text(one.getAsJsonObject(), 'id')] = one.getAsJsonObject()
    for (PathObject region : counted) {
        JsonObject summary = summaries[region.getID().toString()]
        ROI roi = region.getROI()
        boolean same = summary?.has('tissue_mm2') && summary.has('area_px') &&
                isInPlace(roi, summary.get('x').getAsDouble(), summary.get('y').getAsDouble(),
                        summary.get('area_px').getAsDouble())
        setOrForget(region, 'PatchCL: Tissue mm^2', same ? summary.get('tissue_mm2').getAsDouble() : Double.NaN)
    }
}

/** Where the last run looked for nuclei: its regions, or the whole image. */
@CompileStatic
static List<PreparedGeometry> segmentedIn(ImageData<?> imageData, JsonObject result) {
    def server = imageData.getServer()
    ROI whole = ROIs.createRectangleROI(0, 0, server.getWidth(), server.getHeight(), ImagePlane.getDefaultPlane())
    List<ROI> regions = result.has('regions') ? regionsOfRun(result) : [whole]
    return regions.collect { ROI region -> PreparedGeometryFactory.prepare(region.getGeometry()) }
}

/** The tiles of the last run that failed. */
@CompileStatic
static List<PreparedGeometry> failedIn(JsonObject result) {
    return (result.getAsJsonArray('holes') ?: new JsonArray()).collect { JsonElement one ->
        JsonObject tile = one.getAsJsonObject()
        ROI failed = ROIs.createRectangleROI(
                tile.get('x').getAsDouble(), tile.get('y').getAsDouble(),
                tile.get('width').getAsDouble(), tile.get('height').getAsDouble(), ImagePlane.getDefaultPlane())
        PreparedGeometryFactory.prepare(failed.getGeometry())
    }
}

/** Whether an object shares more than a border with others. An outline that crosses itself is mended by shrinking. */
@CompileStatic
static boolean meet(PathObject object, List<PreparedGeometry> others) {
    Geometry inner = object.getROI().getGeometry().buffer(-0.5d)
    return others.any { PreparedGeometry other -> other.intersects(inner) }
}

/** The area of tissue in mm^2; not a number where it is not known. */
@CompileStatic
static double tissueOf(PathObject object) {
    return object.getMeasurementList().get('PatchCL: Tissue mm^2')
}

/** Takes a density of 0, which would say that somebody looked. */
@CompileStatic
static void forgetDensityOfNone(PathObject object) {
    if (object.getMeasurementList().get('PatchCL: Nuclei') == 0d)
        setOrForget(object, 'PatchCL: Nuclei per mm^2', Double.NaN)
}

/** The centroid of an object, or of the nucleus of a cell. QuPath's own takes long: it looks for crossings, too. */
@CompileStatic
static Coordinate centroidOf(PathObject nucleus) {
    ROI roi = contourOf(nucleus)
    if (!(roi instanceof PolygonROI))
        return new Coordinate(roi.getCentroidX(), roi.getCentroidY())
    Point2[] points = pointsOf(roi)
    Point2 first = points[0]
    double area = 0, x = 0, y = 0
    double lastX = 0, lastY = 0   // relative to the first, for their digits
    for (Point2 point : points) {
        double nextX = point.getX() - first.getX()
        double nextY = point.getY() - first.getY()
        double cross = lastX * nextY - nextX * lastY
        area += cross
        x += (lastX + nextX) * cross
        y += (lastY + nextY) * cross
        lastX = nextX
        lastY = nextY
    }
    if (area == 0d)
        return new Coordinate(roi.getCentroidX(), roi.getCentroidY())
    return new Coordinate(first.getX() + x / (3 * area), first.getY() + y / (3 * area))
}

/**
 * The nuclei of an image, whatever their parent: those that were imported, cells that were made of them, and those that
 * a person drew. Regions, of which 'regions' are known, ROIs and objects of a class that QuPath ignores ('Ignore*') are
 * none. Detections of other programs are nuclei only where ours were left out for them.
 */
@CompileStatic
static PresentNuclei nucleiPresent(ImageData<?> imageData, Marks marks, Set<PathObject> regions, boolean withForeign) {
    Collection<PathObject> all = imageData.getHierarchy().getAllObjects(false)
    Set<PathObject> foreign = foreignObjects(all, marks, [] as List<PathObject>)
    PresentNuclei present = new PresentNuclei()
    List<PathObject> drawn = []
    for (PathObject pathObject : all) {
        UUID id = pathObject.getID()
        ROI roi = contourOf(pathObject)
        boolean ignored = pathObject.getPathClass() != null &&   // of no class, QuPath says the same
                PathClassTools.isIgnoredClass(pathObject.getPathClass())
        if (roi == null || !roi.isArea() || ignored)
            continue
        if (marks.nuclei.containsKey(id))
            present.onBorder.add(pathObject)
        else if (marks.contains(id) || isCorrectionRoi(pathObject) || regions.contains(pathObject))
            continue
        else if (pathObject.isDetection() && !foreign.contains(pathObject))
            present.onBorder.add(pathObject)
        else if (withForeign && pathObject.isDetection() && !pathObject.isTile())
            present.others.add(pathObject)
        else if (pathObject.isAnnotation() && !marks.nuclei.containsKey(pathObject.getParent().getID()))
            drawn.add(pathObject)   // but for what was drawn within a nucleus
    }
    present.others.addAll(drawnNuclei(drawn, present, imageData))
    return present
}

/** Of the annotations that a person drew, the nuclei: at most 2,000 µm² large, and without several nuclei within. */
@CompileStatic
static List<PathObject> drawnNuclei(List<PathObject> drawn, PresentNuclei present, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    double pixelArea = pixels.hasPixelSizeMicrons() ?
            pixels.getPixelWidthMicrons() * pixels.getPixelHeightMicrons() : 0.25d * 0.25d
    Areas areas = new Areas(drawn.findAll { PathObject annotation ->
        annotation.getROI().getArea() * pixelArea <= 2000
    })
    if (areas.isEmpty())
        return areas.objects
    Map<PathObject, Integer> within = new IdentityHashMap<>()
    for (Collection<PathObject> objects : [present.onBorder, present.others, drawn])
        for (PathObject nucleus : objects)
            for (PathObject annotation : areas.holding(centroidOf(nucleus)))
                within.merge(annotation, 1) { Integer one, Integer other -> one + other }
    return areas.objects.findAll { PathObject annotation ->
        (within[annotation] ?: 0) <= 2   // its own, and one of a nucleus that it was drawn over
    }
}

/** Measures number and density of the nuclei of a region; per area of tissue, where that is known. */
static void measure(PathObject region, Tally tally, boolean graded, ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    def measured = region.getMeasurementList()
    double area = tissueOf(region)
    if (Double.isNaN(area) && pixels.hasPixelSizeMicrons()) {
        area = region.getROI().getScaledArea(pixels.getPixelWidthMicrons(), pixels.getPixelHeightMicrons()) / 1e6
        measured.put('PatchCL: Area mm^2', area)
    }
    measured.put('PatchCL: Nuclei', tally.nuclei)
    double densityOfNone = tally.nuclei == 0 ? 0d : Double.NaN
    setOrForget(region, 'PatchCL: Nuclei per mm^2', area > 0 ? tally.nuclei / area : densityOfNone)
    double known = tally.classified > 0 ? 1d : Double.NaN
    setOrForget(region, 'PatchCL: Negative', known * tally.negative)
    setOrForget(region, 'PatchCL: Positive', known * tally.positive)
    setOrForget(region, 'PatchCL: Positive %', known * 100 * tally.positive / tally.classified)
    for (int grade = 1; grade <= 3; grade++)
        setOrForget(region, "PatchCL: ${grade}+", graded ? known * tally.grades[grade] : Double.NaN)
    setOrForget(region, 'PatchCL: H-score', graded ? known * tally.getHScore() : Double.NaN)
    setOrForget(region, 'PatchCL: Allred score', graded ? known * tally.getAllred() : Double.NaN)
}

/** Sets a measurement; without a number, only one that was there becomes none. */
@CompileStatic
static void setOrForget(PathObject region, String name, double value) {
    MeasurementList measured = region.getMeasurementList()
    if (!Double.isNaN(value) || !Double.isNaN(measured.get(name)))
        measured.put(name, value)
}

@CompileStatic
static String text(JsonObject result, String key) {
    return result.has(key) ? result.get(key).getAsString() : '?'
}

/** Reads the marks from a property of the image, which QuPath saves, discards and duplicates with the objects. */
@CompileStatic
static Marks readMarks(ImageData<?> imageData) {
    Marks marks = new Marks()
    for (String line : marksOfImports(imageData).first().readLines())
        marks.add(UUID.fromString(line.substring(0, 36)), line.substring(37))
    return marks
}

/**
 * The lines of the marks of each import, the last one first, from that whose objects are there. QuPath's 'Undo' of
 * imports restores the objects, but not the property: only objects of one that was before are there.
 */
@CompileStatic
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

@CompileStatic
static Marks toMarks(Map<UUID, String> all) {
    Marks marks = new Marks()
    for (Map.Entry<UUID, String> entry : all.entrySet())
        marks.add(entry.key, entry.value)
    return marks
}

@CompileStatic
static void writeMarks(ImageData<?> imageData, Map<UUID, String> marks) {
    StringBuilder text = new StringBuilder()
    for (Map.Entry<UUID, String> entry : marks.entrySet())
        text.append(text.length() > 0 ? '\n' : '').append(entry.key).append(' ').append(entry.value)
    imageData.setProperty('patchcl.imported', text.toString())
}

/** Reads what imports gave nuclei, with what this one gives; of images of version 0.1, the names that it gave. */
@CompileStatic
static Given readGiven(ImageData<?> imageData, List<PathObject> nuclei) {
    Given given = new Given()
    String lines = imageData.getProperty('patchcl.given')
    if (lines == null) {
        given.classes.add('Nucleus')
        given.measurements.addAll(['Area µm^2', 'Length µm', 'Circularity', 'Solidity', 'Max diameter µm',
                                   'Min diameter µm', 'Detection probability'])
        for (String stain : ['Hematoxylin', 'Eosin', 'DAB', 'Residual'])
            for (String statistic : ['Mean', 'Std.Dev.', 'Min', 'Max'])
                given.measurements.add(stain + ': ' + statistic)
    } else
        for (String line : lines.readLines())
            (line.startsWith('class ') ? given.classes : given.measurements).add(line.substring(line.indexOf(' ') + 1))
    PathClass last = null
    List<String> lastNames = null
    for (PathObject nucleus : nuclei) {
        if (last == null || !nucleus.getPathClass().is(last)) {
            last = nucleus.getPathClass()
            given.classes.add(String.valueOf(last))
        }
        List<String> names = nucleus.getMeasurementList().getMeasurementNames()
        if (!names.is(lastNames)) {   // files have no name where there is no value, as of a cytoplasm without pixels
            lastNames = names
            given.measurements.addAll(names)
        }
    }
    return given.withAllCompartments()
}

@CompileStatic
static void writeGiven(ImageData<?> imageData, Given given) {
    imageData.setProperty('patchcl.given', (given.classes.collect { String name -> 'class ' + name } +
            given.measurements.collect { String name -> 'measurement ' + name }).join('\n'))
}

/** Renames a file in place of another: again, for two seconds, where Windows says that a program has one of them open,
 * as a virus scanner that looks at each new file. */
@CompileStatic
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

/** Writes objects to a file that can be dragged into QuPath. */
@CompileStatic
static void writeObjects(Path file, Collection<PathObject> objects) {
    Files.createDirectories(file.getParent())
    Path temporary = file.resolveSibling("${file.getFileName()}.${UUID.randomUUID()}.partial")
    Files.newOutputStream(temporary).withCloseable { OutputStream stream ->
        PathIO.exportObjectsAsGeoJSON(stream, objects, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    }
    moveOver(temporary, file)
}

static void writeReceipt(Path file, Map receipt) {
    Files.createDirectories(file.getParent())
    Path temporary = file.resolveSibling("${file.getFileName()}.${UUID.randomUUID()}.partial")
    Files.writeString(temporary, GsonTools.getInstance(true).toJson(receipt))
    moveOver(temporary, file)
}

@CompileStatic
static String digestAndCentroid(PathObject pathObject) {
    Coordinate place = centroidOf(pathObject)
    return digest(pathObject) + ' ' + (float) place.x + ' ' + (float) place.y
}

@CompileStatic
static Coordinate centroid(String digestAndCentroid) {
    String[] parts = digestAndCentroid.split(' ')
    return new Coordinate(Double.parseDouble(parts[1]), Double.parseDouble(parts[2]))
}

/**
 * A digest of what a person can change of an object: kind, contours, class, name, colour, lock, description.
 * Coordinates are float, as QuPath saves them: the digest is the same after saving.
 */
@CompileStatic
static String digest(PathObject pathObject, boolean locked = pathObject.isLocked()) {
    String description = pathObject instanceof PathAnnotationObject ?
            ((PathAnnotationObject) pathObject).getDescription() : null
    return digestWith(pathObject, String.valueOf(pathObject.getPathClass()), pathObject.getName(),
            pathObject.getColor(), locked, description)
}

/** The digest that a nucleus had when it was imported, if its contour is as it was then: it was not locked. */
@CompileStatic
static String pristineDigest(PathObject nucleus, String className) {
    return digestWith(nucleus, className, null, null, false, null)
}

@CompileStatic
static String digestWith(PathObject pathObject, String className, String name, Integer color, boolean locked,
                         String description) {
    Point2[] points = pointsOf(pathObject.getROI())
    if (pathObject instanceof PathCellObject)
        points += pointsOf(((PathCellObject) pathObject).getNucleusROI())
    StringBuilder text = new StringBuilder(64)
    text.append('[').append(pathObject.isAnnotation()).append(', ').append(className).append(', ').append(name)
            .append(', ').append((Object) color).append(', ').append(locked)
    if (pathObject.isAnnotation())
        text.append(', ').append(description)
    byte[] rest = text.append(']').toString().getBytes(StandardCharsets.UTF_8)
    ByteBuffer bytes = ByteBuffer.allocate(8 * points.length + rest.length)
    for (Point2 point : points)
        bytes.putFloat((float) point.getX()).putFloat((float) point.getY())
    return sha(bytes.put(rest).array())
}

/** The corners of a contour, as an array: Groovy checks the class of each element of a list. */
@CompileStatic
static Point2[] pointsOf(ROI roi) {
    return roi == null ? new Point2[0] : roi.getAllPoints().toArray(new Point2[0])
}

@CompileStatic
static String sha(byte[] bytes) {
    return HexFormat.of().toHexDigits(ByteBuffer.wrap(Sha.digest(bytes)).getLong())
}

@CompileStatic
static Envelope envelope(ROI roi) {
    return new Envelope(roi.getBoundsX(), roi.getBoundsX() + roi.getBoundsWidth(),
            roi.getBoundsY(), roi.getBoundsY() + roi.getBoundsHeight())
}

/** Whether one of the places lies inside the contour. */
@CompileStatic
static boolean coversAny(ROI roi, STRtree places) {
    return !places.isEmpty() && places.query(envelope(roi)).any {
        roi.contains(((Coordinate) it).x, ((Coordinate) it).y)
    }
}

/** Whether the IoU with one of the contours is more than maxOverlap. */
@CompileStatic
static boolean overlapsAny(ROI roi, STRtree contours, double maxOverlap) {
    if (contours.isEmpty())
        return false
    for (Object other : contours.query(envelope(roi)))
        if (overlap(roi, (ROI) other, maxOverlap) > maxOverlap)
            return true
    return false
}

/** The IoU of two contours; 0 where it cannot be above 'least', which is found out cheaply. */
@CompileStatic
static double overlap(ROI one, ROI other, double least) {
    double area = one.getArea()
    double otherArea = other.getArea()
    double larger = Math.max(area, otherArea)
    if (Math.min(area, otherArea) <= least * larger)
        return 0d
    Envelope both = envelope(one).intersection(envelope(other))
    if (both.getArea() <= least * larger)
        return 0d
    double shared = one.getGeometry().intersection(other.getGeometry()).getArea()
    return shared / (area + otherArea - shared)
}
