"""The Groovy scripts in a project, and run_patchcl.groovy run by a real QuPath without a window."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import qupath
from click.testing import CliRunner
from conftest import copy_sample

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.project import open_project, scripts
from patchcl_qupath.project.scripts import NAMES, copy_scripts, read_script

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"


def settings(script: Path, **values: str) -> None:
    """Change settings at the top of a script; values are Groovy."""
    text = script.read_text("utf-8")
    for name, value in values.items():
        text, count = re.subn(rf"(?m)^([\w<>]+ {name} = ).*", lambda m, v=value: m[1] + v, text)
        assert count == 1
    script.write_text(text, "utf-8")


def test_scripts_are_copied_with_the_path_of_the_command(tmp_path: Path) -> None:
    shutil.copy(SAMPLE / "project.qpproj", tmp_path)
    result = CliRunner().invoke(main, ["scripts", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Automate > Project scripts" in result.output
    assert sorted(path.name for path in (tmp_path / "scripts").iterdir()) == sorted(NAMES)
    text = (tmp_path / "scripts" / "run_patchcl.groovy").read_text("utf-8")
    command = Path(sys.executable).with_name("patchcl-qp")
    assert f"String command = '{command}'" in text
    copied = (tmp_path / "scripts" / "import_nuclei.groovy").read_bytes()
    assert copied == (ROOT / "groovy" / "import_nuclei.groovy").read_bytes()


def test_the_package_has_the_scripts_of_this_source_tree() -> None:
    """An editable install of another source tree fails here: `pip install -e .` in this one."""
    paths = sorted((ROOT / "groovy").glob("*.groovy"))
    assert {path.name for path in paths} == {*NAMES, "columns.groovy"}
    for path in paths:
        assert read_script(path.name) == path.read_text("utf-8")


def test_a_changed_script_is_kept(tmp_path: Path) -> None:
    project = tmp_path / "project.qpproj"
    changed = tmp_path / "scripts" / "run_patchcl.groovy"
    copy_scripts(project)
    assert all("is up to date" in line for line in copy_scripts(project))
    for text in ("mine", "mine again"):
        changed.write_text(text)
        done = copy_scripts(project)
        assert f"{changed} written" in done
    assert changed.with_name("run_patchcl.groovy.bak").read_text() == "mine"
    assert changed.with_name("run_patchcl.groovy.bak1").read_text() == "mine again"
    assert "PatchCL" in changed.read_text("utf-8")


@pytest.mark.parametrize("refused", ["read_text", "rename"])
def test_a_project_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    shutil.copy(SAMPLE / "project.qpproj", tmp_path)
    script = tmp_path / "scripts" / NAMES[0]
    script.parent.mkdir()
    script.write_text("of an earlier version")

    def refuse(path: Path, *_: Any, **__: Any) -> None:  # root may do all
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        if refused == "read_text":
            own = Path.read_text
            patched.setattr(
                Path, "read_text", lambda p, *a, **k: refuse(p) if p == script else own(p, *a, **k)
            )
        else:
            patched.setattr(Path, refused, refuse)
        result = CliRunner().invoke(main, ["scripts", str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: cannot write {script}: ")
    assert "copy the project to a folder that you can write to" in result.stderr
    assert script.read_text() == "of an earlier version"


@pytest.mark.parametrize("scheme", ["of Python", "of the user"])
def test_the_command_of_a_python_outside_of_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """On Windows, it is not beside Python, but in a folder of its own, or one of the user's."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    name = "patchcl-qp.exe" if os.name == "nt" else "patchcl-qp"
    folder = tmp_path / "Scripts"
    folder.mkdir()
    (folder / name).touch()
    paths = {"of Python": tmp_path / "none", "of the user": tmp_path / "none", scheme: folder}
    monkeypatch.setattr(scripts.sysconfig, "get_preferred_scheme", lambda kind: f"of the {kind}")
    monkeypatch.setattr(scripts.sysconfig, "get_path", lambda _, of="of Python": str(paths[of]))
    copy_scripts(tmp_path / "project.qpproj")
    text = (tmp_path / "scripts" / "run_patchcl.groovy").read_text("utf-8")
    assert re.search(r"String command = '.*Scripts.*patchcl-qp", text)


