/**
 * Finds nuclei: starts `patchcl-qp run` for the open project, follows it in a window with a Cancel button,
 * and shows the nuclei in the open image when it is done. QuPath can be used meanwhile. Without a window:
 *
 *     QuPath script -p project.qpproj run_patchcl.groovy
 *
 * To have it under Automate > Project scripts: `patchcl-qp scripts PROJECT`. The other two scripts must lie
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
import javafx.stage.Stage
import org.slf4j.Logger
import org.slf4j.LoggerFactory
import qupath.lib.gui.QuPathGUI
import qupath.lib.gui.dialogs.Dialogs
import qupath.lib.io.GsonTools
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String command = ''   // path of patchcl-qp; empty, or gone: it is looked for on PATH and in usual places
String what = 'ask'   // 'project': all images, 'image': this one, 'annotations': inside some of this one's;
                      // 'ask': with a window choose there, without: 'project'
List<String> within = []   // for 'annotations': classes, such as ['Tumor', 'Stroma']; empty: what is selected
List<String> options = []   // more for `patchcl-qp run`, such as ['--model', 'kidney', '--mpp', '0.25']
String folderName = 'patchcl'   // where patchcl-qp leaves its results, beside project.qpproj
// -------------------------------------------------------------------------

Logger logger = LoggerFactory.getLogger('run_patchcl')
boolean inWindow = QuPathGUI.getInstance() != null
def project = QP.getProject()
def entry = QP.getProjectEntry()
if (project == null || entry == null) {
    logger.warn('Open an image of a project first, or choose Run > Run for project.')
    return
}
if (inWindow && Platform.isFxApplicationThread()) {
    logger.warn('Run this from the script editor or the Automate menu: here it would freeze the window.')
    return
}
int batchIndex = (getBinding().getVariables()[ScriptAttributes.BATCH_INDEX] ?: 0) as int
int batchSize = (getBinding().getVariables()[ScriptAttributes.BATCH_SIZE] ?: 1) as int
if (what == 'ask')
    what = inWindow && batchSize == 1 ? ask(within) : 'project'
if (what == null)
    return   // the person closed the question
if (!(what in ['project', 'image', 'annotations']))
    throw new IllegalArgumentException("what = '${what}': it must be 'ask', 'project', 'image' or 'annotations'.")
if (what == 'annotations' && within.isEmpty() && !QP.getSelectedObjects().any { it.isAnnotation() })
    throw new IllegalStateException("Select annotations first, or name classes in 'within' at the top of this script.")

Path folder = Paths.get(QP.buildPathInProject(folderName))
Path receipt = folder.resolve('ran.json')
Path log = folder.resolve('run.log')
Instant began = Instant.now()
String status = 'done'
List<String> lastLines = []
if (what == 'project' && batchIndex > 0) {
    // One run is for all images of the project: that of the first image of this batch.
    def ran = Files.exists(receipt) ? JsonParser.parseString(Files.readString(receipt)).getAsJsonObject() : null
    if (ran?.get('qupath_pid')?.getAsLong() != ProcessHandle.current().pid())
        throw new IllegalStateException('patchcl-qp did not start: see the error of the first image.')
    began = Instant.parse(ran.get('began').getAsString())
} else {
    List<String> arguments = [findCommand(command, folder), 'run', project.getPath().toString()]
    arguments.addAll(['--backend', 'files', '--progress', 'json'])   // QuPath has the images open: it imports
    if (what != 'project') {
        runBeside('export_regions.groovy')   // and the stains, saved or not
        arguments.addAll(['--image', entry.getID()])
    }
    if (what == 'annotations')
        for (name in within ?: ['(selected)'])
            arguments.addAll(['--within', name])
    arguments.addAll(options)
    logger.info(arguments.join(' '))

    Files.createDirectories(folder)
    Follower follower = inWindow ? new WindowFollower(entry.getImageName()) : new Follower(logger)
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

// Also where a run failed: it fails for one image, the others are done. Some disks round times to 2 s.
Path result = folder.resolve('results').resolve(entry.getID()).resolve('result.json')
boolean found = Files.exists(result) && !Files.getLastModifiedTime(result).toInstant().isBefore(began.minusSeconds(2))
// In the window, what is added to an image that was closed meanwhile would be lost; a batch is saved by QuPath.
boolean shown = !inWindow || batchSize > 1 || getBinding().getVariables()[ScriptAttributes.BATCH_SAVE] ||
        QuPathGUI.getInstance().getImageData().is(QP.getCurrentImageData())
if (found && shown)
    runBeside('import_nuclei.groovy')
if (status == 'cancelled') {
    logger.info('Cancelled. Start it again, and it goes on where it was.')
    return
}
if (status == 'failed') {
    String message = "patchcl-qp failed; all that it said is in ${log}. Its last words:\n" + lastLines.join('\n')
    if (inWindow)
        Dialogs.showErrorMessage('PatchCL', message)
    throw new IOException(message)
}
if (!found)
    throw new IOException("No nuclei for ${entry.getImageName()}: see why in ${log}.")
if (inWindow && batchSize == 1) {
    String outcome = shown ? 'The nuclei are in the image: save it to keep them.' :
            "The nuclei of ${entry.getImageName()} are ready: open it again, and run import_nuclei.groovy."
    Dialogs.showInfoNotification('PatchCL', outcome +
            (what == 'project' ? ' For the others, run import_nuclei.groovy with Run > Run for project.' : ''))
}


/** What a person chooses; null for nothing. */
static String ask(List<String> within) {
    Map<String, String> choices = [
        'The open image'                : 'image',
        'All images of the project'     : 'project',
        (within ? "Annotations of class ${within.join(' or ')}".toString() : 'The selected annotations'): 'annotations',
    ]
    List<String> names = choices.keySet() as List
    return choices[Dialogs.showChoiceDialog('PatchCL', 'Find nuclei in', names, names.first())]
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

    WindowFollower(String imageName) {
        super(LoggerFactory.getLogger('run_patchcl'))
        area.setEditable(false)
        area.setStyle('-fx-font-family: monospace')
        bar.setMaxWidth(Double.MAX_VALUE)
        VBox.setVgrow(area, Priority.ALWAYS)
        Platform.runLater { open(imageName) }
    }

    private void open(String imageName) {
        Button button = new Button('Cancel')
        button.setOnAction { cancelInBackground(button) }
        VBox box = new VBox(8, label, bar, area, button)
        box.setPadding(new Insets(12))
        stage = new Stage()
        stage.initOwner(QuPathGUI.getInstance().getStage())
        stage.setTitle("PatchCL: ${imageName}")
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
