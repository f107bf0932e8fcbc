/**
 * Finds nuclei, suggests ROIs to correct, or refines the model with the corrected ROIs: starts `patchcl-qp run`,
 * `suggest` or `refine` for the open project, shows its progress in a window with a Cancel button, and imports the
 * result into the open image. QuPath can be used meanwhile. Without a window:
 *
 *     QuPath script -p project.qpproj run_patchcl.groovy
 *
 * `patchcl-qp scripts PROJECT` copies it to where Automate > Project scripts lists it. The other scripts must lie
 * beside this one.
 *
 * A cancelled run is resumed when it is started again. The output of patchcl-qp is in patchcl/run.log, the outcome in
 * patchcl/ran.json. Images are not saved: save the open one as usual; for others run import_nuclei.groovy. Without a
 * window, all are saved.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import java.nio.charset.StandardCharsets
import java.nio.file.AccessDeniedException
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.text.Normalizer
import java.time.Instant
import java.util.concurrent.FutureTask
import java.util.concurrent.TimeUnit
import javafx.application.Platform
import javafx.geometry.Insets
import javafx.scene.Scene
import javafx.scene.control.Button
import javafx.scene.control.Label
import javafx.scene.control.ProgressBar
import javafx.scene.control.TextArea
import javafx.scene.layout.Priority
import javafx.scene.layout.VBox
import javafx.stage.Modality
import javafx.stage.Stage
import org.slf4j.Logger
import org.slf4j.LoggerFactory
import qupath.lib.gui.QuPathGUI
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.objects.PathObject
import qupath.lib.objects.classes.PathClass
import qupath.lib.projects.Project
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.roi.interfaces.ROI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String command = ''   // path of patchcl-qp; if empty or missing, it is searched for on PATH and in usual places
String what = 'ask'   // 'image': find nuclei in this image, 'project': in all, 'annotations': in some of this one's,
                      // 'suggest': suggest ROIs to correct, 'refine': refine the model with the corrected ROIs;
                      // 'ask': with a window choose there, without: 'project'
List<String> within = []   // for 'annotations': classes, such as ['Tumor', 'Stroma']; empty: the selected ones
Map options = [run: [], suggest: ['--rois', '6'], refine: []]   // more options, such as run: ['--mpp', '0.25']
String folderName = 'patchcl'   // folder of patchcl-qp's results, beside project.qpproj
// -------------------------------------------------------------------------

QuPathGUI gui = QuPathGUI.getInstance()
if (gui != null && Platform.isFxApplicationThread()) {
    LoggerFactory.getLogger('run_patchcl').warn('Run this from the script editor: here it would freeze the window.')
    return
}
def imageData = QP.getCurrentImageData()
boolean watched = gui != null && gui.getImageData() === imageData   // else it is one of many, or there is no window
Instant batch = beginningOfBatch()
// Another script can ask for a task, such as 'refine', in its own thread: errors are then raised, and no message shown.
String asked = getBinding().getVariables()['patchcl_task']

reporting(watched && asked == null) {
    if (QP.getProject() == null || QP.getProjectEntry() == null)
        throw new IllegalStateException('Open an image of a project first.')
    String chosen = asked ?: what != 'ask' ? what : watched ? ask(within) : 'project'
    if (chosen == null)
        return   // the person closed the question
    Task task = new Task(what: chosen, within: within, project: QP.getProject(), entry: QP.getProjectEntry(),
            imageData: imageData, folder: Paths.get(QP.buildPathInProject(folderName)))
    check(task)
    String before = watched && asked == null && task.subcommand == 'run' ?
            replacedInWords(imageData, regionsOf(task)) : null
    if (before != null && !dialogs().showConfirmDialog('PatchCL', before))
        return
    // For the whole project it is started once: for the first image of this batch.
    TaskOutcome outcome = !task.oneImage && batch != null ? outcomeOfBatch(task, batch) : null
    Instant began = Instant.now()
    List<String> arguments = []
    if (outcome == null) {
        arguments = commandLine(task, findCommand(command, task.folder), options)
        // 'Run for project' saves images, but not the project, which has the sizes of their pixels. Without a window, a
        // project that was moved would lose where its images were.
        if (gui != null)
            task.project.syncChanges()
        exportDrawings(task)
    }
    Closure<?> work = { showResult(task, outcome ?: runTask(task, arguments, began), watched, asked != null) }
    if (watched && asked == null)
        Thread.startDaemon('run_patchcl') { reporting(true, work) }   // while a script runs, QuPath's window is locked
    else
        work()
}


/** What patchcl-qp is to do, for which image of which project. */
class Task {

