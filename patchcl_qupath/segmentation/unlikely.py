"""Nuclei that are paler and redder than the surest ones of their image, and not sure themselves.

Fibres, gaps and cytoplasm have less hematoxylin than nuclei, and the red of eosin. How much a
nucleus has differs between slides, and in one slide between lymphocytes and vesicular nuclei: so
what is asked for is relative to the palest of the nuclei that the model is surest of, and the paler
an object is, the surer the model must be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import ALL_COLOURS, RED, Tile
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.segmentation.measurements import PROBABILITY

_SUREST = 0.2  # of the nuclei of an image, which the others are compared with
_PALEST = 0.05  # of these
# Density of red light, and its share in that of all colours, relative to those, of what is palest
# and reddest. Of the right nuclei of six labelled sets, 99 % have a share of 0.83 or more; of
# fibres of collagen, nine of ten have less.
_LEAST_DENSITY, _LEAST_SHARE = 0.5, 0.65
_NO_LIGHT = 1e-3  # optical density


def without_unlikely(store: TileStore, tiles: Sequence[Tile], config: SegmentConfig) -> TileStore:
    """The finished tiles of an image, without nuclei that are unlikely beside all others."""
    names = (PROBABILITY, RED, ALL_COLOURS)
    of_tiles = [*store.measurements(tiles, names)]
    if not of_tiles:
        return store
    probability, red, all_colours = (np.concatenate([each[n] for each in of_tiles]) for n in names)
    likely = ~are_unlikely(probability, red, all_colours, config)
    ends = np.cumsum([len(each[PROBABILITY]) for each in of_tiles])
    kept = zip(tiles, np.split(likely, ends[:-1]), strict=True)
    return TileStore(store.folder, {tile.name: each for tile, each in kept if not each.all()})


def are_unlikely(
    probability: NDArray[np.float32],
    red: NDArray[np.float32],
    all_colours: NDArray[np.float32],
    config: SegmentConfig,
) -> NDArray[np.bool_]:
    """Which of all nuclei (N,) of an image are unlikely: their order makes no difference.

    ``red`` and ``all_colours`` (N,) are their mean optical densities, of red light and of red,
    green and blue together: hematoxylin absorbs more of the red than eosin, or brown fibres, do.
    """
    if not len(probability):
        return np.zeros(0, np.bool_)
    surest = probability >= np.quantile(probability, 1 - _SUREST)
    share = red / np.maximum(all_colours, _NO_LIGHT)
    share = share / max(float(np.median(share[surest])), _NO_LIGHT)
    density = red / max(float(np.quantile(red[surest], _PALEST)), _NO_LIGHT)
    paleness, redness = (1 - density) / (1 - _LEAST_DENSITY), (1 - share) / (1 - _LEAST_SHARE)
    away = np.minimum(paleness**2 + redness**2, 1)
    least, most = config.min_probability_of_pale, config.min_probability_of_palest
    asked = least + (most - least) * away
    return np.asarray((paleness > 0) & (redness > 0) & (probability < asked))
