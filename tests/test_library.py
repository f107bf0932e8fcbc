"""The library's functions do what their examples show."""

import doctest
import json
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import shapely
import torch
from click.testing import CliRunner
from conftest import ROOT, copy_sample
from exported import AREAS, make_project, nuclei, rows_of, write
from PIL import Image
from slides import write_tiff

import patchcl_qupath
from patchcl_qupath import library, pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.config import Config, from_dict
from patchcl_qupath.datatypes import Corrections
from patchcl_qupath.errors import ConfigError, ImageError, ModelError, ProjectError
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.pipeline import Run

FUNCTIONS = [name for name in patchcl_qupath.__all__ if name != "Config"]


def test_all_functions_are_offered_and_documented() -> None:
    assert sorted(patchcl_qupath.__all__) == patchcl_qupath.__all__
    for name in FUNCTIONS:
        function = getattr(patchcl_qupath, name)
        assert function is getattr(library, name)
        assert ">>>" in function.__doc__, f"{name} has no example"
    assert set(patchcl_qupath.__all__) <= set(dir(patchcl_qupath))
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        _ = patchcl_qupath.magic


@pytest.fixture
def fine_model() -> Model:
    """A model of 0.25 µm/px that learnt nothing, with settings of its own for runs."""
    config = from_dict({"slide": {"mpp": 0.25, "stain": "h-dab"}, "segment": {"min_area_um2": 4}})
    return Model(network=NucleusNetwork((16, 24, 40)).eval(), config=config)


def test_a_model_runs_at_its_own_resolution(folder, fine_model, monkeypatch) -> None:
    configs: list[Config] = []
    monkeypatch.setattr(Run, "images", lambda self, _: configs.append(self.config) or iter(()))
    project = library.open_project(folder)
    cells = {"cells": {"expand_um": 5}}
    for settings in (None, cells, cells | {"slide": {"tile_px": 512}}):
        library.segment(project, fine_model, settings=settings, workers=1)
    assert [config.slide.mpp for config in configs] == [0.25] * 3
    assert [config.cells.expand_um for config in configs] == [0, 5, 5]
    assert configs[2].slide.tile_px == 512
    for config in configs:  # dictionaries change no other settings of the model
        assert (config.slide.stain, config.segment.min_area_um2) == ("h-dab", 4)
    for other in (Config(), {"slide": {"mpp": 0.5}}):
        with pytest.raises(ConfigError, match=r"trained at 0.25 µm/px, .* 0.5: leave slide.mpp"):
            library.segment(project, fine_model, settings=other, workers=1)
    assert len(configs) == 3


def test_the_name_of_a_refined_model_is_checked_before_it_is_trained(folder, fine_model) -> None:
    project = library.open_project(folder)
    with pytest.raises(ConfigError, match="a model cannot be named"):
        library.refine(project, fine_model, "a/b")
    path = fine_model.save(project.layout.model("fine").parent, "fine")
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(ConfigError, match="give the refined model another name than fine"):
            library.refine(project, fine_model, "fine")
        assert path.read_bytes() == before
        path.with_suffix(".json").unlink(missing_ok=True)  # as of a model that was copied here


def test_notes_on_corrections_are_warnings(folder, fine_model, monkeypatch) -> None:
    project = library.open_project(folder)
    (entry,) = project.images()
    found = {entry.id: Corrections(notes=("its ROIs are old", "and few"))}
    monkeypatch.setattr(pipeline, "refine_as", lambda *_: (fine_model, found))
    with pytest.warns(UserWarning, match="its ROIs are old|and few") as warned:
        assert library.refine(project, fine_model) is fine_model
    expected = [f"{entry.name}: its ROIs are old", f"{entry.name}: and few"]
    assert [str(each.message) for each in warned] == expected
    assert {each.filename for each in warned} == {__file__}


