"""The benchmark of quality: its cache knows what changed, and its tables say what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import quality
from bench import code, measure, paper, pseudo
from bench.cache import Cache
from bench.code import code_digest, reached
from bench.otsu import otsu
from bench.pseudo import PseudoLabelled, TrueLabels
from bench.sets import empty_sets, labelled_sets
from bench.table import QUALITY, mean_of_sets
from patchcl_qupath import pipeline
from patchcl_qupath.config import CDCLConfig, Config, PatchCLConfig, Recipe
from patchcl_qupath.evaluation.score import Bin, ImageScore
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork
from patchcl_qupath.slides.prepare import training_crops
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training import patchcl
from patchcl_qupath.training.patchcl import Snapshot

SIDE = 384  # px of 0.25 µm


def test_the_baseline_finds_nuclei_that_the_border_cuts() -> None:
    """Also those of which 5 px are left, as far as one peak is from the next."""
    rgb = np.full((80, 120, 3), (235, 225, 235), np.uint8)
    y, x = np.mgrid[:80, :120]
    centres = [(-4, 40), (30, -4), (84, 100), (30, 124), (40, 60)]
    for row, col in centres:
        rgb[(y - row) ** 2 + (x - col) ** 2 <= 9**2] = (110, 70, 150)
    labels = otsu(rgb)
    seen = [labels[min(max(row, 0), 79), min(max(col, 0), 119)] for row, col in centres]
    assert 0 not in seen
    assert len({*seen}) == len(centres)


# ------------------------------------------------------------------ code


def test_code_is_followed_by_name() -> None:
    trained = reached("training.patchcl.train")
    assert ("training.pseudo_labels", "otsu") in trained
    assert ("training.pseudo_labels", "pseudo_labels") not in trained
    whole = reached("pipeline.train")
    assert {*trained} < {*whole}
    assert ("training.pseudo_labels", "pseudo_labels") in whole
    assert ("slides.prepare", "training_crops") in whole
    modules = {module for module, _ in whole}
    assert "segmentation.instances" in modules  # which a training separates pseudo-labels with
    assert "training.cdcl" in modules  # which ends it
    assert not modules & {"report.page", "config"}
    run = {module for module, _ in reached(*measure._RUN)}
    assert {"segmentation.instances", "evaluation.metrics", "models.engines"} < run
    assert not run & {"training.patchcl", "training.selftrain", "console"}
    assert ("segmentation.unlikely", "_SUREST") in reached(*measure._RUN)


def test_a_training_depends_on_the_defaults_that_end_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (images,) = labelled_sets(data, ["lgg28"])
    of_now = measure.training_key(images, Config())
    own = replace(Config(), cdcl=replace(CDCLConfig(), steps=7))  # of refinement with labels
    assert measure.training_key(images, own) == of_now
    other = {**measure._DEFAULTS, "cdcl": {**measure._DEFAULTS["cdcl"], "learning_rate": 1.0}}
    monkeypatch.setattr(measure, "_DEFAULTS", other)
    assert measure.training_key(images, Config()) != of_now


PACKAGE = {
    "a.py": "from pack.b import f, other\nfrom pack import b\n\ndef g(x):\n    return f(x)\n\n"
    "def h(x):\n    return b.whole(x)\n",
    "b.py": "import math\nLIMIT = 2\n\ndef f(x):\n    return min(x, LIMIT)\n\ndef other(x):\n"
    "    return x\n\ndef whole(x: 'C'):\n    return x\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package in place of ours."""
    monkeypatch.setattr(code, "_ROOT", tmp_path)
    monkeypatch.setattr(code, "_PACKAGE", "pack")
    (tmp_path / "__init__.py").touch()
    for name, text in PACKAGE.items():
        (tmp_path / name).write_text(text)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    reached.cache_clear()
    code._parsed.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "of_g", "of_h"),
    [
        ("LIMIT = 2", "LIMIT = 3", True, False),
        ("return min", "return max", True, False),
        ("LIMIT = 2", "LIMIT = 2  # at most", False, False),
        ("def f(x):\n", 'def f(x):\n    """The least."""\n', False, False),
        ("    return x\n\ndef whole", "    return -x\n\ndef whole", False, False),
        ("def whole(x: 'C'):\n    return x", "def whole(x: 'C'):\n    return -x", False, True),
        ("import math\n", "assert True\n", True, True),  # what an import does
    ],
)
def test_only_code_that_is_used_counts(
    package: Path, old: str, new: str, of_g: bool, of_h: bool
) -> None:
    before = code_digest("a.g"), code_digest("a.h")
    text = (package / "b.py").read_text()
    assert old in text
    (package / "b.py").write_text(text.replace(old, new))
    forget()
    assert (code_digest("a.g") != before[0], code_digest("a.h") != before[1]) == (of_g, of_h)