    String what   // as in the settings, but 'ask'
    List<String> within
    Project<?> project
    ProjectImageEntry<?> entry
    ImageData<?> imageData
    Path folder   // of the results

    /** The subcommand of patchcl-qp. */
    String getSubcommand() {
        return what in ['suggest', 'refine'] ? what : 'run'
    }

    boolean isOneImage() {
        return what in ['image', 'annotations']
    }

    Path getReceipt() {
        return folder.resolve('ran.json')
    }

    Path getLog() {
        return folder.resolve('run.log')
    }

    /** The file that exists once there is a result for the image. */
    Path getResult() {
        return what == 'suggest' ? folder.resolve('fields').resolve(entry.getID() + '.json') :
                folder.resolve('results').resolve(entry.getID()).resolve('result.json')
    }
}


/** How patchcl-qp ended. */
class TaskOutcome {

    String status   // 'done', 'failed' or 'cancelled'
    boolean complete   // no image failed
    Instant began
    List<String> lastLines = []   // of its output
}


/** Raises an exception for settings that cannot be followed. */
static void check(Task task) {
    if (!(task.what in ['image', 'project', 'annotations', 'suggest', 'refine']))
        throw new IllegalArgumentException("what = '${task.what}': it must be 'ask', 'image', 'project', " +
                "'annotations', 'suggest' or 'refine'.")
    if (task.what == 'annotations' && task.within.isEmpty() && !QP.getSelectedObjects().any { it.isAnnotation() })
        throw new IllegalStateException('Select annotations first, or name classes after \'within\' at the top of ' +
                'this script.')
}

/** The annotations in which nuclei are to be found; null for the whole image. */
static List<PathObject> regionsOf(Task task) {
    if (task.what != 'annotations')
        return null
    Collection<PathObject> all = task.within.isEmpty() ? QP.getSelectedObjects() :
            task.imageData.getHierarchy().getAnnotationObjects().findAll {
                it.getPathClass() != null && composed(it.getPathClass()) in task.within.collect { name ->
                    composed(PathClass.fromString(name))
                }
            }
    return all.findAll { it.isAnnotation() && it.getROI()?.isArea() }.toList()
}

/** The name of a class, however a person wrote it: macOS has letters with accents in two parts. */
static String composed(PathClass name) {
    return Normalizer.normalize(name.toString(), Normalizer.Form.NFC)
}