def test_a_windows_path_in_groovy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scripts, "_this_command", lambda: r"C:\it's\bin\patchcl-qp.exe")
    copy_scripts(tmp_path / "project.qpproj")
    text = (tmp_path / "scripts" / "run_patchcl.groovy").read_text("utf-8")
    assert r"String command = 'C:\\it\'s\\bin\\patchcl-qp.exe'" in text


def test_progress_for_programs(tmp_path: Path, model: pipeline.Model) -> None:
    folder = tmp_path / "project"
    copy_sample(folder)
    model.save(folder / "patchcl" / "models", "patchcl")
    options = ["--progress", "json", "--backend", "files", "--json"]
    result = CliRunner().invoke(main, ["run", str(folder), *options])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith('{"stage"')]
    steps = [json.loads(line) for line in lines]
    segmenting = [step for step in steps if "segmenting" in step["stage"]]
    assert segmenting[-1]["done"] == segmenting[-1]["total"] == len(segmenting) - 1 > 1
    assert json.loads(result.stdout)["images"][0]["nuclei"] > 0


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two images, with the scripts, in a folder of an unfriendly name."""
    qupath.launcher()
    project = qupath.make_project(tmp_path / "ein Projekt, $ü", SLIDE, ["one.svs", "zwei ö.svs"])
    copy_scripts(project)
    return project


def receipt(project: Path) -> dict[str, Any]:
    ran: dict[str, Any] = json.loads((project.parent / "patchcl" / "ran.json").read_text("utf-8"))
    return ran


@pytest.mark.qupath
def test_qupath_runs_patchcl_once_and_shows_all_images(
    project: Path, model: pipeline.Model
) -> None:
    output = project.parent / "patchcl"
    model.save(output / "models", "patchcl")
    log = qupath.run_script(project, project.parent / "scripts" / "run_patchcl.groovy")
    assert "ERROR" not in log, log
    ran = receipt(project)
    assert (ran["status"], ran["exit_status"]) == ("done", 0)
    assert ran["command"][0] == str(Path(sys.executable).with_name("patchcl-qp"))
    assert "zwei ö.svs: segmenting: " in log
    assert log.count("Nuclei are written to files") == 1
    assert "zwei ö.svs" in (output / "run.log").read_text("utf-8")
    for number in ("1", "2"):
        imported = json.loads((output / "imported" / f"{number}.json").read_text("utf-8"))
        result = json.loads((output / "results" / number / "result.json").read_text("utf-8"))
        assert imported["added"] == result["nuclei"] > 100
        assert (project.parent / "data" / number / "data.qpdata").stat().st_size > 10_000

    script = project.parent / "scripts" / "run_patchcl.groovy"
    for fails in (False, True):  # a run with nothing to do; and one that says nothing of the images
        for folder in ("data", "patchcl/imported"):
            shutil.rmtree(project.parent / folder, ignore_errors=True)
        for result_file in output.glob("results/*/result.json"):
            os.utime(result_file, (1e9, 1e9))  # of an earlier day
        if fails:
            command = project.with_name("failing")
            write_failing(command)
            settings(script, command=f"'{command}'")
        log = qupath.run_script(project, script)
        assert ("Nothing to do for 2 images" in log, "ERROR" in log) == (not fails, fails), log
        imported_now = [path.name for path in output.glob("imported/*.json")]
        assert sorted(imported_now) == ([] if fails else ["1.json", "2.json"])


# What a person does in the ROIs of the image named WHERE.
CORRECT = """
def corrected = qupath.lib.objects.classes.PathClass.fromString('PatchCL: corrected')
if (qupath.lib.scripting.QP.getProjectEntry().getImageName() == 'WHERE')
    for (drawn in qupath.lib.scripting.QP.getAnnotationObjects())
        if (drawn.getPathClass()?.toString() == 'PatchCL: correct here')
            drawn.setPathClass(corrected)
