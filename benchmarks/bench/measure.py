"""A model's training and its measures on a set, each computed once for equal code and settings."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from scipy.stats import spearmanr

from bench.cache import Cache, code
from bench.sets import ImageSet, project_of
from patchcl_qupath import pipeline
from patchcl_qupath.config import Config, to_dict
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.evaluation.score import (
    ImageScore,
    mean,
    per_100_true,
    reliability_in_total,
    score,
)
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.models import engines
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import Progress, ShowCount
from patchcl_qupath.project import Project
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.storage.records import ImageOutcome, to_plain
from patchcl_qupath.training import patchcl

Measures = dict[str, float]

_LEAST_IMAGES = 10  # that a correlation is given of
_WORST = 3  # images of each set that are named where pictures are drawn
_NOT_OF_TRAINING = ("segment", "result", "cdcl")
# CDCL ends a training by the defaults of these, whatever a person set.
_DEFAULTS = {name: to_dict(Config())[name] for name in ("cdcl", "segment")}
_NOT_OF_A_RUN = ("recipe", "patchcl", "selftrain", "cdcl", "result", "engine")
_RUN = (
    "slides.prepare.prepare",
    "segmentation.tiling.plan",
    "segmentation.segment_tile.segment_tile",
    "segmentation.typical_nuclei.typical_nuclei",
    "evaluation.score.score_image",
)


@dataclass(frozen=True)
class Bench:
    """Trains and measures; ``empty`` are the sets without nuclei, ``pictures`` a folder or None."""

    cache: Cache
    empty: tuple[ImageSet, ...] = ()
    pictures: Path | None = None

    def trained(self, images: ImageSet, config: Config) -> Model:
        """A model trained on a set without labels, as `patchcl-qp run` does."""

        def train() -> Model:
            with project_of(images) as project, self.patchcl_kept():
                return pipeline.train(project.images(), config, progress)

        return self.cache.model(training_key(images, config), config, train)

    @contextmanager
    def patchcl_kept(self) -> Iterator[None]:
        """Inside, trainings that begin with equal PatchCL train it once."""
        train = patchcl.train

        def kept(crops: TrainingCrops, config: Config, report: ShowCount | None = None) -> Model:
            key = {
                "model": "PatchCL",
                "crops": crops_digest(crops),
                "config": [to_dict(config)["slide"], to_dict(config)["patchcl"]],
                **code("training.patchcl.train"),
            }
            return self.cache.model(key, config, lambda: train(crops, config, report))

        with mock.patch.object(patchcl, "train", kept):
            yield

    def measured(self, model: Model, images: ImageSet, name: str) -> Measures:
        """Scores, kinds of error per 100 true nuclei, and objects per mm² of the empty sets.

        With a folder for pictures, the errors are drawn into ``name`` in it.
        """
        scored = self.scored(model, images, name)
        empty = {f"{each.name}_per_mm2": self.per_mm2(model, each, name) for each in self.empty}
        right = {
            f"right_of_{each.low:g}": each.right / each.nuclei
            for each in reliability_in_total(scored)
            if each.nuclei
        }
        return {**mean(scored), **per_100_true(scored), **empty, **right, **_foreseen(scored)}

    def scored(self, model: Model, images: ImageSet, name: str) -> list[ImageScore]:
        """The scores of a model's nuclei in each image of a labelled set."""
        assert images.ground_truth is not None
        folder = None if self.pictures is None else self.pictures / name / images.name

        def run() -> Any:
            with project_of(images) as project:
                segment(project, model, project.images())
                assert images.ground_truth is not None
                return to_plain(score(project, project.images(), images.ground_truth, folder)[0])

        if folder is not None:  # pictures are not kept
            scored = _scores(run())
            worst = sorted(scored, key=lambda image: image.scores["aji"])[:_WORST]
            print(f"{folder}: lowest AJI: {', '.join(str(image.image) for image in worst)}")
            return scored
        key = {"labels": images.labels_digest, **run_key(model, images)}
        return _scores(self.cache.value(key, run))

    def per_mm2(self, model: Model, images: ImageSet, name: str) -> float:
        """The nuclei that a model finds in a set, per mm²: none in images that a run refuses.

        With a folder for pictures, they are drawn into ``name`` in it.
        """

        def run() -> Any:
            with project_of(images) as project:
                outcomes = segment(project, model, project.images(), may_fail=True)
                if self.pictures is not None:
                    _draw_all(project, self.pictures / name / images.name)
                return sum(outcome.nuclei for outcome in outcomes)

        if self.pictures is not None:
            return float(run()) / images.mm2
        return float(self.cache.value(run_key(model, images), run)) / images.mm2