def test_code_of_a_script_is_all_of_it(tmp_path: Path) -> None:
    texts = ["x = 1\n", '"""A script."""\nx = 1  # one\n', "x = 2\n"]
    digests = []
    for text in texts:
        (tmp_path / "script.py").write_text(text)
        digests.append(code.script_digest(tmp_path / "script.py"))
    assert digests[0] == digests[1] != digests[2]


# ------------------------------------------------------------------ cache


def untrained(config: Config, seed: int = 0) -> Model:
    """A model of random weights."""
    torch.manual_seed(seed)
    if config.recipe is Recipe.SELFTRAIN:
        return Model(network=NucleusNetwork(config.selftrain.widths).eval(), config=config)
    return Model(network=ConfidenceNetwork.of(config.patchcl).eval(), config=config)


def test_values_and_models_are_made_once(tmp_path: Path) -> None:
    cache, made = Cache(tmp_path), []

    def make() -> Any:
        made.append(1)
        return [1.5, "µm"]

    assert [cache.value({"seed": seed}, make) for seed in (0, 0, 1)] == [[1.5, "µm"]] * 3
    assert len(made) == 2
    config = Config()
    first = cache.model("key", config, lambda: untrained(config))
    finer = replace(config, segment=replace(config.segment, min_area_um2=5.0))
    again = cache.model("key", finer, lambda: pytest.fail("it is there"))
    assert again.digest == first.digest
    assert again.config == finer
    assert Cache(None).value({"seed": 0}, make) == [1.5, "µm"]
    assert len(made) == 3