"""
SAVE = """
def entry = qupath.lib.scripting.QP.getProjectEntry()
entry.saveImageData(qupath.lib.scripting.QP.getCurrentImageData())
"""


@pytest.mark.qupath
def test_rois_are_suggested_and_refine_the_model(project: Path, model: pipeline.Model) -> None:
    """Also from corrections that are not saved yet, in the image that the script runs for."""
    output = project.parent / "patchcl"
    model.save(output / "models", "patchcl")
    content = json.loads(project.read_text("utf-8"))
    copy = Path(shutil.copy(SLIDE, project.with_name("zwei.svs")))  # another slide has ROIs, too
    content["images"][1]["serverBuilder"]["uri"] = copy.as_uri()
    project.write_text(json.dumps(content), "utf-8")
    quick = project.parent / "quick.toml"
    quick.write_text("[cdcl]\nsteps = 4\ndistillation_steps = 4\n", "utf-8")
    script = project.parent / "scripts" / "run_patchcl.groovy"
    found = CliRunner().invoke(main, ["run", str(project), "--backend", "files"])
    assert found.exit_code == 0, found.output

    settings(script, what="'suggest'", options="[suggest: ['--rois', '2']]")
    log = qupath.run_script(project, script)
    assert "ERROR" not in log, log
    assert receipt(project)["command"][1:] == [
        *("suggest", str(project), "--backend", "files", "--rois", "2")
    ]
    assert log.count("ROIs are marked in files") == 1
    for number in ("1", "2"):
        imported = json.loads((output / "imported" / f"{number}.json").read_text("utf-8"))
        rois = json.loads((output / "fields" / f"{number}.json").read_text("utf-8"))["fields"]
        assert imported["fields"] == len(rois) == 1

    by_hand = project.parent / "by_hand.groovy"
    by_hand.write_text(CORRECT.replace("WHERE", "zwei ö.svs") + SAVE, "utf-8")
    qupath.run_script(project, by_hand)
    settings(script, what="'refine'", options=f"[refine: ['--config', '{quick}']]")
    script.write_text(CORRECT.replace("WHERE", "one.svs") + script.read_text("utf-8"), "utf-8")
    log = qupath.run_script(project, script)
    assert "ERROR" not in log, log
    ran = receipt(project)
    assert (ran["status"], ran["command"][1]) == ("done", "refine")
    assert log.count("export_labels - one.svs: 1 ROIs") == 1
    assert log.count("export_labels - zwei ö.svs: 1 ROIs") == 1
    assert log.count("refining the segmentation network: 12 of 12") == 1
    assert (output / "models" / "refined.pt").exists()


# Prints its arguments and one of its environment variables, and fails.
COMMAND = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ["PYTHONUTF8"]]))
print(json.dumps({{"stage": "künstlich", "done": 2, "total": 2}}), file=sys.stderr)
sys.exit("zu spät")
"""


def write_failing(command: Path) -> None:
    """Write ``COMMAND`` as a program."""
    command.write_text(COMMAND, "utf-8")
    command.chmod(0o755)


DRAW = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.scripting.QP

def square = ROIs.createRectangleROI(10, 20, 300, 400, ImagePlane.getDefaultPlane())
def drawn = PathObjects.createAnnotationObject(square, PathClass.fromString('Größe, 1'))
QP.getCurrentHierarchy().addObject(drawn)
"""


@pytest.mark.qupath
@pytest.mark.parametrize("on_path", [False, True])
def test_a_failed_run_is_reported(
    project: Path, monkeypatch: pytest.MonkeyPatch, on_path: bool
) -> None:
    command = project.parent / "ein Befehl, ü"
    if on_path:  # as on Windows, where the folders of PATH may stand in quotes
        command = project.parents[1] / "two words" / "patchcl-qp"
        command.parent.mkdir()
        monkeypatch.setenv("PATH", f'"{command.parent}"{os.pathsep}{os.environ["PATH"]}')
    write_failing(command)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    script.write_text(DRAW + script.read_text("utf-8"), "utf-8")
    refined = project.parent / "patchcl" / "models" / "refined.pt"
    refined.parent.mkdir(parents=True)
    refined.touch()
    settings(
        script,
        command="''" if on_path else f"'{command}'",
        what="'annotations'",
        within="['Größe, 1', 'Other']",
        options="[run: ['--mpp', '0.25 µm']]",
    )
    log = qupath.run_script(project, script)
    assert log.count("patchcl-qp failed. The end of its output:\n\n") >= 2
    assert "run_patchcl - künstlich: 2 of 2" in log
    output = (project.parent / "patchcl" / "run.log").read_text("utf-8").splitlines()
    arguments, utf8 = json.loads(output[0])
    assert arguments == [
        *("run", str(project), "--backend", "files", "--progress", "json", "--image", "id:2"),
        *("--within", "Größe, 1", "--within", "Other", "--model", "refined", "--mpp", "0.25 µm"),
    ]
    assert utf8 == "1"
    assert output[1:] == ["zu spät"]
    ran = receipt(project)
    assert (ran["status"], ran["exit_status"], ran["last_lines"][-1]) == ("failed", 1, "zu spät")
    assert not (project.parent / "patchcl" / "imported").exists()
    regions = sorted(path.name for path in (project.parent / "patchcl" / "regions").iterdir())
    assert regions == ["1.geojson", "2.geojson"]
    stains = sorted(path.name for path in (project.parent / "patchcl" / "stains").iterdir())
    assert stains == ["1.json", "2.json"]


STAIN = """
import qupath.lib.color.ColorDeconvolutionStains
import qupath.lib.images.ImageData

