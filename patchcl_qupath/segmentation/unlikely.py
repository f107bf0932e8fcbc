"""Nuclei that are paler and redder than the surest ones of their image, and not sure themselves.

Fibres, gaps and cytoplasm have less hematoxylin than nuclei, and the red of eosin. How much a
nucleus has differs between slides, and in one slide between lymphocytes and vesicular nuclei: so
what is asked for is relative to the palest of the nuclei that the model is surest of, and the paler
an object is, the surer the model must be.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.overlap import mapped
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.measurements import NO_LIGHT, NuclearStain
from patchcl_qupath.segmentation.probability import is_probable, nucleus_probability
from patchcl_qupath.slides.prepare import PreparedImage

_CROPS = 16  # that nuclei are looked for in
_SUREST = 0.2  # of these nuclei
_PALEST = 0.05  # of the surest
# Density of red light, and its share in that of all colours, relative to those, of what is palest
# and reddest. Of the right nuclei of six labelled sets, 99 % have a share of 0.83 or more; of
# fibres of collagen, nine of ten have less.
_LEAST_DENSITY, _LEAST_SHARE = 0.5, 0.65


@dataclass(frozen=True, kw_only=True)
class SurestNuclei:
    """The optical density of red light that the palest of an image's surest nuclei have, and the
    share of red in that of all colours that half of them have."""

    density: float
    share: float


def surest_nuclei(
    image: PreparedImage, model: Model, config: SegmentConfig, engine: EngineKind
) -> SurestNuclei | None:
    """Those of an image; None where the model finds no nucleus, or knows no probability.

    They are looked for in crops that the stain normaliser is fitted to: so nuclei are the same in
    regions as in the whole image, and in any tiling.
    """
    if model.calibration is None or image.normaliser is None:
        return None
    crops = [*islice(image.typical_crops(), _CROPS)]
    of_crops = [*mapped(partial(_nuclei, image, model, config, engine), crops)]
    probability, red, share = np.concatenate(of_crops, axis=1)
    if not len(probability):
        return None
    surest = probability >= np.quantile(probability, 1 - _SUREST)
    return SurestNuclei(
        density=max(float(np.quantile(red[surest], _PALEST)), NO_LIGHT),
        share=max(float(np.median(share[surest])), NO_LIGHT),
    )


def _nuclei(
    image: PreparedImage,
    model: Model,
    config: SegmentConfig,
    engine: EngineKind,
    crop: NDArray[np.uint8],
) -> NDArray[np.float64]:
    """Probability, density of red light and its share of the nuclei in a crop, (3, N)."""
    assert image.normaliser is not None, "an image without tissue has no crops"
    torch.set_num_threads(1)  # sums of several threads would differ by how many these are
    found, mpp = confidence(model, crop, image.normaliser, engine), image.slide.mpp
    labels = instances(found.nucleus, mpp, config, model.threshold, found.core)
    stain = NuclearStain.of(labels, crop, mpp, config)
    probability = nucleus_probability(model, labels, found, mpp)
    kept = is_probable(model, probability, config)
    kept &= stain.is_enough(config, image.normaliser.has_brown)
    return np.stack([probability, stain.red, stain.share_of_red])[:, kept]


def are_unlikely(
    probability: NDArray[np.float64],
    stain: NuclearStain,
    surest: SurestNuclei,
    config: SegmentConfig,
) -> NDArray[np.bool_]:
    """Which nuclei (N,) are unlikely beside the surest ones of their image.

    Hematoxylin absorbs more of the red than eosin, or brown fibres, do.
    """
    density, share = stain.red / surest.density, stain.share_of_red / surest.share
    paleness, redness = (1 - density) / (1 - _LEAST_DENSITY), (1 - share) / (1 - _LEAST_SHARE)
    away = np.minimum(paleness**2 + redness**2, 1)
    least, most = config.min_probability_of_pale, config.min_probability_of_palest
    asked = least + (most - least) * away
    return np.asarray((paleness > 0) & (redness > 0) & (probability < asked))