def test_patchcl_is_trained_once_for_equal_crops(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings = []

    def train(crops: Any, config: Config, report: Any = None) -> Model:
        trainings.append(crops)
        return untrained(replace(config, recipe=Recipe.PATCHCL))

    monkeypatch.setattr(patchcl, "train", train)
    (images,) = labelled_sets(data, ["lgg28"])
    bench = measure.Bench(Cache(tmp_path))
    config = replace(Config(), recipe=Recipe.PATCHCL)
    for changed in (
        config,
        replace(config, selftrain=replace(config.selftrain, levels=9)),
        replace(config, patchcl=replace(config.patchcl, seed=1)),
    ):
        assert bench.trained(images, changed).config == changed
    assert len(trainings) == 2
    assert patchcl.train is train


# ------------------------------------------------------------------ sets and rows


def tissue(seed: int) -> tuple[Any, Any]:
    """Pixels and labels of an image with dark blue discs of 4 to 6 µm on pink."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((SIDE, SIDE), np.uint16)
    y, x = np.mgrid[:SIDE, :SIDE]
    for label, (row, col) in enumerate(np.ndindex(6, 6), start=1):
        centre = np.array([row, col]) * 64 + rng.integers(26, 38, size=2)
        labels[np.hypot(y - centre[0], x - centre[1]) < rng.integers(14, 22)] = label
    pixels = np.where(labels[..., None] > 0, (95, 60, 140), (225, 170, 205))
    noisy = pixels + rng.normal(0, 4, (SIDE, SIDE, 1))
    return np.clip(noisy, 0, 255).astype(np.uint8), labels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two labelled sets of two images, and one without nuclei."""
    folder = tmp_path / "data"
    for seed, name in enumerate(["lgg28", "pannuke_uterus"]):
        for kind in ("images", "labels"):
            (folder / name / kind).mkdir(parents=True)
        for number in range(2):
            pixels, labels = tissue(2 * seed + number)
            Image.fromarray(pixels).save(folder / name / "images" / f"{number}.png")
            Image.fromarray(labels).save(folder / name / "labels" / f"{number}.png")
    (folder / "no_nuclei" / "ink_and_edges").mkdir(parents=True)
    pink = np.full((100, 200, 3), (225, 170, 205), np.uint8)
    Image.fromarray(pink).save(folder / "no_nuclei" / "ink_and_edges" / "no-tissue.png")
    return folder


def test_sets_have_their_images_and_pixel_size(data: Path) -> None:
    first, second = labelled_sets(data, ["lgg28", "pannuke_uterus"], 1)
    assert [path.name for path in first.images] == ["0.png"]
    assert first.digest != second.digest
    assert first.mm2 == pytest.approx((SIDE * 0.25e-3) ** 2)
    (empty,) = empty_sets(data)
    assert (empty.name, empty.mm2) == ("ink_glass", pytest.approx(100 * 200 * 0.25e-6))
    with pytest.raises(SystemExit, match="needs images and labels"):
        labelled_sets(data, ["monuseg_train"])


def test_the_digest_of_a_set_is_that_of_its_files(data: Path) -> None:
    def digests() -> tuple[str, str]:
        (images,) = labelled_sets(data, ["lgg28"])
        return images.digest, images.labels_digest

    before = digests()
    assert digests() == before
    Image.fromarray(tissue(9)[1]).save(data / "lgg28" / "labels" / "1.png")
    assert (digests()[0], digests()[1] == before[1]) == (before[0], False)
    Image.fromarray(tissue(9)[0]).save(data / "lgg28" / "images" / "1.png")
    assert digests()[0] != before[0]


def test_rows_are_measured_on_all_sets_and_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(entries: Any, config: Config, progress: Any) -> Model:
        trained.append(config.patchcl.seed)
        return untrained(config, config.patchcl.seed)

    monkeypatch.setattr(pipeline, "train", train)
    arguments = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--seeds", "2", "--json"]
    arguments += ["--sets", "lgg28", "pannuke_uterus", "--rows", "otsu", "selftrain"]
    quality.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    assert result["images"] == {"lgg28": 2, "pannuke_uterus": 2}
    rows = result["rows"]
    assert trained == [0, 1, 0, 1]
    for of_set in rows["selftrain"].values():
        assert len(of_set) == 2
        assert of_set[0]["ink_glass_per_mm2"] >= 0
        true = ("right", "merged", "split", "missed", "badly_outlined")
        assert sum(of_set[0][kind] for kind in true) == pytest.approx(100)
    (otsu,) = rows["otsu"]["lgg28"]
    assert otsu["dice"] > 0.9
    assert otsu["right"] > 90
    starts = [line[:29].rstrip() for line in lines[1:-1]]
    seeds = ["selftrain, 0", "selftrain, 1", "selftrain"]
    assert starts == ["otsu"] * 3 + seeds + seeds + ["selftrain"]
    monkeypatch.setattr(measure, "segment", lambda *_, **__: pytest.fail("it is known"))
    quality.main(arguments)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert len(trained) == 4


def test_errors_are_drawn_of_each_set(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "train", lambda entries, config, progress: untrained(config))
    arguments = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--sets", "lgg28"]
    arguments += ["--rows", "selftrain", "--images", "1", "--pictures", str(tmp_path / "drawn")]
    for _ in range(2):  # what is known is drawn, too
        quality.main(arguments)
        drawn = tmp_path / "drawn" / "selftrain-0"
        (drawn / "lgg28" / "0-1.png").unlink()
        (drawn / "ink_glass" / "no-tissue-1.png").unlink()
        assert "lgg28: lowest AJI: 0.png" in capsys.readouterr().out


def test_pseudo_labels_are_held_against_true_labels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "train", lambda entries, config, progress: untrained(config))
    arguments = ["--data", str(data), "--no-cache", "--sets", "lgg28", "--pseudo-labels", "--json"]
    quality.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    (found,) = json.loads(lines[-1])["rows"]["pseudo-labels"]["lgg28"]
    assert found["nucleus"] > 0.85
    assert found["background"] > 0.9
    assert found["covered"] > 0.7
    assert found["iou_50"] > 0.8
    assert found["on_nothing"] < 0.1
    assert lines[1].split()[:2] == ["pseudo-labels", "lgg28"]