imageData.setImageType(ImageData.ImageType.BRIGHTFIELD_H_E)
imageData.setColorDeconvolutionStains(ColorDeconvolutionStains.parseColorDeconvolutionStainsArg(
    '{"Name": "of a person", "Stain 1": "Hematoxylin", "Values 1": "0.6 0.7 0.3873", ' +
    '"Stain 2": "Eosin", "Values 2": "0.2 0.9 0.3873", "Background": "240 241 242"}'))
entry.saveImageData(imageData)
'1'
"""


@pytest.mark.qupath
def test_a_run_of_all_images_has_their_stains(project: Path, session: qupath.Session) -> None:
    """Those that are saved, as a run of one image has; a lost slide does not stop the others."""
    session.run(project, STAIN)
    content = json.loads(project.read_text("utf-8"))
    lost = json.loads(json.dumps(content["images"][1]))
    lost["entryID"], lost["imageName"] = 3, "lost.svs"
    lost["serverBuilder"]["uri"] = (project.parent / "lost.svs").as_uri()
    content["images"].insert(1, lost)
    project.write_text(json.dumps(content), "utf-8")
    data = project.parent / "data"
    shutil.copytree(data / "2", data / "3")
    command = project.parent / "failing"
    write_failing(command)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    settings(script, command=f"'{command}'")
    with pytest.raises(AssertionError, match="patchcl-qp failed") as failed:  # as it was told to
        qupath.run_script(project, script, "-i", "one.svs")
    assert receipt(project)["command"][1] == "run"
    found = open_project(project, "files")
    for entry in found.images():
        if entry.name != "lost.svs":
            stained = found.with_stains(entry)
            assert stained.note is None
            assert stained.stains is not None
            assert stained.stains.background == (240, 241, 242)
            assert stained.stains.vectors[0] == pytest.approx((0.6, 0.7, 0.3873), abs=1e-3)
    assert "lost.svs: its annotations and stains cannot be read: " in str(failed.value)


# Batches of the project in one QuPath: of images by their indices, and what each of them says.
BATCHES = """
import qupath.lib.scripting.QP
import qupath.lib.scripting.ScriptAttributes

if (entry.getImageName() != 'one.svs')
    return '[]'
def project = qupath.lib.projects.ProjectIO.loadProject(
        new File('PROJECT'), java.awt.image.BufferedImage)
