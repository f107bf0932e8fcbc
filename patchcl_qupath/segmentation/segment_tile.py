"""What a worker does: segment one tile, from pixels to the nuclei that the tile owns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import Nuclei, Polygons, Tile, UncertaintyGrid, centroids_of
from patchcl_qupath.execution.pixel_store import PixelStore
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Confidence, Model, confidence
from patchcl_qupath.segmentation.contours import centroids, nuclei_of_tile, to_level0
from patchcl_qupath.segmentation.instances import instances, postprocessing_margin_um
from patchcl_qupath.segmentation.measurements import NuclearStain
from patchcl_qupath.segmentation.probability import is_probable, nucleus_probability
from patchcl_qupath.segmentation.typical_nuclei import TypicalNuclei
from patchcl_qupath.segmentation.uncertainty import (
    bin_px,
    merge_grids,
    predictive_entropy,
    sampling_points,
)
from patchcl_qupath.segmentation.unlikely import are_unlikely
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tissue import inside, inside_region, part_of_region
from patchcl_qupath.storage.records import FileSignature
from patchcl_qupath.timing import Seconds, timed

Pixels = NDArray[np.int64]  # (N,) rows or columns of pixels of the working grid
# The centroid of a nucleus's pixels, by which a tile owns it, is nearer than this to that of its
# contour, by which it lies in a region: it is compact, and the contour has no holes.
_CENTROIDS_APART_UM = 4.0


def postprocessing_margin_px(config: SegmentConfig, slide: Slide) -> int:
    """How far from its write box post-processing needs a tile's probabilities, in working px."""
    return math.ceil(postprocessing_margin_um(config) / slide.mpp)


def beside_region_px(slide: Slide) -> int:
    """How far beside an analysis region a tile may own a nucleus that lies in it, in working px."""
    return math.ceil(_CENTROIDS_APART_UM / slide.mpp)


@dataclass(frozen=True, kw_only=True)
class TileContext:
    """What a worker needs beside the tile; ``engine`` runs the network of the model.

    ``typical`` are nuclei of the image; ``pixels`` keep those of the tile, where cells will be
    grown.
    """

    image: PreparedImage
    model: Model
    typical: TypicalNuclei
    engine: EngineKind
    pixels: PixelStore | None = None


def check_machine(slide: Slide, file: FileSignature, engine: EngineKind) -> None:
    """Raise PatchCLError on a machine that cannot segment tiles of a slide, which is a ``file``."""
    slide.check_same(file)
    engines.check_installed(engine)


@dataclass(frozen=True, kw_only=True)
class _Prediction:
    """A tile's pixels (H, W, 3) and what the network predicts of them, (H, W) each.

    They cover ``tile.read``: the write box and the post-processing margin, where each probability
    is that of the whole slide. ``core`` is None for networks that do not predict cores of nuclei.
    """

    tile: Tile
    rgb: NDArray[np.uint8]
    probability: NDArray[np.float32]
    core: NDArray[np.float32] | None


