/**
 * Finds nuclei, marks fields that are worth correcting, or learns from those that were corrected: starts
 * `patchcl-qp run`, `suggest` or `refine` for the open project, follows it in a window with a Cancel button, and
 * shows in the open image what came of it. QuPath can be used meanwhile. Without a window:
 *
 *     QuPath script -p project.qpproj run_patchcl.groovy
 *
 * To have it under Automate > Project scripts: `patchcl-qp scripts PROJECT`. The other scripts must lie
 * beside this one.
 *
 * A run that was cancelled goes on where it was when it is started again. All that patchcl-qp says is in
 * patchcl/run.log, the outcome in patchcl/ran.json. The images are shown, not saved: save the open one as
 * usual; for others run import_nuclei.groovy. Without a window, all are saved.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
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
import qupath.lib.gui.dialogs.Dialogs
import qupath.lib.images.ImageData
import qupath.lib.io.GsonTools
import qupath.lib.projects.Project
import qupath.lib.projects.ProjectImageEntry
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String command = ''   // path of patchcl-qp; empty, or gone: it is looked for on PATH and in usual places
String what = 'ask'   // 'image': find nuclei in this image, 'project': in all, 'annotations': in some of this one's,
                      // 'suggest': mark fields that are worth correcting, 'refine': learn from the corrected ones;
                      // 'ask': with a window choose there, without: 'project'
List<String> within = []   // for 'annotations': classes, such as ['Tumor', 'Stroma']; empty: what is selected
Map options = [run: [], suggest: ['--fields', '6'], refine: []]   // more for these, such as run: ['--mpp', '0.25']
String folderName = 'patchcl'   // where patchcl-qp leaves its results, beside project.qpproj
// -------------------------------------------------------------------------

Logger logger = LoggerFactory.getLogger('run_patchcl')
QuPathGUI gui = QuPathGUI.getInstance()
if (gui != null && Platform.isFxApplicationThread()) {
    logger.warn('Run this from the script editor: here it would freeze the window.')
    return
}
int batchIndex = (getBinding().getVariables()[ScriptAttributes.BATCH_INDEX] ?: 0) as int
def imageData = QP.getCurrentImageData()
boolean watched = gui != null && gui.getImageData() === imageData   // else it is one of many, or there is no window

reporting(watched) {
    def project = QP.getProject()
    def entry = QP.getProjectEntry()
    if (project == null || entry == null)
        throw new IllegalStateException('Open an image of a project first.')
    if (what == 'ask')
        what = watched ? ask(within) : 'project'
    if (what == null)
        return   // the person closed the question
    if (!(what in ['image', 'project', 'annotations', 'suggest', 'refine']))
        throw new IllegalArgumentException("what = '${what}': it must be 'ask', 'image', 'project', 'annotations', " +
                "'suggest' or 'refine'.")
    if (what == 'annotations' && within.isEmpty() && !QP.getSelectedObjects().any { it.isAnnotation() })
        throw new IllegalStateException('Select annotations first, or name classes after \'within\' at the top of ' +
                'this script.')

    String task = what in ['suggest', 'refine'] ? what : 'run'
    boolean oneImage = what in ['image', 'annotations']
    Path folder = Paths.get(QP.buildPathInProject(folderName))
    Path receipt = folder.resolve('ran.json')
    Path log = folder.resolve('run.log')
    Instant began = Instant.now()
    List<String> arguments = []   // none where it is done already
    if (!oneImage && batchIndex > 0) {
        // Once for all images of the project: for the first image of this batch.
        def ran = Files.exists(receipt) ? JsonParser.parseString(Files.readString(receipt)).getAsJsonObject() : null
        if (ran?.get('qupath_pid')?.getAsLong() != ProcessHandle.current().pid())
            throw new IllegalStateException('patchcl-qp did not start: see the error of the first image.')
        began = Instant.parse(ran.get('began').getAsString())
    } else {
        arguments.addAll([findCommand(command, folder), task, project.getPath().toString()])
        arguments.addAll(['--backend', 'files'])   // QuPath has the images open: it imports
        if (task != 'suggest')
            arguments.addAll(['--progress', 'json'])
        if (oneImage)
            arguments.addAll(['--image', entry.getID()])
        if (what == 'annotations')
            for (name in within ?: ['(selected)'])
                arguments.addAll(['--within', name])
        // What a person taught counts, unless the settings name a model.
        if (task == 'run' && Files.exists(folder.resolve('models/refined.pt')) &&
                Collections.disjoint(options.run, ['--model', '--retrain']))
            arguments.addAll(['--model', 'refined'])
        arguments.addAll(options[task])
        // What patchcl-qp reads of the images, saved or not.
        if (oneImage)
            runBeside('export_regions.groovy')
        if (task != 'run')
            runBeside('export_labels.groovy')
    }

    Closure<?> work = {
        String status = 'done'
        List<String> lastLines = []
        if (arguments) {
            logger.info(arguments.join(' '))
            Files.createDirectories(folder)
            String title = "PatchCL: ${oneImage ? entry.getImageName() : project.getName()}"
            Follower follower = gui != null ? new WindowFollower(title) : new Follower(logger)
            int exitStatus
            try {
                exitStatus = runCommand(arguments, log, follower)
            } finally {
                follower.close()
            }
            status = follower.cancelled ? 'cancelled' : exitStatus == 0 ? 'done' : 'failed'
            lastLines = follower.lastLines
            writeReceipt(receipt, [
                status     : status,
                exit_status: exitStatus,
                began      : began.toString(),
                ended      : Instant.now().toString(),
                qupath_pid : ProcessHandle.current().pid(),
                command    : arguments,
                last_lines : status == 'done' ? [] : lastLines,
            ])
        }

        // Also where it failed: it fails for one image, the others are done. Some disks round times to 2 s.
        Path result = task == 'suggest' ? folder.resolve('fields').resolve(entry.getID() + '.json') :
                folder.resolve('results').resolve(entry.getID()).resolve('result.json')
        boolean found = task != 'refine' && Files.exists(result) &&
                !Files.getLastModifiedTime(result).toInstant().isBefore(began.minusSeconds(2))
        boolean shown = true
        if (found && watched)
            shown = showInWindow(project, imageData)
        else if (found)
            runBeside('import_nuclei.groovy')
        if (status == 'cancelled') {
            logger.info('Cancelled. Start it again, and it goes on where it was.')
            return
        }
        if (status == 'failed')
            throw new IOException("patchcl-qp failed. Its last words:\n\n${lastLines.join('\n')}\n\n" +
                    "All that it said is in ${log}.")
        if (task == 'run' && !found)
            throw new IOException("No nuclei for ${entry.getImageName()}: see why in ${log}.")
        if (watched)
            Dialogs.showMessageDialog('PatchCL', nextStep(task, oneImage, shown, project, entry, folder))
    }
    if (watched)
        Thread.startDaemon('run_patchcl') { reporting(true, work) }   // while a script runs, QuPath's window is locked
    else
        work()
}


/** Does something, and shows to a person what went wrong; else QuPath logs it, and goes on with the next image. */
static void reporting(boolean watched, Closure<?> work) {
    try {
        work()
    } catch (IOException | IllegalArgumentException | IllegalStateException e) {
        if (!watched)
            throw e
        Dialogs.showErrorMessage('PatchCL', e.getMessage())
    }
}