def training_key(images: ImageSet, config: Config) -> dict[str, Any]:
    """What a model that is trained on a set without labels depends on."""
    return {
        "model": "label-free",
        "images": images.digest,
        "config": without(config, _NOT_OF_TRAINING),
        "defaults": _DEFAULTS,
        **code("pipeline.train"),
    }


def run_key(model: Model, images: ImageSet) -> dict[str, Any]:
    """What the nuclei and scores of a model depend on, but for labels."""
    return {
        "run": model.digest,
        "images": images.digest,
        "engine": engines.choose(model.config.engine, model.network),
        "config": without(model.config, _NOT_OF_A_RUN),
        **code(*_RUN),
    }


def segment(
    project: Project, model: Model, entries: Sequence[ImageEntry], *, may_fail: bool = False
) -> list[ImageOutcome]:
    """Segment images of a project; the program ends where one fails, unless it ``may_fail``."""
    with open_workers() as client:
        run = pipeline.Run(
            project=project,
            model=model,
            config=model.config,
            workers=client,
            progress=progress,
        )
        outcomes = list(run.images(entries))
    for outcome in outcomes:
        if outcome.problem and not may_fail:
            sys.exit(outcome.problem)
    return outcomes


def _draw_all(project: Project, folder: Path) -> None:
    """Draw all nuclei as spurious."""
    with tempfile.TemporaryDirectory() as none:
        for entry in project.images():
            (Path(none) / f"{entry.name}.geojson").write_text("[]")
        score(project, project.images(), Path(none), folder)


def without(config: Config, tables: Sequence[str]) -> dict[str, Any]:
    """The settings of the other tables."""
    return {name: value for name, value in to_dict(config).items() if name not in tables}


def seeded(config: Config, seed: int) -> Config:
    """The settings with another seed of the training."""
    return replace(config, patchcl=replace(config.patchcl, seed=seed))


def crops_digest(crops: TrainingCrops) -> str:
    """Hexadecimal digest of training crops and their normalisers."""
    digest = hashlib.sha256(repr(crops.slides).encode())
    for image, normaliser in zip(crops.images, crops.normalisers, strict=True):
        digest.update(repr((image.shape, normaliser)).encode() + image.tobytes())
    return digest.hexdigest()


def progress(step: Progress) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{step.label}: {step.done} of {step.total} ", end="\r", file=sys.stderr)


def _foreseen(scored: Sequence[ImageScore]) -> Measures:
    """Spearman's correlation, over images, of the fraction of nuclei that their probabilities
    expect to be wrong with 1 - F1: by the former, `patchcl-qp suggest` chooses."""
    expected, wrong = [], []
    for image in scored:
        bins = [(each.nuclei, each.mean_probability) for each in image.reliability if each.nuclei]
        if image.nuclei:
            expected.append(1 - sum(n * (p or 0) for n, p in bins) / image.nuclei)
            wrong.append(1 - image.scores["f1"])
    if len(expected) < _LEAST_IMAGES:
        return {}
    return {"foreseen": float(spearmanr(expected, wrong).statistic)}


def _scores(plain: Any) -> list[ImageScore]:
    return msgspec.convert(plain, list[ImageScore])