def segment_tile(context: TileContext, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Segment one tile: read, predict, separate touching nuclei, measure.

    Returns the nuclei that the tile owns, at level 0; the uncertainty grid of its write box; and
    the seconds that each stage took. Raises SlideError for damaged pixels.
    """
    seconds: Seconds = {}
    with timed(seconds, "read"):
        rgb = context.image.slide.read(tile.read)
        if context.pixels is not None:
            context.pixels.keep(tile, rgb)
    with timed(seconds, "network"):
        predicted = _predict(context, tile, rgb)
    with timed(seconds, "separate"):
        labels = _separate(context, predicted)
    with timed(seconds, "measure"):
        nuclei, rows, cols = _measure(context, predicted, labels)
        uncertainty = _uncertainty_grid(context.image, predicted, rows, cols)
    return nuclei, uncertainty, seconds


def _predict(context: TileContext, tile: Tile, rgb: NDArray[np.uint8]) -> _Prediction:
    """Run the network on the pixels (H, W, 3) of a tile's read box."""
    image = context.image
    assert image.normaliser is not None, "an image without tissue has no tiles"
    torch.set_num_threads(1)  # sums of several threads would differ by how many these are
    probability, core = confidence(context.model, rgb, image.normaliser, context.engine)
    # The receptive field has used up its part of the halo: within it, probabilities are not those
    # of the whole slide.
    margin_px = postprocessing_margin_px(context.typical.config, image.slide)
    valid = tile.write.grow(margin_px, image.slide.shape)
    inner = valid.within(tile.read)
    return _Prediction(
        tile=replace(tile, read=valid),
        rgb=rgb[inner],
        probability=probability[inner],
        core=None if core is None else core[inner],
    )


def _separate(context: TileContext, predicted: _Prediction) -> NDArray[np.int32]:
    """Separate touching nuclei -> labels (H, W) of nuclei 1..N, 0 for background."""
    return instances(
        predicted.probability,
        mpp=context.image.slide.mpp,
        config=context.typical.config,
        threshold=context.model.threshold,
        core=predicted.core,
    )


def _measure(
    context: TileContext, predicted: _Prediction, labels: NDArray[np.int32]
) -> tuple[Nuclei, Pixels, Pixels]:
    """The nuclei (N,) that the tile owns, at level 0; and the pixels with their centroids."""
    image, settings, tile = context.image, context.typical.config, predicted.tile
    rows, cols = centroids(labels, tile)
    owned = tile.write.holds(rows, cols) & inside(image.tissue, image.tissue_px, rows, cols)
    stain = NuclearStain.of(labels, predicted.rgb, image.slide.mpp, settings)
    has_brown = image.normaliser is not None and image.normaliser.has_brown
    owned &= stain.is_enough(settings, has_brown)
    found = Confidence(predicted.probability, predicted.core)
    probability = nucleus_probability(context.model, labels, found, image.slide.mpp, settings)
    owned &= is_probable(context.model, probability, settings)
    if context.typical.surest is not None:
        owned &= ~are_unlikely(probability, stain, context.typical.surest, settings)
    nuclei = nuclei_of_tile(
        labels=labels,
        owned=owned,
        probability=probability,
        rgb=predicted.rgb,
        confidence=predicted.probability,
        tile=tile,
        mpp=image.slide.grid_mpp,
        threshold=context.model.threshold,
        stains=image.stains,
    )
    compact = nuclei.measurements["Solidity"] >= settings.min_solidity  # strands are not
    compact &= nuclei.measurements["Area µm^2"] > 0  # a line has no centroid
    at_level0 = to_level0(nuclei[compact], image.slide.downsample, image.id)
    rows, cols = rows[owned][compact], cols[owned][compact]
    here = _in_analysis_region(image, tile, at_level0.polygons)
    return at_level0[here], rows[here], cols[here]


def _in_analysis_region(image: PreparedImage, tile: Tile, contours: Polygons) -> NDArray[np.bool_]:
    """(N,) whether the centroids of contours, at level 0, lie in the analysis region, its border
    included: as QuPath has it, and ``answers.regions``, which counts in the same regions."""
    if image.region is None:
        return np.ones(len(contours), dtype=bool)
    xy = centroids_of(contours) / image.slide.downsample
    part = part_of_region(image.region, tile.read)
    return np.asarray(shapely.intersects_xy(part, xy), dtype=bool)


def _uncertainty_grid(
    image: PreparedImage, predicted: _Prediction, nucleus_rows: Pixels, nucleus_cols: Pixels
) -> UncertaintyGrid:
    """The uncertainty grid of a tile's write box; ``nucleus_*`` (N,) are of its centroids."""
    tile, slide = predicted.tile, image.slide
    rows, cols = sampling_points(tile.write, slide.mpp)
    counts = inside(image.tissue, image.tissue_px, rows, cols)
    if image.region is not None:
        counts &= inside_region(image.region, tile.write, rows, cols)
    rows, cols = rows[counts], cols[counts]
    at = rows - tile.read.row0, cols - tile.read.col0
    entropy = predictive_entropy(predicted.probability[at])
    px, (x, y) = bin_px(slide.mpp), slide.downsample
    of_points = UncertaintyGrid(
        bin_size=(px * x, px * y),
        rows=rows // px,
        cols=cols // px,
        points=np.ones_like(rows),
        entropy=entropy,
        nuclei=np.zeros_like(rows),
    )
    of_nuclei = UncertaintyGrid(
        bin_size=of_points.bin_size,
        rows=nucleus_rows // px,
        cols=nucleus_cols // px,
        points=np.zeros_like(nucleus_rows),
        entropy=np.zeros_like(nucleus_rows),
        nuclei=np.ones_like(nucleus_rows),
    )
    return merge_grids([of_points, of_nuclei])