/**
 * Shows what was found in an image, unless it was closed meanwhile: there it would be lost. Says which. Nobody can
 * change the image while this is at work.
 */
boolean showInWindow(Project<?> project, ImageData<?> imageData) {
    Stage stage = null
    def opened = new FutureTask<?>({
        stage = new Stage()
        stage.initOwner(QuPathGUI.getInstance().getStage())
        stage.initModality(Modality.APPLICATION_MODAL)
        stage.setTitle('PatchCL')
        VBox box = new VBox(8, new Label('Showing what was found'), new ProgressBar(-1))
        box.setPadding(new Insets(12))
        stage.setScene(new Scene(box))
        stage.setOnCloseRequest { event -> event.consume() }
        stage.show()
    }, null)
    Platform.runLater(opened)
    opened.get()
    QP.setBatchProjectAndImage(project, imageData)
    try {
        boolean open = QuPathGUI.getInstance().getImageData() === imageData
        if (open)
            runBeside('import_nuclei.groovy')
        return open
    } finally {
        QP.resetBatchProjectAndImage()
        Platform.runLater { stage.close() }
    }
}

/** What a person does next. */
static String nextStep(String task, boolean oneImage, boolean shown, Project<?> project, ProjectImageEntry<?> entry,
                       Path folder) {
    if (task == 'refine')
        return 'The model has learnt from the corrected fields.\n\nRun this script again to find nuclei with it.'
    if (task == 'run')
        return "The nuclei of ${entry.getImageName()} are " + (shown ? 'in the image: save it to keep them.' :
                'ready: open the image, and run the script import nuclei.') +
                (oneImage ? '' : '\n\nFor others, open the script import nuclei, and choose Run > Run for project.')
    Map<String, Integer> fields = project.getImageList().collectEntries {
        Path file = folder.resolve('fields').resolve(it.getID() + '.json')
        int count = !Files.exists(file) ? 0 :
                JsonParser.parseString(Files.readString(file)).getAsJsonObject().getAsJsonArray('fields').size()
        [it.getImageName(), count]
    }.findAll { name, count -> count > 0 }
    boolean elsewhere = !shown || !(fields.keySet() - entry.getImageName()).isEmpty()
    return "These fields, of class 'PatchCL: correct here', are worth correcting:\n\n" +
            fields.collect { name, count -> "${name}: ${count}" }.join('\n') +
            (elsewhere ? '\n\nIn other images, the script import nuclei shows them.' : '') +
            '\n\n1. In each field, put right every nucleus, also on its border.' +
            "\n2. Set the class of a field that is done to 'PatchCL: corrected', and save the image." +
            '\n3. Run this script again, and have it learn from the corrected fields.'
}