def test_measures_of_pseudo_labels_worked_by_hand() -> None:
    true = np.array([[1, 1, 1, 1, 0, 0, 2, 2, 3, 0]])
    labels = np.array([[1, 1, 1, 0, 4, 4, 7, 7, 7, 0]])
    valid = np.array([[1, 1, 1, 0, 1, 1, 1, 1, 1, 1]]) > 0
    px = np.ix_(range(1), range(10))
    measures = pseudo._measures([(PseudoLabelled(labels, valid), TrueLabels(true, px))])
    assert measures == pytest.approx(
        {
            "nucleus": 6 / 8,
            "background": 1,
            "unlabelled": 1 / 10,
            "iou_50": 2 / 3,
            "iou_70": 1 / 3,
            "on_nothing": 1 / 3,
            "several": 1 / 3,
            "covered": 6 / 7,
            "aji": (3 + 2 + 1) / (4 + 3 + 3 + 2),
            "pq": 2 * (3 / 4 + 2 / 3) / 6,
        }
    )


def test_true_labels_of_crops_lie_where_the_crops_do(data: Path) -> None:
    (images,) = labelled_sets(data, ["lgg28"])
    config = replace(Config(), patchcl=PatchCLConfig(crops=6, source_px=64))
    with measure.project_of(images) as project:
        crops = training_crops(project.images(), config, lambda *_: None)
        true = [*pseudo._true_crops(project, images, crops, config)]
    assert len(true) == len(crops.images) == 6
    for (labels, px), crop in zip(true, crops.images, strict=True):
        assert labels.shape == (128, 128)
        dark = crop[..., 1] < 115
        assert (dark[px] == (labels > 0)).mean() > 0.97


@pytest.mark.parametrize(
    ("first", "last", "downsample", "begin", "px"),
    [
        (3, 5, 2.0, 6, [0, 0, 1, 1]),
        (0, 3, 2.5, 0, [0, 0, 1, 1, 1, 2, 2]),  # centres 0.5, 1.5 | 2.5, 3.5, 4.5 | 5.5, 6.5
        (1, 3, 2.5, 2, [0, 0, 0, 1, 1]),
        (2, 6, 0.5, 1, [1, 3]),  # a working px may have none
    ],
)
def test_level0_pixels_of_a_crop(
    first: int, last: int, downsample: float, begin: int, px: list[int]
) -> None:
    found, index = pseudo.level0(first, last, downsample)
    assert (found, index.tolist()) == (begin, px)


# ------------------------------------------------------------------ the paper's choices


def watched(start: int, step: int, scores: list[float]) -> Snapshot:
    return Snapshot(start, step, ConfidenceNetwork(2, 2, (1,)), np.array(scores, np.float32))


