"""Nuclei that are paler and redder than the surest ones of their image, and not sure themselves.

Fibres, gaps and cytoplasm have less hematoxylin than nuclei, and the red of eosin. How much a
nucleus has differs between slides, and in one slide between lymphocytes and vesicular nuclei: so
what is asked for is relative to the palest of the nuclei that the model is surest of, and the paler
an object is, the surer the model must be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.segmentation.measurements import NO_LIGHT, NuclearStain

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

    @classmethod
    def of(
        cls,
        probability: NDArray[np.float64],
        red: NDArray[np.float64],
        share: NDArray[np.float64],
    ) -> SurestNuclei | None:
        """Those among nuclei (N,) of some probability, density of red light and its share; None
        where there is no nucleus."""
        if not len(probability):
            return None
        surest = probability >= np.quantile(probability, 1 - _SUREST)
        return cls(
            density=max(float(np.quantile(red[surest], _PALEST)), NO_LIGHT),
            share=max(float(np.median(share[surest])), NO_LIGHT),
        )


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