/** What a run replaces of the nuclei in the image, for a person to agree to; null if there is nothing to replace. */
static String replacedInWords(ImageData<?> imageData, List<PathObject> regions) {
    // import_nuclei.groovy lists the objects that it added: a line for each, its id first.
    Set<String> ours = marksOfImports(imageData).first().readLines()
            .findAll { !it.endsWith(' region') && !it.contains(' field ') }
            .collect { it.substring(0, 36) }.toSet()
    List<PathObject> nuclei = imageData.getHierarchy().getAllObjects(false).findAll {
        ours.contains(it.getID().toString())
    }.toList()
    int replaced = (int) nuclei.count { PathObject nucleus ->
        ROI roi = nucleus.getROI()
        regions == null || regions.any { it.getROI().contains(roi.getCentroidX(), roi.getCentroidY()) }
    }
    if (replaced == 0)
        return null
    String what = regions == null ? "The ${replaced} nuclei of earlier runs in this image" :
            "Of ${nuclei.size()} nuclei of earlier runs, the ${replaced} in ${regions.size()} annotations"
    return "${what} are replaced by new ones.${regions == null ? '' : ' All others stay.'}\n\n" +
            'Classes, measurements and notes that you gave them are carried over. ' +
            'Nuclei that you reshaped, locked or drew stay as they are.'
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
 * When the batch began of which the script runs for a later image; null for its first one, which may not be that of
 * index 0: for an image that cannot be opened, no script runs. A property of the process knows the image before.
 */
Instant beginningOfBatch() {
    Map variables = getBinding().getVariables()
    int index = (variables[ScriptAttributes.BATCH_INDEX] ?: 0) as int
    int size = (variables[ScriptAttributes.BATCH_SIZE] ?: 1) as int
    if (size == 1)
        return null
    List<String> before = System.getProperty('patchcl.batch', '').tokenize()
    boolean isLater = before && before[0] as int == size && (before[1] as int) < index
    String began = isLater ? before[2] : Instant.now().toString()
    System.setProperty('patchcl.batch', "${size} ${index} ${began}")
    return isLater ? Instant.parse(began) : null
}

/** The outcome for the whole project, of the run that the first image of this batch started. */
static TaskOutcome outcomeOfBatch(Task task, Instant batch) {
    def ran = Files.exists(task.receipt) ?
            JsonParser.parseString(Files.readString(task.receipt)).getAsJsonObject() : null
    boolean isOfThisProcess = ran?.get('qupath_pid')?.getAsLong() == ProcessHandle.current().pid()
    Instant began = isOfThisProcess ? Instant.parse(ran.get('began').getAsString()) : null
    if (began == null || began.isBefore(batch))
        throw new IllegalStateException('patchcl-qp did not start: see the error of the first image.')
    return new TaskOutcome(status: 'done', complete: ran.get('status')?.getAsString() == 'done', began: began)
}

static List<String> commandLine(Task task, String command, Map options) {
    List<String> arguments = [command, task.subcommand, task.project.getPath().toString()]
    arguments.addAll(['--backend', 'files'])   // QuPath has the images open: it imports
    if (task.what != 'suggest')
        arguments.addAll(['--progress', 'json'])
    if (task.oneImage)
        arguments.addAll(['--image', 'id:' + task.entry.getID()])
    if (task.what == 'annotations')
        for (name in task.within ?: ['(selected)'])
            arguments.addAll(['--within', name])
    // A refined model is used, unless the settings name a model.
    if (task.subcommand == 'run' && Files.exists(task.folder.resolve('models/refined.pt')) &&
            Collections.disjoint(options.run, ['--model', '--retrain']))
        arguments.addAll(['--model', 'refined'])
    arguments.addAll(options[task.subcommand])
    return arguments
}

/** Exports what patchcl-qp reads of the images, saved or not. */
void exportDrawings(Task task) {
    if (task.oneImage)
        runBeside('export_regions.groovy')
    else
        exportImages(task)
    if (task.subcommand != 'run') {
        getBinding().setVariable('patchcl_all_images', true)
        runBeside('export_labels.groovy')
    }
}

/**
 * Exports the stains and the pixel size of the open image as they are now, and for a run its annotations, which may be
 * asked for among the options; for a run, also those of the other images as they were saved.
 */
void exportImages(Task task) {
    String name = 'export_regions.groovy'
    def exporting = new GroovyClassLoader(getClass().getClassLoader()).parseClass(Files.readString(beside(name)), name)
    for (other in task.project.getImageList()) {
        Path regions = task.folder.resolve('regions').resolve(other.getID() + '.geojson')
        Path stains = task.folder.resolve('stains').resolve(other.getID() + '.json')
        Path data = other.getEntryPath().resolve('data.qpdata')
        if (other.getID() == task.entry.getID() && !exporting.isUnread(task.imageData, other)) {
            if (task.subcommand == 'run')
                runBeside(name)
            else
                exporting.exportStains(task.imageData, stains, exporting.pixelSizeOf(task.imageData))
            continue
        }
        if (task.subcommand != 'run' || !(isNewer(data, stains) || isNewer(data, regions)))
            continue
        try {
            def saved = other.readImageData()
            saved.getServer().close()   // what was read of it stays
            if (exporting.isUnread(saved, other))
                throw new IOException("${data} is damaged.")
            exporting.exportRegions(saved, exporting.selectedIn(regions), regions)
            exporting.exportStains(saved, stains)
        } catch (Exception e) {   // patchcl-qp says what is wrong with an image, and goes on with the others
            LoggerFactory.getLogger('run_patchcl').warn("${other.getImageName()}: its annotations and stains cannot " +
                    "be read: ${e.getMessage()}")
        }
    }
}

/** Whether a file is there, and not older than another, if that is there. */
static boolean isNewer(Path path, Path other) {
    return Files.exists(path) && (!Files.exists(other) ||
            Files.getLastModifiedTime(path) >= Files.getLastModifiedTime(other))
}

/** Runs patchcl-qp with its progress in a window, where there is one, and writes a receipt. */
static TaskOutcome runTask(Task task, List<String> arguments, Instant began) {
    Logger logger = LoggerFactory.getLogger('run_patchcl')
    logger.info(arguments.join(' '))
    Files.createDirectories(task.folder)
    String title = "PatchCL: ${task.oneImage ? task.entry.getImageName() : task.project.getName()}"
    ProgressLogger progress = QuPathGUI.getInstance() != null ? new ProgressWindow(title) : new ProgressLogger(logger)
    int exitStatus
    try {
        exitStatus = runCommand(arguments, task.log, progress)
    } finally {
        progress.close()
    }
    TaskOutcome outcome = new TaskOutcome(began: began, lastLines: progress.lastLines)
    outcome.status = progress.cancelled ? 'cancelled' : exitStatus == 0 ? 'done' : 'failed'
    outcome.complete = outcome.status == 'done'
    writeReceipt(task.receipt, [
        status     : outcome.status,
        exit_status: exitStatus,
        began      : began.toString(),
        ended      : Instant.now().toString(),
        qupath_pid : ProcessHandle.current().pid(),
        command    : arguments,
        last_lines : outcome.status == 'done' ? [] : outcome.lastLines,
    ])
    return outcome
}

/** Imports the result into the image, and reports the outcome, which the script knows that asked for it. */
void showResult(Task task, TaskOutcome outcome, boolean watched, boolean asked) {
    // Also after a failure: one image fails, the others are done. Some disks round times to 2 s. A run that finds an
    // image as it would leave it writes nothing: its nuclei may still not be in the image that is open.
    boolean found = task.what != 'refine' && Files.exists(task.result) &&
            (task.subcommand == 'run' && outcome.complete ||
            !Files.getLastModifiedTime(task.result).toInstant().isBefore(outcome.began.minusSeconds(2)))
    boolean shown = true
    // A script that asks in a window imports by itself: it knows which images are open by then, and saves them.
    if (asked && QuPathGUI.getInstance() != null)
        shown = false
    else if (found && watched)
        shown = importInWindow(task)
    else if (found)
        runBeside('import_nuclei.groovy')
    if (outcome.status == 'cancelled') {
        LoggerFactory.getLogger('run_patchcl').info('Cancelled. Start it again to resume.')
        if (asked)
            throw new IllegalStateException('Cancelled. Start it again to resume.')
        return
    }
    if (outcome.status == 'failed')
        throw new IOException("patchcl-qp failed. The end of its output:\n\n${outcome.lastLines.join('\n')}\n\n" +
                "All of its output is in ${task.log}.")
    if (task.subcommand == 'run' && !found)
        throw new IOException("No nuclei for ${task.entry.getImageName()}: see why in ${task.log}.")
    if (watched && !asked)
        dialogs().showMessageDialog('PatchCL', nextStep(task, shown))
}

/** Does something, and shows errors to a person; else QuPath logs them, and goes on with the next image. */
static void reporting(boolean watched, Closure<?> work) {
    try {
        work()
    } catch (IOException | IllegalArgumentException | IllegalStateException e) {
        if (!watched)
            throw e
        dialogs().showErrorMessage('PatchCL', e.getMessage())
    }
}

/**
 * Imports the result into the open image, and returns true; false, without import, if the image was closed meanwhile:
 * changes of it would be lost. Nobody can change the image during the import.
 */
boolean importInWindow(Task task) {
    Stage stage = null
    def opened = new FutureTask<Object>({ stage = openWaitingWindow() }, null)
    Platform.runLater(opened)
    opened.get()
    QP.setBatchProjectAndImage(task.project, task.imageData)
    try {
        boolean open = QuPathGUI.getInstance().getImageData() === task.imageData
        if (open)
            runBeside('import_nuclei.groovy')
        return open
    } finally {
        QP.resetBatchProjectAndImage()
        Platform.runLater { stage.close() }
    }
}

/** Opens a window that locks the others until it is closed by the script. */
static Stage openWaitingWindow() {
    Stage stage = new Stage()
    stage.initOwner(QuPathGUI.getInstance().getStage())
    stage.initModality(Modality.APPLICATION_MODAL)
    stage.setTitle('PatchCL')
    VBox box = new VBox(8, new Label('Importing the result'), new ProgressBar(-1))
    box.setPadding(new Insets(12))
    stage.setScene(new Scene(box))
    stage.setOnCloseRequest { event -> event.consume() }
    stage.show()
    return stage
}

/** The next step of a person, as text. */
static String nextStep(Task task, boolean shown) {
    if (task.what == 'refine')
        return 'The model was refined with the corrected ROIs.\n\nRun this script again to find nuclei with it.'
    if (task.what == 'suggest')
        return correctionSteps(task, shown)
    String name = task.entry.getImageName()
    String imported = shown ? importedInWords(task) : null
    return (imported != null ? "${name}: ${imported}.\n\nSave the image to keep them." :
            "The nuclei of ${name} are ready: open the image, and run the script import nuclei.") +
            (task.oneImage ? '' : '\n\nFor others, open the script import nuclei, and choose Run > Run for project.')
}

/** What the import into the open image did, with the numbers of nuclei; null where a person decided against it. */
static String importedInWords(Task task) {
    Path file = task.folder.resolve('imported').resolve(task.entry.getID() + '.json')
    if (!Files.exists(file) || Files.getLastModifiedTime(file) < Files.getLastModifiedTime(task.result))
        return null
    return JsonParser.parseString(Files.readString(file)).getAsJsonObject().get('in_words').getAsString()
}

/** Which ROIs were suggested, and how to correct them. Files call ROIs 'fields', as version 0.1 did. */
static String correctionSteps(Task task, boolean shown) {
    List<Map> images = task.project.getImageList().collect {   // a list: several may have one name
        Path file = task.folder.resolve('fields').resolve(it.getID() + '.json')
        int count = !Files.exists(file) ? 0 :
                JsonParser.parseString(Files.readString(file)).getAsJsonObject().getAsJsonArray('fields').size()
        [id: it.getID(), name: it.getImageName(), rois: count]
    }.findAll { it.rois > 0 }
    boolean elsewhere = !shown || images.any { it.id != task.entry.getID() }
    return "Suggested ROIs, of class 'PatchCL: correct here':\n\n" +
            images.collect { "${it.name}: ${it.rois}" }.join('\n') +
            (elsewhere ? '\n\nIn other images, the script import nuclei shows them.' : '') +
            '\n\n1. In each ROI, correct every nucleus, also on its border.' +
            "\n2. Set the class of a finished ROI to 'PatchCL: corrected', and save the image." +
            '\n3. Run this script again, and refine the model with the corrected ROIs.'
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

/** The choice of a person, as in the settings; null if the dialog was closed. */
static String ask(List<String> within) {
    Map<String, String> choices = [
        'Find nuclei in the open image'                : 'image',
        'Find nuclei in all images of the project'     : 'project',
        ("Find nuclei in ${within ? 'annotations of class ' + within.join(' or ') : 'the selected annotations'}"
                .toString())                           : 'annotations',
        'Suggest ROIs to correct'                      : 'suggest',
        'Refine the model with the corrected ROIs'     : 'refine',
    ]
    List<String> names = choices.keySet() as List
    return choices[dialogs().showChoiceDialog('PatchCL', '', names, names.first())]
}

/** The patchcl-qp that the settings name, else that of PATH, else one in a usual place. */
static String findCommand(String command, Path folder) {
    if (command && Files.isRegularFile(Paths.get(command)))
        return command
    boolean windows = System.getProperty('os.name').startsWith('Windows')
    String name = windows ? 'patchcl-qp.exe' : 'patchcl-qp'
    String bin = windows ? 'Scripts' : 'bin'
    File home = new File(System.getProperty('user.home'))
    // Windows allows quotes in PATH, of which Paths.get makes an error.
    String path = (System.getenv('PATH') ?: '').replace('"', '')
    List<File> places = path.tokenize(File.pathSeparator).collect { new File(it) }
    // A QuPath that was not started from a terminal does not have the PATH of a terminal.
    File project = folder.getParent().toFile()
    for (parent in [project, home, new File(home, 'patchcl-qupath'), new File('/opt/patchcl-qupath')])
        for (environment in ['.venv', 'venv'])
            places << new File(parent, "${environment}/${bin}")
    places.addAll([new File(home, '.local/bin'), new File('/usr/local/bin'), new File('/opt/homebrew/bin')])
    File found = places.collect { new File(it, name) }.find { it.isFile() }
    if (found == null)
        throw new FileNotFoundException("No ${name} on PATH: run `patchcl-qp scripts PROJECT` in a terminal, " +
                "or write its path after 'command' at the top of this script.")
    return found.toString()
}

/** Runs another of these scripts for the same image. */
void runBeside(String name) {
    new GroovyShell(getClass().getClassLoader(), getBinding()).evaluate(Files.readString(beside(name)), name)
}

/** Another of these scripts, which lies beside this one or in the project. */
Path beside(String name) {
    String own = getBinding().getVariables()[ScriptAttributes.FILE_PATH]
    List<Path> places = [Paths.get(QP.buildPathInProject('scripts', name))]
    if (own != null)
        places.add(0, Paths.get(own).resolveSibling(name))
    Path script = places.find { Files.isRegularFile(it) }
    if (script == null)
        throw new FileNotFoundException("${name} must lie beside this script: `patchcl-qp scripts PROJECT` copies it.")
    return script
}

/** Runs a command to its end, or until it is cancelled or QuPath is closed; returns its exit status. */
static int runCommand(List<String> arguments, Path log, ProgressLogger progress) {
    def builder = new ProcessBuilder(arguments).redirectErrorStream(true)
    builder.environment().putAll([PYTHONUTF8: '1', PYTHONUNBUFFERED: '1', NO_COLOR: '1', COLUMNS: '100'])
    Process process = builder.start()
    process.getOutputStream().close()
    Thread atExit = new Thread({ stop(process) })
    Runtime.getRuntime().addShutdownHook(atExit)
    progress.onCancel = { stop(process) }
    try {
        Files.newBufferedWriter(log, StandardCharsets.UTF_8).withCloseable { writer ->
            new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8).eachLine { line ->
                progress.line(line)
                if (!line.startsWith('{"stage"')) {
                    writer.writeLine(line)
                    writer.flush()
                }
            }
        }
        return process.waitFor()
    } catch (InterruptedException | IOException e) {
        progress.cancelled = progress.cancelled || e instanceof InterruptedException
        stop(process)
        if (!progress.cancelled)
            throw e
        return process.waitFor()
    } finally {
        Runtime.getRuntime().removeShutdownHook(atExit)
    }
}

/** Ends a process and its descendants: on Windows, patchcl-qp.exe starts Python as another process. */
static void stop(Process process) {
    List<ProcessHandle> all = process.descendants().toList() + process.toHandle()
    all.each { it.destroy() }
    if (!process.waitFor(5, TimeUnit.SECONDS))
        all.each { it.destroyForcibly() }
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

static void writeReceipt(Path file, Map receipt) {
    Path temporary = file.resolveSibling("${file.getFileName()}.${UUID.randomUUID()}.partial")
    Files.writeString(temporary, GsonTools.getInstance(true).toJson(receipt))
    moveOver(temporary, file)
}


/** Logs the output of patchcl-qp, line by line. */
class ProgressLogger {

    Logger logger
    List<String> lastLines = []   // of the output, without progress
    volatile boolean cancelled = false
    Closure onCancel = { }

    ProgressLogger(Logger logger) {
        this.logger = logger
    }

    void line(String line) {
        if (line.startsWith('{"stage"')) {
            def step = JsonParser.parseString(line).getAsJsonObject()
            progress(step.get('stage').getAsString(), step.get('done').getAsInt(), step.get('total').getAsInt())
            return
        }
        lastLines << line
        if (lastLines.size() > 20)
            lastLines.remove(0)
        text(line)
    }

    void progress(String stage, int done, int total) {
        if (done == total)   // also of stages that cannot be counted: 0 of 0
            logger.info(total > 0 ? "${stage}: ${done} of ${total}" : stage)
    }

    void text(String line) {
        logger.info(line)
    }

    void cancel() {
        cancelled = true
        onCancel()
    }

    void close() { }
}


/** Shows the output in a window, too, which belongs to another thread than the script. */
class ProgressWindow extends ProgressLogger {

    Stage stage
    Label label = new Label('Starting')
    ProgressBar bar = new ProgressBar(-1)
    TextArea area = new TextArea()

    ProgressWindow(String title) {
        super(LoggerFactory.getLogger('run_patchcl'))
        area.setEditable(false)
        area.setStyle('-fx-font-family: monospace')
        bar.setMaxWidth(Double.MAX_VALUE)
        VBox.setVgrow(area, Priority.ALWAYS)
        Platform.runLater { open(title) }
    }

    private void open(String title) {
        Button button = new Button('Cancel')
        button.setOnAction { cancelInBackground(button) }
        VBox box = new VBox(8, label, bar, area, button)
        box.setPadding(new Insets(12))
        stage = new Stage()
        stage.initOwner(QuPathGUI.getInstance().getStage())
        stage.setTitle(title)
        stage.setScene(new Scene(box, 720, 360))
        stage.setOnCloseRequest { event ->
            event.consume()
            cancelInBackground(button)
        }
        stage.show()
    }

    private void cancelInBackground(Button button) {
        button.setDisable(true)
        label.setText('Cancelling')
        Thread.start { cancel() }   // waits for the process: not in the thread of the window
    }

    @Override
    void progress(String step, int done, int total) {
        Platform.runLater {
            label.setText(total > 0 ? "${step}: ${done} of ${total}".toString() : step)
            bar.setProgress(total > 0 ? done / (double) total : -1)
        }
    }

    @Override
    void text(String line) {
        super.text(line)
        Platform.runLater { area.appendText(line + '\n') }
    }

    @Override
    void close() {
        Platform.runLater { stage.close() }
    }
}
