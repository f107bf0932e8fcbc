"""The story of a project, top-down: from slides to a model to nuclei. Read this file first."""

from __future__ import annotations

import itertools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from numpy.typing import NDArray

from patchcl_qupath import __version__, patchcl
from patchcl_qupath.config import Config, to_dict
from patchcl_qupath.datatypes import ImageEntry, Nuclei, Tile
from patchcl_qupath.errors import ImageError, PatchCLError, TrainingError
from patchcl_qupath.network import Model, confidence
from patchcl_qupath.nuclei import nuclei_of_tile, to_level0
from patchcl_qupath.project import Project
from patchcl_qupath.runs import Seconds, TileStore, map_tiles, torch_threads
from patchcl_qupath.segment import context_um, instances
from patchcl_qupath.slide import Slide
from patchcl_qupath.stains import StainScale
from patchcl_qupath.storage import digest
from patchcl_qupath.tiles import check_brightfield, inside, plan, sample_boxes, tissue_mask

Progress = Callable[[str, int, int], None]  # what is done, how much of it, out of how much


@dataclass(frozen=True)
class Prepared:
    """An image that is ready to be learnt from or segmented."""

    id: str
    slide: Slide
    tissue: NDArray[np.bool_]  # (h, w); a pixel is tissue_px working pixels wide
    tissue_px: int
    scale: StainScale | None  # None where there is no tissue

    @property
    def tissue_mm2(self) -> float:
        return float(self.tissue.sum()) * (self.tissue_px * self.slide.mpp) ** 2 / 1e6


@dataclass(frozen=True)
class ImageResult:
    """What became of one image: ``problem`` is None unless it failed."""

    id: str
    image: str
    problem: str | None = None
    note: str | None = None
    tissue_mm2: float = 0.0
    nuclei: int = 0
    tiles: int = 0
    tiles_taken_over: int = 0
    results: str | None = None
    seconds: float = 0.0
    worker_seconds: Seconds = field(default_factory=dict)


def train(
    entries: Sequence[ImageEntry], config: Config, progress: Progress, mpp: float | None = None
) -> Model:
    """Learn what nuclei look like from random tissue crops of the images themselves: no labels.

    Images that cannot be used are left out. Raises TrainingError if none is left, and says why.
    """
    rng = np.random.default_rng(config.patchcl.seed)
    chosen = [entries[i] for i in rng.permutation(len(entries))]
    images: list[NDArray[np.uint8]] = []
    scales: list[StainScale] = []
    problems: list[str] = []
    used = 0
    for entry in chosen:
        if used == config.patchcl.slides:
            break
        try:
            image = prepare(entry, config, mpp)
            if image.scale is None:
                raise ImageError(f"{entry.name} shows no tissue")
            progress("reading crops to learn from", used, min(len(entries), config.patchcl.slides))
            n = math.ceil(config.patchcl.crops / min(len(entries), config.patchcl.slides))
            new = list(crops(image, n, config.patchcl.source_px, seed=config.patchcl.seed + 1))
        except ImageError as error:
            problems.append(str(error))
            continue
        images += new
        scales += [image.scale] * len(new)
        used += 1
    if not images:
        raise TrainingError("no image to learn from: " + "; ".join(problems[:5]))
    return patchcl.train(images, scales, config, lambda i, n: progress("learning nuclei", i, n))


def prepare(entry: ImageEntry, config: Config, mpp: float | None = None) -> Prepared:
    """Open an image, find its tissue, and take its stain range from random crops of it.

    ``mpp`` is the pixel size, in um, of images that do not know their own. Raises ImageError.
    """
    slide = Slide.open(entry, config.slide.mpp, mpp)
    px = slide.thumbnail_px(config.slide.tissue_mpp)
    thumbnail = slide.thumbnail(config.slide.tissue_mpp)
    check_brightfield(thumbnail, entry.name)
    tissue = tissue_mask(thumbnail, px * slide.mpp, config.slide.min_tissue_um2)
    image = Prepared(entry.id, slide, tissue, px, None)
    return replace(image, scale=StainScale.fit(crops(image, 24, 256, 0))) if tissue.any() else image


