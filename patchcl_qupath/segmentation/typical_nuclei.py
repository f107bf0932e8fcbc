"""What the nuclei of an image are typically like: how large they are, and how dark when sure.

Both differ between slides by more than one setting could be right for. They are measured in crops
that the stain normaliser is fitted to, before any tile is segmented: so nuclei are the same in
regions as in the whole image, and in any tiling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Confidence, Model, confidence
from patchcl_qupath.overlap import mapped
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.measurements import NuclearStain
from patchcl_qupath.segmentation.probability import is_probable, nucleus_probability
from patchcl_qupath.segmentation.unlikely import SurestNuclei
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.storage.records import TypicalRecord

Result = TypeVar("Result")

CROPS = 16  # that nuclei are looked for in
_LEAST_NUCLEI = 10  # fewer say little


class TypicalNuclei(NamedTuple):
    """The settings by which nuclei of an image are separated, with their typical diameter; and the
    surest nuclei, None where the model finds none, or knows no probability."""

    config: SegmentConfig
    surest: SurestNuclei | None

    @classmethod
    def of(cls, record: TypicalRecord, config: SegmentConfig) -> TypicalNuclei:
        """Those of a record, with the other settings of ``config``."""
        surest = None
        if record.surest is not None:
            density, share = record.surest
            surest = SurestNuclei(density=density, share=share)
        config = replace(config, nucleus_diameter_um=record.nucleus_diameter_um)
        return cls(config, surest)

    @property
    def record(self) -> TypicalRecord:
        """The inverse of ``of``."""
        surest = None if self.surest is None else (self.surest.density, self.surest.share)
        diameter_um = self.config.nucleus_diameter_um
        return TypicalRecord(nucleus_diameter_um=diameter_um, surest=surest)


def typical_nuclei(
    image: PreparedImage, model: Model, config: SegmentConfig, engine: EngineKind
) -> TypicalNuclei:
    """Those of an image, by the settings ``config``."""
    if image.normaliser is None:
        return TypicalNuclei(config, None)
    crops = [*islice(image.typical_crops(), CROPS)]
    found = _each_once(partial(_found, image, model, engine), crops)
    config = with_diameter(config, model, found, image.slide.mpp)
    if model.calibration is None:
        return TypicalNuclei(config, None)
    of_crops = _each_once(partial(_stains, image, model, config), crops, found)
    return TypicalNuclei(config, SurestNuclei.of(*np.concatenate(of_crops, axis=1)))


def with_diameter(
    config: SegmentConfig, model: Model, found: Sequence[Confidence], mpp: float
) -> SegmentConfig:
    """The settings with the typical diameter of the nuclei in what a model finds in some crops.

    As they are where a person set one, or where few nuclei are found. Of a small image the crops
    overlap, and a nucleus counts in each: few suffice there, as there are no others.
    """
    if config.nucleus_diameter_um:
        return config
    separate = partial(instances, mpp=mpp, config=config, threshold=model.threshold)

    def areas_of(maps: Confidence) -> NDArray[np.intp]:
        return np.bincount(separate(maps.nucleus, core=maps.core).ravel())[1:]

    areas = np.concatenate(_each_once(areas_of, found))
    if len(areas) < _LEAST_NUCLEI:
        return config
    typical_um = math.sqrt(4 / math.pi * typical_area(areas)) * mpp
    return replace(config, nucleus_diameter_um=round(typical_um, 1))


def _each_once(function: Callable[..., Result], *items: Sequence[Any]) -> list[Result]:
    """What a function returns of items: once of those that are the same objects, as the crops of an
    image that is no larger than one."""
    keys = [tuple(map(id, each)) for each in zip(*items, strict=True)]
    distinct = dict(zip(keys, zip(*items, strict=True), strict=True))
    results = dict(
        zip(distinct, mapped(function, *zip(*distinct.values(), strict=True)), strict=True)
    )
    return [results[key] for key in keys]


def typical_area(areas: NDArray[np.generic]) -> float:
    """The area that splits the sum of ``areas`` (N,): half of it is in larger ones.

    Fragments, of which there may be many, hardly change it.
    """
    ascending = np.sort(areas)
    total = np.cumsum(ascending)
    return float(ascending[np.searchsorted(total, total[-1] / 2)])


def _found(
    image: PreparedImage, model: Model, engine: EngineKind, crop: NDArray[np.uint8]
) -> Confidence:
    """What a model finds in a crop."""
    assert image.normaliser is not None, "an image without tissue has no crops"
    torch.set_num_threads(1)  # sums of several threads would differ by how many these are
    return confidence(model, crop, image.normaliser, engine)


def _stains(
    image: PreparedImage,
    model: Model,
    config: SegmentConfig,
    crop: NDArray[np.uint8],
    found: Confidence,
) -> NDArray[np.float64]:
    """Probability, density of red light and its share of the nuclei in a crop, (3, N)."""
    assert image.normaliser is not None, "an image without tissue has no crops"
    mpp = image.slide.mpp
    labels = instances(found.nucleus, mpp, config, model.threshold, found.core)
    stain = NuclearStain.of(labels, crop, mpp, config)
    probability = nucleus_probability(model, labels, found, mpp, config)
    kept = is_probable(model, probability, config)
    kept &= stain.is_enough(config, image.normaliser.has_brown)
    return np.stack([probability, stain.red, stain.share_of_red])[:, kept]
