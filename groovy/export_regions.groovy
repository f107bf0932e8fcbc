/**
 * Exports the annotations of the open image as analysis regions, for `patchcl-qp run --within CLASS` and `--summarise
 * CLASS`, its TMA cores, for `--tma`, and its stain vectors and pixel size, for the measurements; with 'Run > Run for
 * project', of every image chosen there. Without a window:
 *
 *     QuPath script -p project.qpproj export_regions.groovy
 *
 * Run it again after each change to the annotations, stains or pixel size. If patchcl-qp finds a QuPath, it reads them
 * without this script once they are saved. Selected annotations are exported a second time, with class '(selected)',
 * for `patchcl-qp run --within '(selected)'`. Lines, points and the nuclei of earlier runs are left out. The image is
 * not changed.
 *
 * Writes patchcl/regions/<image id>.geojson and patchcl/stains/<image id>.json.
 *
 * Needs QuPath 0.4 or later.
 */

import java.nio.file.AccessDeniedException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import org.slf4j.LoggerFactory
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.scripting.QP

// ---------------------------------------------------------------- settings
String folderName = 'patchcl'   // folder in which patchcl-qp reads regions, beside project.qpproj
String selectedClass = '(selected)'   // the class with which selected annotations are exported, too
// -------------------------------------------------------------------------

def logger = LoggerFactory.getLogger('export_regions')
def imageData = QP.getCurrentImageData()
def entry = QP.getProjectEntry()
if (imageData == null || entry == null) {
    logger.warn('Open an image of a project first, or choose Run > Run for project.')
    return
}
if (isUnread(imageData, entry))
    throw new IOException("${entry.getImageName()}: its annotations were not exported: " +
            "${entry.getEntryPath().resolve('data.qpdata')} is damaged, or was written after the image was opened. " +
            'Open the image again. If its objects are not there, restore the file, or move it away.')

List<PathObject> selected = QP.getSelectedObjects().findAll { it.isAnnotation() && it.getROI()?.isArea() }.collect {
    PathObjects.createAnnotationObject(it.getROI(), PathClass.fromString(selectedClass))
}
Path file = Paths.get(QP.buildPathInProject(folderName, 'regions', entry.getID() + '.geojson'))
Map<String, Integer> counts = exportRegions(imageData, selected, file)
exportStains(imageData, Paths.get(QP.buildPathInProject(folderName, 'stains', entry.getID() + '.json')),
        pixelSizeOf(imageData))
logger.info("${entry.getImageName()}: annotations exported to ${file} (" +
        counts.collect { name, count -> "${name}: ${count}" }.join(', ') + ').')


/**
 * Writes a file with the annotations that a person made, the cores of the TMA grid, and 'more'; returns the number of
 * annotations of each class, and of cores. patchcl-qp calls this, too, when it reads by itself.
 */
static Map<String, Integer> exportRegions(ImageData<?> imageData, List<PathObject> more, Path file) {
    // A line for each object that import_nuclei.groovy added, its id first.
    Set<String> ours = marksOfImports(imageData).first().readLines().collect { it.tokenize(' ').first() } as Set
    List<PathObject> regions = imageData.getHierarchy().getAnnotationObjects().toList().findAll {
        it.getROI()?.isArea() && !ours.contains(it.getID().toString())
    }
    List<PathObject> cores = imageData.getHierarchy().getTMAGrid()?.getTMACoreList() ?: []
    List<PathObject> all = regions + cores + more
    write(file) { OutputStream stream ->
        PathIO.exportObjectsAsGeoJSON(stream, all, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    }
    return all.countBy { it.isTMACore() ? 'TMA cores' : it.getPathClass()?.toString() ?: 'no class' }
}

/** The selected annotations in a file that was exported: nobody knows them of an image that is not open. */
static List<PathObject> selectedIn(Path file) {
    return !Files.exists(file) ? [] : PathIO.readObjects(file).findAll {
        it.getPathClass()?.toString() == '(selected)'
    }
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

/** The sides of a pixel in µm, as QuPath shows them, saved or not; null if it has none. */
static List<Double> pixelSizeOf(ImageData<?> imageData) {
    def pixels = imageData.getServer().getPixelCalibration()
    return pixels.hasPixelSizeMicrons() ? [pixels.getPixelWidthMicrons(), pixels.getPixelHeightMicrons()] : null
}

/**
 * Writes a file with the stain vectors and the background of the image, if it has them: not where its type is not set,
 * for example; and with the size of its pixels, if that is given. patchcl-qp calls this, too, without: it has the size
 * that is saved from the project.
 */
static void exportStains(ImageData<?> imageData, Path file, List<Double> pixelSize = null) {
    def stains = imageData.getColorDeconvolutionStains()
    Map content = stains == null ? [:] : [
        type      : imageData.getImageType().name(),
        background: [stains.getMaxRed(), stains.getMaxGreen(), stains.getMaxBlue()],
        stains    : (1..3).findAll { it < 3 || !stains.getStain(it).isResidual() }.collect {
            [name: stains.getStain(it).getName(), vector: stains.getStain(it).getArray()]
        },
    ]
    if (pixelSize != null)
        content.pixel_size_um = pixelSize
    write(file) { OutputStream stream ->
        stream.write(GsonTools.getInstance().toJson(content ?: null).getBytes('UTF-8'))
    }
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

/** Writes a file atomically. */
static void write(Path file, Closure<?> content) {
    Files.createDirectories(file.getParent())
    Path temporary = file.resolveSibling("${file.getFileName()}.${UUID.randomUUID()}.partial")
    Files.newOutputStream(temporary).withCloseable(content)
    moveOver(temporary, file)
}