def test_each_choice_by_labels_is_made_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    nucleus = np.zeros((48, 48), bool)
    nucleus[6:42, 6:42] = True
    image = paper._Image(
        np.zeros((48, 48, 3), np.uint8),
        StainNormaliser((0, 0, 0), (1, 1, 1)),
        nucleus,
        np.ix_(range(48), range(48)),
    )

    def confident(rows: int, value: float = 0.8) -> Any:
        """Confidence in the first rows, of 3 px, of the nucleus."""
        return np.where(nucleus & (np.arange(48)[:, None] < 6 + 3 * rows), value, 0.1)

    snapshots = [
        watched(0, 1, [0.2, -0.5]),  # the largest score: what is left out by channel 1
        watched(0, 2, [0.3, 0.1]),
        watched(1, 1, [0.1, -0.4]),
        watched(1, 2, [0.2, 0.3]),
    ]
    maps = [
        [confident(9), 1 - confident(6)],
        [confident(8), confident(12, 0.4)],
        [confident(3), 1 - confident(7)],
        [confident(11), confident(5)],
    ]
    of = {id(each.network): np.array(found) for each, found in zip(snapshots, maps, strict=True)}
    monkeypatch.setattr(paper, "_maps", lambda network, *_: of[id(network)])
    judged = [paper.judge(each, [image], Config()) for each in snapshots]

    def dice(rows: int) -> float:
        return image.dice(paper.opened_and_closed(confident(rows) > 0.5))

    found = paper.by_choice(judged, [image], Config())
    assert [*found] == [*paper.CHOICES]
    expected = {
        "label-free": 6,
        "threshold by labels": 6,
        "channel by labels": 9,
        "stopping by labels": 8,
        "start by labels": 7,
        "by labels": 11,
        "by labels + threshold": 11,
    }
    assert found == pytest.approx({choice: dice(rows) for choice, rows in expected.items()})
    assert 0 < found["label-free"] < found["start by labels"] < found["by labels"] < 1


