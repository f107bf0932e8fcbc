"""The rows of the benchmark: a baseline, trainings without labels, and with a few.

A row has the measures of a set, training by training: by seed, or by draw of the labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import otsu
from bench.cache import code
from bench.few_labels import LABELLED, few_labels
from bench.measure import Bench, Measures, seeded
from bench.paper import choices, semantic_dice
from bench.pseudo import pseudo_label_measures
from bench.sets import ImageSet
from patchcl_qupath.config import Config, PatchCLConfig, Recipe

BASELINE = "otsu"
DEFAULT = "selftrain"
PSEUDO_LABELS = "pseudo-labels"
BY_LABELS = "paper-by-labels"  # the paper's training, and what each choice by labels would bring


def with_(**settings: Any) -> Callable[[Config], Config]:
    """The settings with some of the self-training changed."""
    return lambda config: replace(config, selftrain=replace(config.selftrain, **settings))


def paper(config: Config) -> Config:
    """PatchCL with the settings of the paper."""
    settings = PatchCLConfig.paper(seed=config.patchcl.seed)
    return replace(config, recipe=Recipe.PAPER, patchcl=settings)


TRAINED: dict[str, Callable[[Config], Config]] = {
    "paper": paper,
    "patchcl": lambda config: replace(config, recipe=Recipe.PATCHCL),
    DEFAULT: lambda config: config,
}
ABLATED: dict[str, Callable[[Config], Config]] = {
    "no-gate": with_(min_confidence=0.0),
    "strict-gate": with_(min_confidence=0.8),
    "one-size": with_(scale_jitter=1.0),
    "fragments": with_(min_fragment=0.0),
    "no-cdcl": with_(cdcl_steps=0),
}
ROWS = (BASELINE, *TRAINED, *ABLATED, BY_LABELS, *LABELLED)


def measured(
    bench: Bench, images: ImageSet, row: str, config: Config, seeds: int
) -> Iterator[dict[str, Measures]]:
    """The measures of a row on a set, training by training, each by the name to print it with.

    Settings are ``config``, but for those that the row changes, and the seed.
    """
    if row == BASELINE:
        yield {row: _of_baseline(bench, images, config)}
        return
    for seed in range(seeds):
        if row in LABELLED:
            few = few_labels(bench, images, row, config, seed)
            yield {f"{row}, {kind}": measures for kind, measures in few.items()}
        elif row == BY_LABELS:
            dice = choices(bench, images, paper(seeded(config, seed)))
            yield {f"paper: {choice}": {"semantic_dice": value} for choice, value in dice.items()}
        elif row == PSEUDO_LABELS:
            yield {row: pseudo_label_measures(bench, images, seeded(config, seed))}
        else:
            changed = {**TRAINED, **ABLATED}[row](seeded(config, seed))
            model = bench.trained(images, changed)
            measures = bench.measured(model, images, f"{row}-{seed}")
            if changed.recipe is not Recipe.SELFTRAIN:
                measures["semantic_dice"] = semantic_dice(bench, images, model)
            yield {row: measures}


def _of_baseline(bench: Bench, images: ImageSet, config: Config) -> Measures:
    key = {
        "baseline": images.digest,
        "labels": images.labels_digest,
        "mpp": config.slide.mpp,
        **code(
            "slides.slide.Slide",
            "segmentation.contours.pixel_polygons",
            "evaluation.score.score_image",
            script=Path(otsu.__file__),
        ),
    }
    measures: Measures = bench.cache.value(key, lambda: otsu.baseline(images, config))
    return measures