def test_a_text_is_one_class_and_one_image(folder, fine_model, monkeypatch) -> None:
    seen: list[tuple[tuple[str, ...], list[str]]] = []

    def images(run: Run, entries: Any) -> Any:
        seen.append((run.region_classes, [entry.name for entry in entries]))
        return iter(())

    monkeypatch.setattr(Run, "images", images)
    project = library.open_project(folder)
    name = project.images()[0].name
    library.segment(project, fine_model, name, "Tumor", workers=1)
    library.segment(project, fine_model, [name], ["Tumor"], workers=1)
    library.segment(project, fine_model, [name], ["Tumor", "Stroma", "Tumor"], workers=1)
    assert seen == [(("Tumor",), [name])] * 2 + [(("Stroma", "Tumor"), [name])]


def test_a_command_refuses_a_model_of_another_resolution(folder, fine_model) -> None:
    project = library.open_project(folder)
    fine_model.save(project.layout.model("fine").parent, "fine")
    result = CliRunner().invoke(main, ["run", str(folder), "--model", "fine"])
    assert result.exit_code == 2
    assert (
        "the model fine was trained at 0.25 µm/px, the settings ask for 0.5: pass --retrain, or "
        "--model with the name of another" in result.output
    )


def test_nuclei_of_one_of_two_images_of_a_name_are_read_by_its_id(folder) -> None:
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    (first,) = content["images"]
    content["images"].append(first | {"entryID": 7})
    path.write_text(json.dumps(content), "utf-8")
    project = library.open_project(folder)
    name = first["imageName"]
    with pytest.raises(ProjectError, match=rf"^2 images are named {name}: pass an id \(1, 7\)$"):
        library.read_nuclei(project, name)
    with pytest.raises(ImageError, match="has no nuclei: segment it first"):
        library.read_nuclei(project, "7")
    with pytest.raises(ProjectError, match="no image other"):
        library.read_nuclei(project, "other")


def test_reading_functions_see_a_project_that_was_changed_since_it_was_opened(tmp_path) -> None:
    """An image was renamed in QuPath, between two cells of a notebook."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    project.path.write_text(project.path.read_text("utf-8").replace("a.svs", "new.svs"), "utf-8")
    assert library.read_nuclei(project, "new.svs").num_rows == len(AREAS)
    (table,) = library.export(project)
    assert {row["Image"] for row in rows_of(table)} == {"new.svs"}
    truth = tmp_path / "new.geojson"
    truth.write_text(shapely.to_geojson(shapely.box(95, 95, 105, 105)))
    (scored,) = library.score(project, truth)
    (status,) = library.project_status(project)
    assert scored.image == status.image == "new.svs"
    assert "new.svs" in library.write_report(project).read_text("utf-8")


def test_what_a_command_notes_is_a_warning_of_the_caller(tmp_path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs", "c.svs"])
    write(project, 0, nuclei("a"))
    write(project, 1, nuclei("b"), run="another")
    with pytest.warns() as caught:
        (table,) = library.export(project)
    assert {row["Image"] for row in rows_of(table)} == {"a.svs", "b.svs"}
    left_out, runs = (str(warning.message) for warning in caught)
    assert left_out == "left out: c.svs has no nuclei: segment it first"
    assert runs.startswith("nuclei of these images are of 2 runs")
    truth = tmp_path / "truth"
    truth.mkdir()
    (truth / "b.geojson").write_text(shapely.to_geojson(shapely.box(95, 95, 105, 105)))
    with pytest.warns(UserWarning, match=r"^without ground truth, left out: a\.svs, c\.svs$") as of:
        (scored,) = library.score(project, truth)
    assert scored.image == "b.svs"
    assert {warning.filename for warning in [*caught, *of]} == {__file__}


@pytest.mark.parametrize("mpp", [0, -0.5, float("nan"), float("inf"), "0.5", True, (0.5, 0.5)])
def test_a_pixel_size_is_a_length(tmp_path, mpp) -> None:
    slide = ROOT / "sample_project" / "CMU-1-Small-Region.svs"  # which has one itself
    message = f"mpp is a number of µm above 0, not {re.escape(repr(mpp))}"
    with pytest.raises(ConfigError, match=message):
        library.create_project(tmp_path / "project", slide, mpp=mpp)
    assert not (tmp_path / "project").exists()


def test_a_pixel_size_may_be_of_numpy(tmp_path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    project = library.create_project(tmp_path / "project", tmp_path / "a.png", np.float32(0.25))
    assert [image.mpp for image in project.images()] == [(0.25, 0.25)]


def test_settings_and_names_of_another_type_are_an_error_of_one_line(folder, fine_model) -> None:
    project = library.open_project(folder)
    for call in (library.train, partial(library.segment, model=fine_model)):
        with pytest.raises(ConfigError, match=r"not 'settings.toml': read those of a file"):
            call(project, settings="settings.toml")
        with pytest.raises(ConfigError, match="5 is no name, nor several: pass text"):
            call(project, images=5)


def test_threads_that_begin_after_a_run_have_all_cores(tmp_path) -> None:
    """Torch has one number for all threads to come, and tiles are segmented with 1."""
    pixels = np.random.default_rng(0).integers(60, 200, (400, 400, 3)).astype(np.uint8)
    slide = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5))
    project = library.create_project(tmp_path / "project", [slide])
    model = Model(network=NucleusNetwork((16, 24, 40)).eval(), config=Config())
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        (outcome,) = library.segment(project, model, workers=2)
        assert outcome.problem is None
        assert outcome.tiles > 0
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(torch.get_num_threads).result() == 3
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_damaged_nuclei_are_an_error_of_one_line(tmp_path) -> None:
    """Also of a block within the file, of which Arrow would make measurements of 0."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    path = project.layout.nuclei("1")
    content = path.read_bytes()
    areas = np.float32(AREAS).tobytes()
    assert areas in content
    for damaged in (content.replace(areas, bytes(len(areas))), content[:-1], b""):
        path.write_bytes(damaged)
        with pytest.raises(ImageError) as raised:
            library.read_nuclei(project, "a.svs")
        (line,) = str(raised.value).splitlines()
        assert re.fullmatch(
            rf"a\.svs: {re.escape(str(path))} is damaged \(.+\): remove it and run again", line
        )