def crops(image: Prepared, n: int, side_px: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """``n`` random tissue crops (side_px, side_px, 3) of one image; smaller if the image is."""
    rng, shape = np.random.default_rng(seed), image.slide.shape
    for box in sample_boxes(image.tissue, image.tissue_px, shape, side_px, n, rng):
        yield image.slide.read(box)


@dataclass(frozen=True)
class Run:
    """One model and one set of settings, applied to images of a project.

    ``client`` is a Dask client. ``mpp`` is the pixel size, in um, of images that do not know
    their own. Equal models and settings make the same run, so that a killed run goes on.
    """

    project: Project
    model: Model
    config: Config
    client: Any
    progress: Progress
    mpp: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What made the nuclei, for whoever reads them."""
        return {"version": __version__, "model": self.model.digest, "config": to_dict(self.config)}

    @property
    def id(self) -> str:
        return digest(self.about)

    def images(self, entries: Sequence[ImageEntry]) -> Iterator[ImageResult]:
        """Segment images one after the other; one that fails says why, and the next one begins."""
        for entry in entries:
            began = time.perf_counter()
            try:
                result = self.image(entry)
            except PatchCLError as error:
                result = ImageResult(entry.id, entry.name, problem=str(error))
            except Exception as error:  # a fault of ours in one image must not cost the others
                traceback.print_exc()
                problem = f"{entry.name}: {type(error).__name__}: {error} (a fault of this program)"
                result = ImageResult(entry.id, entry.name, problem=problem)
            yield replace(result, seconds=time.perf_counter() - began)

    def image(self, entry: ImageEntry) -> ImageResult:
        """Segment one image and write its nuclei into the project."""
        self.progress(f"{entry.name}: finding tissue", 0, 0)
        image = prepare(entry, self.config, self.mpp)
        slide, segment = image.slide, self.config.segment
        halo_px = self.model.reach_px + math.ceil(context_um(segment) / slide.mpp)
        tiles = plan(slide.shape, image.tissue, image.tissue_px, self.config.slide.tile_px, halo_px)

        folder = self.project.output / "runs" / self.id / entry.id
        store = TileStore.open(folder, _fingerprint(image))
        missing = store.missing(tiles)
        done = itertools.count(len(tiles) - len(missing))
        tick = lambda: self.progress(f"{entry.name}: segmenting", next(done), len(tiles))  # noqa: E731
        tick()
        context = TileContext(image, self.model, self.config, torch_threads(self.client))
        seconds = map_tiles(self.client, segment_tile, context, missing, store, tick)

        count = store.count(tiles)
        self.progress(f"{entry.name}: writing {count:,} nuclei", 0, 0)
        about = {"run": self.id, "image": entry.name, "made": _now(), **self.about}
        return ImageResult(
            entry.id,
            entry.name,
            note=None if tiles else "no tissue found: if there is some, draw it to us",
            tissue_mm2=image.tissue_mm2,
            nuclei=count,
            tiles=len(tiles),
            tiles_taken_over=len(tiles) - len(missing),
            results=str(self.project.write(entry, store.nuclei(tiles), count, self.config.result, about)),
            worker_seconds=seconds,
        )


@dataclass(frozen=True)
class TileContext:
    """What a worker needs beside the tile."""

    image: Prepared
    model: Model
    config: Config
    torch_threads: int


def segment_tile(context: TileContext, tile: Tile) -> tuple[Nuclei, Seconds]:
    """One tile, from pixels to the nuclei that it owns, at level 0."""
    image, slide, model = context.image, context.image.slide, context.model
    assert image.scale is not None, "an image without tissue has no tiles"
    seconds: Seconds = {}
    with _timed(seconds, "read"):
        rgb = slide.read(tile.read)
    with _timed(seconds, "network"):
        torch.set_num_threads(context.torch_threads)
        probability = confidence(model, rgb, image.scale)
    with _timed(seconds, "separate"):
        labels = instances(probability, slide.mpp, context.config.segment, model.threshold)
    with _timed(seconds, "measure"):
        nuclei = nuclei_of_tile(labels, rgb, probability, tile, slide.grid_mpp)
        cols, rows = shapely.get_coordinates(shapely.centroid(nuclei.polygons)).T
        nuclei = nuclei[inside(image.tissue, image.tissue_px, rows, cols)]
        nuclei = to_level0(nuclei, slide.downsample, image.id)
    return nuclei, seconds


def _fingerprint(image: Prepared) -> dict[str, Any]:
    """What a tile's nuclei depend on, beside the run: the pixels and their frame.

    Not the path: a project that was moved keeps its tiles.
    """
    stat = image.slide.path.stat()
    facts = asdict(replace(image.slide, path=Path())) | {"path": None}
    return {**facts, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


@contextmanager
def _timed(seconds: Seconds, stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