def test_a_threshold_by_labels_is_that_of_the_largest_dice_at_level_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true = np.zeros((24, 24), bool)
    true[4:10, 4:10] = True  # too small for a disc of 3 px of these, not of level 0
    image = paper._Image(
        np.zeros((24, 24, 3), np.uint8),
        StainNormaliser((0, 0, 0), (1, 1, 1)),
        np.kron(true, np.ones((2, 2))) > 0,  # at level 0
        np.ix_(*[np.arange(48) // 2] * 2),
    )
    unsure = np.where(true, 0.3, 0.05)[None]
    monkeypatch.setattr(paper, "_maps", lambda *_: unsure)
    judged = [paper.judge(watched(0, 1, [0.7]), [image], Config())]
    found = paper.by_choice(judged, [image], Config())
    assert found["label-free"] == found["by labels"] == 0
    opened = image.dice(paper.opened_and_closed(image.level0(true)))
    assert found["threshold by labels"] == found["by labels + threshold"] == opened > 0.9


def test_masks_are_opened_and_closed_with_discs_of_3_and_1_px() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:16, 5:16] = True
    mask[9:12, 9:12] = False  # a hole
    mask[30:34, 30:34] = True  # a speck
    found = paper.opened_and_closed(mask)
    assert not found[25:].any()
    assert found.sum() == 0  # no disc of 3 px fits beside the hole
    mask[9:12, 9:12] = True
    assert mask[:20].sum() - paper.opened_and_closed(mask).sum() == 4 * 6  # the corners


def test_the_row_of_the_paper_trains_once_and_keeps_its_model(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainings = []

    def train(crops: Any, config: Config, report: Any = None, watch: Any = None) -> Model:
        trainings.append(config)
        model = untrained(config)
        assert isinstance(model.network, ConfidenceNetwork)
        watch(Snapshot(0, 15, model.network, np.array([0.5, 0.1, 0, 0], np.float32)))
        return model

    monkeypatch.setattr(patchcl, "train", train)
    arguments = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--sets", "lgg28"]
    arguments += ["--rows", "paper-by-labels", "paper", "--images", "1", "--json"]
    quality.main(arguments)
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [*rows] == [f"paper: {choice}" for choice in paper.CHOICES] + ["paper"]
    (config,) = trainings
    assert config.patchcl == PatchCLConfig.paper()
    ((alone,),) = rows["paper"].values()
    ((chosen,),) = rows["paper: label-free"].values()
    assert alone["semantic_dice"] == pytest.approx(chosen["semantic_dice"], abs=0.01)


# ------------------------------------------------------------------ comparison


def save(path: Path, **aji: list[list[float]]) -> Path:
    """What --json prints of a row with AJI and spurious nuclei of each training, by set."""
    sets = {
        name: [{"aji": a, "spurious": s} for a, s in trainings] for name, trainings in aji.items()
    }
    path.write_text("a table\n" + json.dumps({"rows": {"selftrain": sets}}) + "\n")
    return path


def test_a_difference_beyond_the_spread_is_marked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = save(tmp_path / "a", one=[[0.5, 9], [0.52, 8]], two=[[0.6, 4], [0.62, 5]], more=[])
    after = save(tmp_path / "b", one=[[0.56, 9.5], [0.54, 9.1]], two=[[0.61, 2], [0.57, 3]])
    quality.main(["--compare", str(before), str(after)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["selftrain", "one", "+.040*", "+0.8!"],
        ["selftrain", "two", "-.020", "-2.0*"],
        ["selftrain", "mean", "of", "sets", "+.010", "-0.6*"],
        ["selftrain:", "AJI", "is", "lower", "on", "1", "of", "2", "sets:", "two"],
    ]


def test_of_pixels_alone_there_is_no_aji(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, dice in (("a", 0.5), ("b", 0.53)):
        rows = {"paper: start": {"one": [{"semantic_dice": dice}]}}
        (tmp_path / name).write_text(json.dumps({"rows": rows}) + "\n")
    quality.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.split() == ["paper:", "start", "mean", "of", "sets", "+.030"]


def test_of_one_training_there_is_no_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save(tmp_path / "a", one=[[0.5, 9]])
    quality.main(["--compare", str(one), str(save(tmp_path / "b", one=[[0.6, 9]]))])
    assert "+.100 " in capsys.readouterr().out
    (tmp_path / "c").write_text("a table\n")
    with pytest.raises(SystemExit, match="does not end with what --json prints"):
        quality.main(["--compare", str(one), str(tmp_path / "c")])


def test_the_mean_of_sets_is_that_of_each_training() -> None:
    sets = {"one": [{"aji": 0.5, "fat": 1.0}, {"aji": 0.6}], "two": [{"aji": 0.7}, {"aji": 0.4}]}
    assert mean_of_sets(sets) == [{"aji": pytest.approx(0.6)}, {"aji": pytest.approx(0.5)}]
    assert {"dice", "aji", "pq", "f1", "missed", "spurious", "fat_per_mm2"} < {
        column.measure for column in QUALITY
    }


def test_errors_are_foreseen_where_less_probable_images_have_lower_scores() -> None:
    def image(probability: float, f1: float, nuclei: int = 10) -> ImageScore:
        low = Bin(low=0, high=0.4, nuclei=nuclei, right=5, mean_probability=probability)
        empty = Bin(low=0.4, high=1, nuclei=0, right=0, mean_probability=None)
        return ImageScore(
            id="1", image="1", nuclei=nuclei, scores={"f1": f1}, reliability=(low, empty)
        )

    scored = [image(0.05 * k, 0.1 + 0.08 * k) for k in range(10)]
    assert measure._foreseen(scored) == {"foreseen": pytest.approx(1)}
    assert measure._foreseen([*scored[1:], image(0.9, 0.0)])["foreseen"] < 0.6
    assert measure._foreseen([*scored[1:], image(0.9, 0.0, nuclei=0)]) == {}  # of nine