def test_examples_run(tmp_path, monkeypatch) -> None:
    """In the order of the module, each with what those before it left."""
    copy_sample(tmp_path / "sample_project")
    monkeypatch.chdir(tmp_path)
    truth = tmp_path / "ground_truth"
    truth.mkdir()
    nucleus = shapely.box(100, 100, 120, 120)
    (truth / "CMU-1-Small-Region.geojson").write_text(shapely.to_geojson(nucleus))
    names = {"pq": patchcl_qupath}
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    parser = doctest.DocTestParser()
    order = sorted(FUNCTIONS, key=lambda name: getattr(library, name).__code__.co_firstlineno)
    for name in order:
        text = getattr(library, name).__doc__
        example = parser.get_doctest(text, names, name, library.__file__, 0)
        runner.run(example, clear_globs=False)
        names = example.globs
    assert runner.summarize().failed == 0


def test_what_cannot_be_meant_is_said(folder, fine_model) -> None:
    project = library.open_project(folder)
    with pytest.raises(ModelError, match=r"no model refined in .* makes this one of corrected"):
        library.load_model(project, "refined")
    with pytest.raises(ConfigError, match=r"^'patchcl' is not a model: pass pq\.load_model\("):
        library.segment(project, "patchcl")
    with pytest.raises(ConfigError, match="workers are 1 or more, not 0"):
        library.segment(project, fine_model, workers=0)
    assert repr(fine_model) == f"<Model NucleusNetwork {fine_model.digest[:12]}>"


def test_a_text_is_one_image_of_a_new_project(tmp_path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    slide = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5))
    for number, images in enumerate((slide, str(slide), [slide])):
        project = library.create_project(tmp_path / str(number), images)
        assert [image.path for image in project.images()] == [slide]


def test_regions_that_were_not_exported_can_be_left_out(folder, fine_model) -> None:
    settings = {"result": {"summarise": ["Tumor"]}}
    project = library.open_project(folder)
    (outcome,) = library.segment(project, fine_model, settings=settings, workers=1)
    assert "its annotations were not exported" in outcome.problem
    assert outcome.problem.endswith("then run again; or leave out --summarise")