def script = new File('SCRIPT')
def batch = { List<Integer> indices ->
    indices.collect { index ->
        def variables = [(ScriptAttributes.FILE_PATH): script.path,
                         (ScriptAttributes.BATCH_SIZE): 2, (ScriptAttributes.BATCH_INDEX): index]
        QP.setBatchProjectAndImage(project, project.getImageList()[index].readImageData())
        try {
            new GroovyShell(getClass().getClassLoader(), new Binding(variables)).evaluate(script)
            'done'
        } catch (Exception e) {
            e.getMessage()
        } finally {
            QP.resetBatchProjectAndImage()
        }
    }
}
def lines = [batch([0, 1]), batch([1])]
new File(script.parentFile, 'export_regions.groovy').delete()
groovy.json.JsonOutput.toJson(lines << batch([0, 1]))
"""


@pytest.mark.qupath
def test_an_image_has_the_outcome_of_its_own_batch(project: Path, session: qupath.Session) -> None:
    """Not of the batch before in the same QuPath, where the first image fails before the run."""
    command = project.parent / "failing"
    write_failing(command)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    settings(script, command=f"'{command}'")
    batches = BATCHES.replace("PROJECT", str(project)).replace("SCRIPT", str(script))
    both, (lost,), failing = session.run(project, batches)["one.svs"]
    assert both[0].startswith("patchcl-qp failed.")
    assert both[1].startswith("No nuclei for zwei ö.svs: ")
    assert lost.startswith("patchcl-qp failed.")  # where the slide of the first image is lost
    assert failing[0].startswith("export_regions.groovy must lie beside this script")
    assert failing[1] == "patchcl-qp did not start: see the error of the first image."


ROI = (
    qupath.DRAW_RECTANGLES
    + """
draw('done', 'PatchCL: corrected', 20, 20, 200, 200)
draw('nucleus', 'Nucleus', 50, 50, 15, 15)
entry.saveImageData(imageData)
'1'
"""
)


@pytest.mark.qupath
def test_rois_are_exported_of_all_images_but_those_whose_slide_is_lost(
    project: Path, session: qupath.Session
) -> None:
    content = json.loads(project.read_text("utf-8"))
    last = json.loads(json.dumps(content["images"][1]))
    last["entryID"], last["imageName"] = 3, "last.svs"
    content["images"].append(last)
    project.write_text(json.dumps(content), "utf-8")
    session.run(project, ROI)
    content["images"][1]["serverBuilder"]["uri"] = (project.parent / "lost.svs").as_uri()
    project.write_text(json.dumps(content), "utf-8")
    log = qupath.run_script(
        project, project.parent / "scripts" / "export_labels.groovy", "-i", "one.svs"
    )
    labels = project.parent / "patchcl" / "labels"
    assert sorted(path.name for path in labels.iterdir()) == ["1.geojson", "3.geojson"]
    assert log.count("1 ROIs with 1 contours exported to") == 2
    assert "zwei ö.svs: its ROIs were not exported: " in log


# The scripts' own functions, and a run of a script for an image of the project, in one QuPath.
IN_QUPATH = (
    qupath.DRAW_RECTANGLES.replace("hierarchy", "image.getHierarchy()")
    + """
if (entry.getImageName() != 'one.svs')
    return '[]'
def project = qupath.lib.projects.ProjectIO.loadProject(
        new File('PROJECT'), java.awt.image.BufferedImage)
