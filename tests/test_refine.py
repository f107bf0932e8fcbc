"""CDCL's losses worked by hand; corrected fields as lessons; and what a model learns from them."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from click.testing import CliRunner
from slides import scene, write_tiff
from test_selftrain import nuclei_images

from patchcl_qupath import cli, pipeline
from patchcl_qupath.config import CDCLConfig, Config
from patchcl_qupath.correction import labels as fields
from patchcl_qupath.datatypes import Corrections, ImageEntry
from patchcl_qupath.errors import ConfigError, ImageError, TrainingError
from patchcl_qupath.evaluation.metrics import aji
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.slides.prepare import prepare
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training import cdcl, selftrain
from patchcl_qupath.training.supervision import targets

SAMPLE = Path(__file__).parent.parent / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"
CONFIG = CDCLConfig()


# ---------------------------------------------------------------- losses


def test_consistency_asks_only_where_the_teacher_is_sure():
    said = torch.tensor([0.95, 0.02, 0.6, 0.4]).view(1, 1, 1, 4)
    logits = torch.tensor([2.0, -1.0, -9.0, 9.0]).view(1, 1, 1, 4)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert cdcl.consistency(logits, said, CONFIG).item() == pytest.approx(expected)
    assert cdcl.consistency(logits, 0 * said + 0.5, CONFIG).item() == 0


def test_entropy_is_that_of_a_coin():
    assert cdcl.entropy(torch.zeros(3)).item() == pytest.approx(math.log(2))
    assert cdcl.entropy(torch.tensor([30.0, -30.0])).item() == pytest.approx(0, abs=1e-6)


def test_contrast_of_a_case_worked_by_hand():
    """One patch of nucleus, one of none, one of both, which is no anchor; a bank of one each."""
    points = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), dim=1)
    taught = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.2, 1], [1, 1]]), dim=1)
    share = torch.tensor([1.0, 0.0, 0.5])
    bank = cdcl.MemoryBank(CONFIG)
    assert cdcl.contrast(points, taught, share, bank, CONFIG).item() == 0  # nothing to differ from
    torch.testing.assert_close(bank.points(True), taught[:1])
    torch.testing.assert_close(bank.points(False), taught[1:2])

    loss = cdcl.contrast(points, taught, share, bank, CONFIG)
    terms = []
    for own, other in ((0, 1), (1, 0)):
        alike = float(points[own] @ taught[own]) / 0.1
        unlike = float(points[own] @ taught[other]) / 0.1
        terms.append(math.log(1 + math.exp(unlike - alike)))
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-2)
    assert bank.points(True).shape == (2, 2)


def test_bank_forgets_the_oldest():
    bank = cdcl.MemoryBank(replace(CONFIG, bank_steps=2, bank_patches=3))
    for step in range(4):
        bank.add(torch.full((5, 2), float(step)), is_nucleus=True)
    bank.add(torch.zeros(0, 2), is_nucleus=True)
    assert bank.points(True)[:, 0].tolist() == [2, 2, 2, 3, 3, 3]
    assert bank.points(False) is None


def test_patches_are_unit_vectors_in_the_order_of_their_shares():
    coarse = torch.zeros(2, 3, 4, 6)
    coarse[0, 0], coarse[1, 1] = 5, 7
    coarse[1, :, :2, 4:] = torch.tensor([0.0, 0, 3]).view(3, 1, 1)
    found = cdcl.patches(coarse, CONFIG)  # of 8 px: 2 x 2 of the coarse map
    assert found.shape == (2 * 2 * 3, 3)
    assert found[:6].argmax(dim=1).tolist() == [0] * 6
    assert found[6:].argmax(dim=1).tolist() == [1, 1, 2, 1, 1, 1]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))


# ---------------------------------------------------------------- what is learnt


def test_corrections_teach_what_pseudo_labels_do_not_know():
    """In truth nuclei are the large discs alone; the model that it begins with takes small ones."""
    images, ground_truths = nuclei_images(6)
    normaliser = StainNormaliser.fit(images)
    large = []
    for ground_truth in ground_truths:
        area = np.bincount(ground_truth.ravel())
        keep = area >= np.median(area[1:])
        keep[0] = False
        large.append(np.where(keep[ground_truth], ground_truth, 0).astype(np.int32))
    config = replace(
        Config(),
        selftrain=replace(Config().selftrain, steps=120, widths=(8, 12, 16)),
        cdcl=replace(CONFIG, steps=80, learning_rate=3e-3, pseudo_weight=0.0),
    )
    training_samples = [
        (normaliser.apply(i), targets(t, t == 0))
        for i, t in zip(images, ground_truths, strict=True)
    ]
    network, _ = selftrain.teach(training_samples[:4], config.selftrain, 0, lambda *_: None)
    start = Model(network, config, 0, False, 0.5, {"loss": [1.0]})
    corrected = [(normaliser.apply(images[0]), targets(large[0], large[0] == 0))]
    said = []
    refined = cdcl.refine(start, corrected, training_samples[1:4], lambda *step: said.append(step))
    assert said[-1] == (80, 80)
    assert refined.training["refined_from"] == start.digest != refined.digest
    last = refined.training["cdcl"][-1]
    assert set(last) == {"labelled", "pseudo", "consistency", "entropy", "contrast"}
    assert all(math.isfinite(value) for value in last.values())

    def score(model):
        found = confidence(model, images[5], normaliser)
        labels = instances(found.nucleus, 0.5, config.segment, 0.5, found.core)
        return aji(labels, large[5])

    assert score(refined) > score(start)
    again = cdcl.refine(start, corrected, training_samples[1:4], lambda *step: None)
    assert again.digest == refined.digest


# ---------------------------------------------------------------- fields


FIELD = shapely.box(400, 500, 900, 1000)
INSIDE = shapely.Point(600, 700).buffer(15)
ACROSS = shapely.Point(900, 800).buffer(20)  # half of it in the field
OUTSIDE = shapely.Point(1200, 800).buffer(20)


def prepared():
    return prepare(ImageEntry("1", SLIDE.name, SLIDE), Config())


def test_a_field_knows_all_its_pixels_and_no_other():
    triangle = shapely.Polygon([(1000, 1000), (1600, 1000), (1000, 1600)])
    corrections = Corrections((FIELD, triangle), (INSIDE, ACROSS, OUTSIDE))
    (stains, target), (_, other) = fields.training_samples(prepared(), corrections)
    nucleus, core, known = np.moveaxis(target, -1, 0)
    assert stains.shape == target.shape == (500, 500, 3)  # 0.499 um/px is read as it is
    assert known.all()
    expected = INSIDE.area + (ACROSS & FIELD).area
    assert nucleus.sum() == pytest.approx(expected, rel=0.01)
    assert nucleus[200, 200] == core[200, 200] == 1
    assert nucleus[200, 218] == 0
    assert other[..., 2].mean() == pytest.approx(0.5, abs=0.01)
    assert other[10, 10, 2] == 1
    assert other[-10, -10, 2] == 0
    assert not other[..., 0].any()


@pytest.mark.parametrize("field", [shapely.box(400, 500, 420, 900), shapely.box(-90, 0, -10, 90)])
def test_a_field_that_is_too_small_or_outside_is_refused(field):
    with pytest.raises(ImageError, match="less than 16 um wide, or outside the image"):
        fields.training_samples(prepared(), Corrections((field,), (INSIDE,)))


@pytest.mark.parametrize(
    ("nuclei", "agree"),
    [
        ((INSIDE, ACROSS), True),
        ((INSIDE.buffer(2), OUTSIDE), True),  # drawn by another hand; ACROSS is not in its field
        ((INSIDE.buffer(-8),), False),
        ((INSIDE, shapely.Point(520, 720).buffer(9)), False),
        ((shapely.Point(780, 700).buffer(15),), False),
    ],
)
def test_fields_of_two_images_of_one_slide_must_agree(nuclei, agree):
    one = prepared()
    # The second is cropped, and counts its pixels from there.
    two = replace(one, id="2", slide=replace(one.slide, origin=(100, 50)))
    moved = [shapely.transform(n, lambda xy: xy - (100, 50)) for n in nuclei]
    field = shapely.box(400, 600, 790, 850)
    labels = Corrections((FIELD,), (INSIDE, ACROSS))
    images = [(one, labels), (two, Corrections((field,), tuple(moved)))]
    for pair in (images, images[::-1]):
        if agree:
            fields.check_agreement(pair)
            continue
        said = rf"\(id {pair[0][0].id}\) and .*different nuclei at x"
        with pytest.raises(ImageError, match=said):
            fields.check_agreement(pair)
    aside = Corrections((shapely.box(900, 950, 1200, 1100),), (shapely.Point(1e3, 1e3).buffer(9),))
    fields.check_agreement([(one, labels), (two, aside)])


def feature(geometry, name, **more):
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "properties": {"objectType": "annotation", "classification": {"name": name}},
        **more,
    }


def export(folder, *features, image=1):
    file = folder / "patchcl" / "labels" / f"{image}.geojson"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def test_labels_are_read(folder):
    project = open_project(folder, "files")
    (entry,) = project.images()
    assert project.corrections(entry, "Done") == Corrections()
    cell = feature(shapely.Point(800, 900).buffer(30), "Tumor")
    cell["nucleusGeometry"] = json.loads(shapely.to_geojson(shapely.box(790, 890, 810, 910)))
    line = feature(shapely.LineString([(0, 0), (9, 9)]), "Nucleus")
    export(folder, feature(FIELD, "Done"), feature(INSIDE, "Nucleus"), cell, line)
    found = project.corrections(entry, "Done")
    assert [field.area for field in found.fields] == [FIELD.area]
    assert [round(nucleus.area) for nucleus in found.nuclei] == [round(INSIDE.area), 400]


@pytest.mark.parametrize(
    ("features", "says"),
    [
        ([feature(FIELD, "Done")], "the field at x 650, y 750 px has no nuclei"),
        ([feature(FIELD, "Done"), feature(OUTSIDE, "Nucleus")], "has no nuclei"),
        (
            [
                feature(FIELD, "Done"),
                feature(INSIDE, "Nucleus"),
                feature(shapely.Point(605, 700).buffer(12), None),
            ],
            r"two nuclei lie on each other at x 60\d, y 700 px \(1 such pairs\)",
        ),
        ([{"geometry": 1}], "is damaged: run groovy/export_labels.groovy"),
    ],
)
def test_labels_that_cannot_be_learnt_from_are_refused(folder, features, says):
    export(folder, *features)
    project = open_project(folder, "files")
    with pytest.raises(ImageError, match=says):
        project.corrections(project.images()[0], "Done")


def test_no_field_at_all_is_said(folder, model):
    project = open_project(folder, "files")
    with pytest.raises(TrainingError, match="no image has an annotation of class Done"):
        pipeline.refine(project, project.images(), model, "Done", lambda *_: None)


def test_a_model_of_patchcl_alone_is_refused(folder, model):
    project = open_project(folder, "files")
    alone = replace(model, network=ConfidenceNetwork.of(Config().patchcl))
    with pytest.raises(ConfigError, match="cannot be refined: train one with recipe"):
        pipeline.refine(project, project.images(), alone, "Done", lambda *_: None)


def test_refine_run_and_status_from_the_command_line(folder, model):
    """A model is refined beside the first, and either can be run."""
    model.save(folder / "patchcl" / "models", "patchcl")
    export(folder, feature(FIELD, "Done"), feature(INSIDE, "Nucleus"), feature(ACROSS, "Nucleus"))
    settings = folder / "settings.toml"
    settings.write_text("[cdcl]\nsteps = 6\n[patchcl]\ncrops = 4\n", "utf-8")

    def call(*arguments):
        result = CliRunner().invoke(cli.main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result

    before = (folder / "patchcl" / "models" / "patchcl.pt").read_bytes()
    said = call("refine", folder, "--labels-from", "Done", "--config", settings)
    assert "--model refined" in said.stdout
    assert (folder / "patchcl" / "models" / "patchcl.pt").read_bytes() == before
    call("run", folder, "--model", "refined")
    (row,) = json.loads(call("status", folder, "--json").stdout)["images"]
    assert (row["state"], row["model"]) == ("done", "refined")

    same = CliRunner().invoke(
        cli.main, ["refine", str(folder), "--labels-from", "A", "--as", "patchcl"]
    )
    assert same.exit_code == 2
    assert "another name" in same.output


def refused(folder, *options):
    """What `refine` says that it cannot do."""
    command = ["refine", str(folder), "--labels-from", "Done", *options]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1, result.output
    assert not (folder / "patchcl" / "models" / "refined.pt").exists()
    return result.output.splitlines()[-1]


def test_the_same_slide_twice_with_other_nuclei_is_refused(folder, model):
    model.save(folder / "patchcl" / "models", "patchcl")
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    content["images"].append({**content["images"][0], "entryID": 2, "imageName": "again.svs"})
    path.write_text(json.dumps(content), "utf-8")
    export(folder, feature(FIELD, "Done"), feature(INSIDE, "Nucleus"))
    export(folder, feature(FIELD, "Done"), feature(ACROSS, "Nucleus"), image=2)
    said = refused(folder)
    assert f"Error: {SLIDE.name} (id 1) and again.svs (id 2) show the same slide" in said
    assert "have different nuclei at x 600, y 700 px" in said
    assert "delete the field in one of the two, or leave one out" in said


@pytest.mark.parametrize(
    ("mpp", "option", "says"),
    [
        (1.0, (), "has 1 um/px, too coarse for fields of labels: the model reads 0.5 um/px"),
        (None, ("--mpp", "0.8"), "has 0.8 um/px, too coarse"),
        (None, (), "has no pixel size: set it in QuPath"),
        (352.8, (), "has a pixel size of 352.8 µm, which cannot be: set it in QuPath"),
    ],
)
def test_fields_that_cannot_be_read_at_the_model_s_pixel_size(tmp_path, model, mpp, option, says):
    """Pixels are not made up: a coarse slide would teach blur."""
    size = mpp and (mpp, mpp)
    slide = write_tiff(tmp_path / "coarse.tif", scene(640, 480, (1.0, 1.0)), size)
    folder = tmp_path / "project"
    shown = CliRunner().invoke(cli.main, ["init", str(folder), str(slide), "--mpp", "1"])
    assert shown.exit_code == 0, shown.output
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    content["images"][0]["serverBuilder"].pop("metadata", None)  # what init was told
    path.write_text(json.dumps(content), "utf-8")
    model.save(folder / "patchcl" / "models", "patchcl")
    nucleus = shapely.Point(80, 25).buffer(5)
    export(folder, feature(shapely.box(0, 0, 200, 200), "Done"), feature(nucleus, "Nucleus"))
    assert says in refused(folder, *option)
    slide.unlink()
    assert "put the file beside the project" in refused(folder)