/** What a person chooses; null for nothing. */
static String ask(List<String> within) {
    Map<String, String> choices = [
        'Find nuclei in the open image'                : 'image',
        'Find nuclei in all images of the project'     : 'project',
        ("Find nuclei in ${within ? 'annotations of class ' + within.join(' or ') : 'the selected annotations'}"
                .toString())                           : 'annotations',
        'Mark fields that are worth correcting'        : 'suggest',
        'Learn from the corrected fields'              : 'refine',
    ]
    List<String> names = choices.keySet() as List
    return choices[Dialogs.showChoiceDialog('PatchCL', '', names, names.first())]
}

/** The patchcl-qp that the settings name, else that of PATH, else one in a usual place. */
static String findCommand(String command, Path folder) {
    if (command && Files.isRegularFile(Paths.get(command)))
        return command
    boolean windows = System.getProperty('os.name').startsWith('Windows')
    String name = windows ? 'patchcl-qp.exe' : 'patchcl-qp'
    String bin = windows ? 'Scripts' : 'bin'
    Path home = Paths.get(System.getProperty('user.home'))
    List<Path> places = (System.getenv('PATH') ?: '').tokenize(File.pathSeparator).collect { Paths.get(it) }
    // A QuPath that was not started from a terminal does not know a terminal's PATH.
    for (parent in [folder.getParent(), home, home.resolve('patchcl-qupath'), Paths.get('/opt/patchcl-qupath')])
        for (environment in ['.venv', 'venv'])
            places << parent.resolve(environment).resolve(bin)
    places.addAll([home.resolve('.local/bin'), Paths.get('/usr/local/bin'), Paths.get('/opt/homebrew/bin')])
    Path found = places.collect { it.resolve(name) }.find { Files.isRegularFile(it) }
    if (found == null)
        throw new FileNotFoundException("No ${name} on PATH: run `patchcl-qp scripts PROJECT` in a terminal, " +
                "or write its path after 'command' at the top of this script.")
    return found.toString()
}

/** Runs another of our scripts for the same image. */
void runBeside(String name) {
    String own = getBinding().getVariables()[ScriptAttributes.FILE_PATH]
    List<Path> places = [Paths.get(QP.buildPathInProject('scripts', name))]
    if (own != null)
        places.add(0, Paths.get(own).resolveSibling(name))
    Path script = places.find { Files.isRegularFile(it) }
    if (script == null)
        throw new FileNotFoundException("${name} must lie beside this script: `patchcl-qp scripts PROJECT` copies it.")
    new GroovyShell(getClass().getClassLoader(), getBinding()).evaluate(Files.readString(script), name)
}

/** Runs a command to its end, or until it is cancelled or QuPath is closed; returns its exit status. */
static int runCommand(List<String> arguments, Path log, Follower follower) {
    def builder = new ProcessBuilder(arguments).redirectErrorStream(true)
    builder.environment().putAll([PYTHONUTF8: '1', PYTHONUNBUFFERED: '1', NO_COLOR: '1', COLUMNS: '100'])
    Process process = builder.start()
    process.getOutputStream().close()
    Thread atExit = new Thread({ stop(process) })
    Runtime.getRuntime().addShutdownHook(atExit)
    follower.onCancel = { stop(process) }
    try {
        Files.newBufferedWriter(log, StandardCharsets.UTF_8).withCloseable { writer ->
            new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8).eachLine { line ->
                follower.line(line)
                if (!line.startsWith('{"stage"')) {
                    writer.writeLine(line)
                    writer.flush()
                }
            }
        }
        return process.waitFor()
    } catch (InterruptedException | IOException e) {
        follower.cancelled = follower.cancelled || e instanceof InterruptedException
        stop(process)
        if (!follower.cancelled)
            throw e
        return process.waitFor()
    } finally {
        Runtime.getRuntime().removeShutdownHook(atExit)
    }
}

/** Ends a process and all that it started: on Windows, patchcl-qp.exe is not Python itself. */
static void stop(Process process) {
    List<ProcessHandle> all = process.descendants().toList() + process.toHandle()
    all.each { it.destroy() }
    if (!process.waitFor(5, TimeUnit.SECONDS))
        all.each { it.destroyForcibly() }
}

static void writeReceipt(Path file, Map receipt) {
    Path temporary = Files.createTempFile(file.getParent(), file.getFileName().toString(), '.partial')
    Files.writeString(temporary, GsonTools.getInstance(true).toJson(receipt))
    Files.move(temporary, file, StandardCopyOption.REPLACE_EXISTING)
}


/** Takes what patchcl-qp says line by line, and logs it. */
class Follower {

    Logger logger
    List<String> lastLines = []   // without progress
    volatile boolean cancelled = false
    Closure onCancel = { }

    Follower(Logger logger) {
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
        if (done == total)   // also what cannot be counted: 0 of 0
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


/** Shows it in a window, which belongs to another thread than the script. */
class WindowFollower extends Follower {

    Stage stage
    Label label = new Label('Starting')
    ProgressBar bar = new ProgressBar(-1)
    TextArea area = new TextArea()

    WindowFollower(String title) {
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
        Thread.start { cancel() }   // waits for the process: not here
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