def loader = new GroovyClassLoader(getClass().getClassLoader())
def script = new File('FOLDER', 'run_patchcl.groovy')
def functions = loader.parseClass(script)
image = project.getImageList()[0].readImageData()
def run = { int index, int size ->
    def attributes = qupath.lib.scripting.ScriptAttributes
    def variables = [(attributes.FILE_PATH): script.path, (attributes.BATCH_SIZE): size,
                     (attributes.BATCH_INDEX): index]
    qupath.lib.scripting.QP.setBatchProjectAndImage(project, image)
    try {
        new GroovyShell(getClass().getClassLoader(), new Binding(variables)).evaluate(script)
    } catch (IOException e) {   // of the command, which fails
        e.getMessage()
    } finally {
        qupath.lib.scripting.QP.resetBatchProjectAndImage()
    }
}
"""
)


def in_qupath(session: qupath.Session, project: Path, script: str) -> Any:
    """What a Groovy script returns that sees ``IN_QUPATH``; 'found' is what it returns."""
    text = IN_QUPATH + script + "groovy.json.JsonOutput.toJson(found)"
    folder = str(project.parent / "scripts")
    text = text.replace("PROJECT", str(project)).replace("FOLDER", folder)
    return session.run(project, text)["one.svs"]


@pytest.mark.qupath
def test_a_run_of_all_images_has_their_annotations(project: Path, session: qupath.Session) -> None:
    """Those of the open image, saved or not, and those of others that were saved since."""
    session.run(
        project,
        qupath.DRAW_RECTANGLES
        + """
        draw('saved', 'Tumor', 20, 20, 200, 200)
        entry.saveImageData(imageData)
        '1'
        """,
    )
    regions = project.parent / "patchcl" / "regions"
    regions.mkdir(parents=True)
    square = {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]]}
    about = {"objectType": "annotation", "name": "earlier"}
    for name, old in [("(selected)", "2"), ("Tumor", "2")]:
        about["classification"] = {"name": name, "color": [1, 2, 3]}
        feature = {"type": "Feature", "geometry": square, "properties": dict(about)}
        file = regions / f"{old}.geojson"
        before = json.loads(file.read_text())["features"] if file.exists() else []
        file.write_text(json.dumps({"type": "FeatureCollection", "features": [*before, feature]}))
    os.utime(regions / "2.geojson", (0, 0))
    command = project.parent / "failing"
    write_failing(command)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    settings(script, command=f"'{command}'", what="'project'")
    failed = in_qupath(
        session,
        project,
        """
        draw('not saved', 'Tumor', 300, 20, 200, 200)
        def found = run(0, 1)
        """,
    )
    assert failed.startswith("patchcl-qp failed.")
    exported = [
        sorted(
            (f["properties"]["classification"]["name"], f["properties"].get("name"))
            for f in json.loads((regions / f"{number}.geojson").read_text("utf-8"))["features"]
        )
        for number in (1, 2)
    ]
    assert exported[0] == [("Tumor", "not saved"), ("Tumor", "saved")]
    assert exported[1] == [("(selected)", "earlier"), ("Tumor", "saved")]


@pytest.mark.qupath
def test_suggested_rois_of_images_of_one_name_are_listed(
    project: Path, session: qupath.Session
) -> None:
    for number, count in [("1", 2), ("2", 3)]:
        file = project.parent / "patchcl" / "fields" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"fields": [{}] * count}), "utf-8")
    steps = in_qupath(
        session,
        project,
        """
        project.getImageList()*.setImageName('equal')
        def task = loader.loadClass('Task').getDeclaredConstructor().newInstance()
        task.project = project
        task.entry = project.getImageList()[1]
        task.folder = java.nio.file.Paths.get('PROJECT').resolveSibling('patchcl')
        def found = functions.correctionSteps(task, true)
        """,
    )
    assert "equal: 2\nequal: 3\n\nIn other images, the script import nuclei shows them." in steps


@pytest.mark.qupath
def test_classes_are_found_however_they_are_written(project: Path, session: qupath.Session) -> None:
    """A name from macOS has letters of two parts, one from a command whole ones."""
    found = in_qupath(
        session,
        project,
        """
        def parts = java.text.Normalizer.normalize('Größe', java.text.Normalizer.Form.NFD)
        draw('mine', parts, 20, 20, 200, 200)
        draw('other', 'Tumor', 20, 20, 200, 200)
        def task = loader.loadClass('Task').getDeclaredConstructor().newInstance()
        task.what = 'annotations'
        task.within = ['Größe']
        task.imageData = image
        def importing = loader.parseClass(new File('FOLDER', 'import_nuclei.groovy'))
        def names = com.google.gson.JsonParser.parseString('["Größe"]').getAsJsonArray()
        def both = [functions.regionsOf(task), importing.drawnOf(names, image)]
        def found = both*.collect { it.getName() }
        """,
    )
    assert found == [["mine"], ["mine"]]


@pytest.mark.qupath
def test_rois_of_all_images_are_exported_where_the_first_cannot_be_opened(
    project: Path, session: qupath.Session
) -> None:
    """Then the script runs for the second one of the batch first."""
    session.run(project, ROI)
    command = project.parent / "failing"
    write_failing(command)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    settings(script, command=f"'{command}'", what="'refine'")
    in_qupath(
        session,
        project,
        """
        image = project.getImageList()[1].readImageData()
        def found = run(1, 2)
        """,
    )
    labels = project.parent / "patchcl" / "labels"
    assert sorted(path.name for path in labels.iterdir()) == ["1.geojson", "2.geojson"]
