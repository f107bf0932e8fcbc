"""What a worker does: one tile, from pixels to the nuclei that it owns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Nuclei, Tile
from patchcl_qupath.model import Model, confidence
from patchcl_qupath.nuclei import centroids, mean_hematoxylin, nuclei_of_tile, to_level0
from patchcl_qupath.prepare import PreparedImage
from patchcl_qupath.runs import Seconds, timed
from patchcl_qupath.segment import context_um, instances
from patchcl_qupath.slide import Slide
from patchcl_qupath.tiles import inside, inside_region


def context_px(config: Config, slide: Slide) -> int:
    """How far from its write box a tile must know the confidence, in working px."""
    return math.ceil(context_um(config.segment) / slide.mpp)


@dataclass(frozen=True)
class TileContext:
    """What a worker needs beside the tile."""

    image: PreparedImage
    model: Model
    config: Config
    engine: str


def segment_tile(context: TileContext, tile: Tile) -> tuple[Nuclei, Seconds]:
    """One tile, from pixels to the nuclei that it owns, at level 0."""
    image, slide, model = context.image, context.image.slide, context.model
    assert image.scale is not None, "an image without tissue has no tiles"
    settings = context.config.segment
    seconds: Seconds = {}
    with timed(seconds, "read"):
        rgb = slide.read(tile.read)
    with timed(seconds, "network"):
        torch.set_num_threads(1)  # sums of several threads would differ by how many these are
        probability, core = confidence(model, rgb, image.scale, context.engine)
    # The network's share of the halo is used up: what is left has the whole slide's confidence.
    near = tile.write.grow(context_px(context.config, slide), slide.shape)
    inner = near.within(tile.read)
    tile, rgb, probability = replace(tile, read=near), rgb[inner], probability[inner]
    core = None if core is None else core[inner]
    with timed(seconds, "separate"):
        labels = instances(probability, slide.mpp, settings, model.threshold, core)
    with timed(seconds, "measure"):
        rows, cols = centroids(labels, tile)
        mine = tile.write.holds(rows, cols) & inside(image.tissue, image.tissue_px, rows, cols)
        if image.region is not None:
            mine &= inside_region(image.region, tile.write, rows, cols)
        mine &= mean_hematoxylin(labels, rgb) >= settings.min_hematoxylin
        nuclei = nuclei_of_tile(
            *(labels, mine, rgb, probability, tile, slide.grid_mpp),
            *(model.threshold, image.stains),
        )
        nuclei = nuclei[nuclei.measurements["Solidity"] >= settings.min_solidity]
        nuclei = to_level0(nuclei, slide.downsample, image.id)
    return nuclei, seconds
