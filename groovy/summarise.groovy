/**
 * Counts the nuclei in the 'PatchCL' annotations of the open image anew, as they are now; with 'Run > Run for project',
 * in every image chosen there. Run it after you drew, deleted or moved nuclei, or made cells of them. Without a window,
 * the images are saved at once:
 *
 *     QuPath script -p project.qpproj summarise.groovy
 *
 * Only the measurements of these annotations change. The script import_nuclei.groovy must lie beside this one.
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import org.slf4j.LoggerFactory
import qupath.lib.gui.QuPathGUI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
String folderName = 'patchcl'   // folder of patchcl-qp's results, beside project.qpproj
// -------------------------------------------------------------------------

def logger = LoggerFactory.getLogger('summarise')
def imageData = QP.getCurrentImageData()
def entry = QP.getProjectEntry()
if (imageData == null || entry == null) {
    logger.warn('Open an image of a project first, or choose Run > Run for project.')
    return
}

String own = getBinding().getVariables()[ScriptAttributes.FILE_PATH]
List<Path> places = [Paths.get(QP.buildPathInProject('scripts', 'import_nuclei.groovy'))]
if (own != null)
    places.add(0, Paths.get(own).resolveSibling('import_nuclei.groovy'))
Path script = places.find { Files.isRegularFile(it) }
if (script == null)
    throw new FileNotFoundException('import_nuclei.groovy must lie beside this script: ' +
            '`patchcl-qp scripts PROJECT` copies it.')
def importing = new GroovyClassLoader(getClass().getClassLoader())
        .parseClass(Files.readString(script), 'import_nuclei.groovy')

if (importing.isUnread(imageData, entry))
    throw new IOException("${entry.getImageName()}: " +
            importing.keepUnread(entry, Paths.get(QP.buildPathInProject(folderName, 'backups', entry.getID()))))
Path resultFile = Paths.get(QP.buildPathInProject(folderName, 'results', entry.getID(), 'result.json'))
def result = Files.exists(resultFile) ? JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject() : null
def regions = importing.summarise(imageData, entry, result)
if (regions.isEmpty()) {
    logger.warn("No 'PatchCL' annotation in ${entry.getImageName()}: run the script import_nuclei first.")
    return
}
boolean savedByQuPath = getBinding().getVariables()[ScriptAttributes.BATCH_SAVE]
if (!savedByQuPath && QuPathGUI.getInstance() == null)
    entry.saveImageData(imageData)
for (region in regions) {
    String density = Double.isNaN(region.per_mm2 as double) ? 'unknown number' :
            String.format(Locale.ROOT, '%.1f', region.per_mm2)
    logger.info("${entry.getImageName()}: ${region.name}: ${region.nuclei} nuclei, " +
            "${density} per mm^2 of ${region.is_tissue ? 'tissue' : 'region'}.")
}
