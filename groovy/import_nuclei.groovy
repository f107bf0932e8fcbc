/**
 * Shows the nuclei that `patchcl-qp run` found, in the open image; or, with 'Run > Run for project',
 * in every image chosen there.
 *
 * What an earlier import added is taken out first. Objects that a person drew or changed stay as
 * they are, nuclei that a person deleted stay deleted, and new nuclei in either place are left out.
 * So the script may be run as often as one likes. To have the deleted ones back: delete all nuclei,
 * then run it again.
 *
 * Each image gets a receipt, patchcl/imported/<image id>.json: without one, its import failed.
 * Without a window, images are saved at once:
 *
 *     QuPath script -p project.qpproj import_nuclei.groovy
 *
 * Needs QuPath 0.4 or later.
 */

import com.google.gson.JsonParser
import groovy.transform.CompileStatic
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.Paths
import java.nio.file.StandardCopyOption
import java.security.MessageDigest
import java.time.OffsetDateTime
import org.locationtech.jts.geom.Envelope
import org.locationtech.jts.index.strtree.STRtree
import org.slf4j.LoggerFactory
import qupath.lib.gui.QuPathGUI
import qupath.lib.io.GsonTools
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjectTools
import qupath.lib.roi.interfaces.ROI
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

// ---------------------------------------------------------------- settings
double maxOverlap = 0.5   // a new nucleus is left out if its IoU with a kept object is above this
String folderName = 'patchcl'   // where patchcl-qp leaves its results, beside project.qpproj
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
Path results = folder.resolve('results').resolve(entry.getID())
Path resultFile = results.resolve('result.json')
if (!Files.exists(resultFile)) {
    logger.warn("No nuclei for ${name}: run 'patchcl-qp run' on this project first (looked for ${resultFile}).")
    return
}

// Read everything before anything is changed: a damaged file must not cost the nuclei shown now.
def result = JsonParser.parseString(Files.readString(resultFile)).getAsJsonObject()
List<PathObject> nuclei = result.getAsJsonArray('files').collectMany { file ->
    PathIO.readObjects(results.resolve(file.getAsString()))
}
if (nuclei.size() != result.get('nuclei').getAsInt())
    throw new IOException("The results of ${name} are damaged: run 'patchcl-qp run' again (${results}).")

// What is here: nuclei of ours as we imported them, and everything else.
Map<String, List<String>> imported = readImported(imageData)
Set<PathObject> untouched = []
List<PathObject> kept = []
Set<String> keptIds = []
for (pathObject in imageData.getHierarchy().getAllObjects(false)) {
    String id = pathObject.getID().toString()
    boolean drawnWithin = pathObject.getChildObjects().any { !imported.containsKey(it.getID().toString()) }
    if (imported.containsKey(id) && imported[id][0] == digest(pathObject) && !drawnWithin)
        untouched << pathObject
    else {
        kept << pathObject
        keptIds << id
    }
}
// What a person decided about: of all that we imported, what is gone, and what is changed.
Set<String> decided = imported.keySet() - untouched.collect { it.getID().toString() }
boolean anyLeft = !untouched.isEmpty() || decided.any { it in keptIds }
if (!anyLeft)
    decided = []

def keptTree = new STRtree()
kept.collect { PathObjectTools.getROI(it, true) }.findAll { it?.isArea() }.each { keptTree.insert(envelope(it), it) }
def decidedTree = new STRtree()
decided.collect { imported[it] }.each { _, x, y ->
    double[] point = [x as double, y as double]
    decidedTree.insert(new Envelope(point[0], point[0], point[1], point[1]), point)
}
List<PathObject> added = nuclei.findAll {
    !(it.getID().toString() in decided) && !isOnPoint(it.getROI(), decidedTree) && !isOnObject(it.getROI(), keptTree, maxOverlap)
}

def hierarchy = imageData.getHierarchy()
hierarchy.getSelectionModel().deselectObjects(untouched)
hierarchy.removeObjects(untouched, true)
hierarchy.addObjects(added)
writeImported(imageData, imported.subMap(decided) + added.collectEntries {
    [it.getID().toString(), [digest(it), it.getROI().getCentroidX(), it.getROI().getCentroidY()]]
})
