"""What a worker does: one tile, from pixels to the nuclei that it owns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.segmentation.contours import centroids, nuclei_of_tile, to_level0
from patchcl_qupath.segmentation.instances import instances, postprocessing_margin_um
from patchcl_qupath.segmentation.measurements import mean_hematoxylin
from patchcl_qupath.segmentation.uncertainty import (
    BIN_STEPS,
    merge_grids,
    predictive_entropy,
    step_px,
)
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tissue import inside, inside_region
from patchcl_qupath.timing import Seconds, timed


def postprocessing_margin_px(config: Config, slide: Slide) -> int:
    """How far from its write box a tile must know the confidence, in working px."""
    return math.ceil(postprocessing_margin_um(config.segment) / slide.mpp)


@dataclass(frozen=True)
class TileContext:
    """What a worker needs beside the tile."""

    image: PreparedImage
    model: Model
    config: Config
    engine: EngineKind


def segment_tile(context: TileContext, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """One tile, from pixels to the nuclei that it owns, at level 0; and how sure it was of them."""
    image, slide, model = context.image, context.image.slide, context.model
    assert image.normaliser is not None, "an image without tissue has no tiles"
    settings = context.config.segment
    seconds: Seconds = {}
    with timed(seconds, "read"):
        rgb = slide.read(tile.read)
    with timed(seconds, "network"):
        torch.set_num_threads(1)  # sums of several threads would differ by how many these are
        probability, core = confidence(model, rgb, image.normaliser, context.engine)
    # The network's share of the halo is used up: what is left has the whole slide's confidence.
    near = tile.write.grow(postprocessing_margin_px(context.config, slide), slide.shape)
    inner = near.within(tile.read)
    tile, rgb, probability = replace(tile, read=near), rgb[inner], probability[inner]
    core = None if core is None else core[inner]
    with timed(seconds, "separate"):
        labels = instances(probability, slide.mpp, settings, model.threshold, core)
    with timed(seconds, "measure"):
        rows, cols = centroids(labels, tile)
        owned = tile.write.holds(rows, cols) & inside(image.tissue, image.tissue_px, rows, cols)
        if image.region is not None:
            owned &= inside_region(image.region, tile.write, rows, cols)
        owned &= mean_hematoxylin(labels, rgb) >= settings.min_hematoxylin
        nuclei = nuclei_of_tile(
            *(labels, owned, rgb, probability, tile, slide.grid_mpp),
            *(model.threshold, image.stains),
        )
        compact = nuclei.measurements["Solidity"] >= settings.min_solidity
        nuclei = to_level0(nuclei[compact], slide.downsample, image.id)
        uncertainty = _uncertainty_grid(
            image, tile, probability, rows[owned][compact], cols[owned][compact]
        )
    return nuclei, uncertainty, seconds


def _uncertainty_grid(
    image: PreparedImage,
    tile: Tile,
    probability: NDArray[np.float32],
    nucleus_rows: NDArray[np.int64],
    nucleus_cols: NDArray[np.int64],
) -> UncertaintyGrid:
    """What is in doubt in a tile's write box, and where its nuclei are: (N,) rows and columns.

    ``probability`` covers the tile's read box.
    """
    step, box = step_px(image.slide.mpp), tile.write
    rows, cols = (
        axis.ravel()
        for axis in np.mgrid[
            -(-box.row0 // step) * step : box.row1 : step,
            -(-box.col0 // step) * step : box.col1 : step,
        ]
    )
    looked = inside(image.tissue, image.tissue_px, rows, cols)
    if image.region is not None:
        looked &= inside_region(image.region, box, rows, cols)
    rows, cols = rows[looked], cols[looked]
    entropy = predictive_entropy(probability[rows - tile.read.row0, cols - tile.read.col0])
    bin_px = BIN_STEPS * step
    x, y = image.slide.downsample
    one, none = np.ones_like(rows), np.zeros_like(nucleus_rows)
    points = UncertaintyGrid(
        (bin_px * x, bin_px * y),
        np.concatenate([rows, nucleus_rows]) // bin_px,
        np.concatenate([cols, nucleus_cols]) // bin_px,
        np.concatenate([one, none]),
        np.concatenate([entropy, none]),
        np.concatenate([np.zeros_like(rows), np.ones_like(none)]),
    )
    return merge_grids([points])
