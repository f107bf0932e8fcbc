"""The story of a project, top-down: from slides to a model to nuclei. Read this file first."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import shapely
import torch

from patchcl_qupath import __version__, cdcl, patchcl, selftrain
from patchcl_qupath.config import Config, ResultConfig, to_dict
from patchcl_qupath.datatypes import Hole, ImageEntry, Nuclei, Tile
from patchcl_qupath.errors import ConfigError, ImageError, PatchCLError, SlideError, TrainingError
from patchcl_qupath.fields import lessons
from patchcl_qupath.model import Model, confidence
from patchcl_qupath.network import NucleusNetwork
from patchcl_qupath.nuclei import centroids, nuclei_of_tile, to_level0
from patchcl_qupath.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.project import Project
from patchcl_qupath.report import OVERVIEW_MPP, draw_holes, write_preview
from patchcl_qupath.runs import Seconds, TileStore, map_tiles, timed, write_run
from patchcl_qupath.segment import context_um, instances
from patchcl_qupath.slide import Slide
from patchcl_qupath.storage import digest
from patchcl_qupath.tiles import inside, inside_region, plan

GIVE_UP = 10  # tiles of an image, if none of it succeeds

Progress = Callable[[str, int, int], None]  # what is done, how much of it, out of how much


def train(
    entries: Sequence[ImageEntry], config: Config, progress: Progress, mpp: float | None = None
) -> Model:
    """Learn what nuclei look like from random tissue crops of the images themselves: no labels.

    ``mpp`` is the pixel size, in um, of images that do not know their own. Raises TrainingError.
    """
    images, scales = training_crops(entries, config, progress, mpp)
    model = patchcl.train(images, scales, config, partial(progress, "learning nuclei"))
    if config.recipe != "selftrain":
        return model
    return selftrain.train(images, scales, model, progress)


def refine(
    project: Project,
    entries: Sequence[ImageEntry],
    start: Model,
    labels_from: str,
    progress: Progress,
    mpp: float | None = None,
    seed: int = 0,
) -> Model:
    """Refine a model with fields in which a person put all nuclei right, by CDCL.

    Fields are annotations of class ``labels_from``. The images' other tissue counts, too, with what
    the model is sure of there. Raises ImageError for labels that cannot be learnt from,
    TrainingError where there are none, ConfigError for a model of PatchCL alone.
    """
    if not isinstance(start.network, NucleusNetwork):
        raise ConfigError(
            "a model of PatchCL alone cannot be refined: train one with "
            'recipe = "selftrain", the default'
        )
    config = start.config
    labelled = []
    for done, entry in enumerate(entries):
        progress("reading corrected fields", done, len(entries))
        corrections = project.labels(entry, labels_from)
        if corrections.fields:
            labelled += lessons(prepare(entry, config, mpp), corrections)
    progress("reading corrected fields", len(entries), len(entries))
    if not labelled:
        raise TrainingError(
            f"no image has an annotation of class {labels_from}: draw some in QuPath, put every "
            "nucleus in them right, and save (without a QuPath here, run "
            "groovy/export_labels.groovy there)"
        )
    images, scales = training_crops(entries, config, progress, mpp)
    sure = partial(progress, "choosing sure nuclei")
    unlabelled = selftrain.make_lessons(images, scales, start, sure)
    return cdcl.refine(start, labelled, unlabelled, progress, seed)


@dataclass(frozen=True)
class ImageResult:
    """What became of one image: ``problem`` is None unless it failed.

    Where it has ``holes``, the nuclei of all other tiles are written.
    """

    id: str
    image: str
    problem: str | None = None
    note: str | None = None
    tissue_mm2: float = 0.0
    nuclei: int = 0
    tiles: int = 0
    tiles_taken_over: int = 0
    holes: tuple[Hole, ...] = ()
    results: str | None = None
    preview: str | None = None
    seconds: float = 0.0
    worker_seconds: Seconds = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One model and one set of settings, applied to images of a project.

    ``client`` is a Dask client. ``mpp`` is the pixel size, in um, of images that do not know
    their own. ``within`` are classes of annotations; nuclei outside of them are not looked for.
    Equal models, settings and classes make the same run, so that a killed run goes on.
    """

    project: Project
    model: Model
    config: Config
    client: Any
    progress: Progress
    mpp: float | None = None
    within: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """What made the nuclei."""
        return {
            "version": __version__,
            "model": self.model.digest,
            "config": to_dict(self.config),
            "within": list(self.within),
        }

    @property
    def folder(self) -> Path:
        """Where this run keeps its finished tiles, named by all that they depend on."""
        settings = self.about["config"]
        depends = {**self.about, "config": [settings["slide"], settings["segment"]]}
        return self.project.output / "runs" / digest(depends)

    def images(self, entries: Sequence[ImageEntry]) -> Iterator[ImageResult]:
        """Segment images one after the other; one that fails says why, and the next one begins."""
        results = []
        for entry in entries:
            began = time.perf_counter()
            try:
                result = self.image(entry)
            except PatchCLError as error:
                result = ImageResult(entry.id, entry.name, problem=str(error))
            except Exception as error:  # a fault of ours in one image must not cost the others
                traceback.print_exc()
                result = ImageResult(entry.id, entry.name, problem=f"{entry.name}: {_fault(error)}")
            result = replace(result, seconds=time.perf_counter() - began)
            results.append(result)
            write_run(self.folder, self.about, self.model.training, [asdict(r) for r in results])
            yield result

    def image(self, entry: ImageEntry) -> ImageResult:
        """Segment one image and write its nuclei into the project."""
        if self.within:
            entry = self.project.within(entry, self.within)
        self.progress(f"{entry.name}: finding tissue", 0, 0)
        image = prepare(entry, self.config, self.mpp)
        slide = image.slide
        halo_px = self.model.reach_px + _context_px(self.config, slide)
        tile_px = self.config.slide.tile_px
        tiles = plan(
            *(slide.shape, image.tissue, image.tissue_px, tile_px, halo_px),
            *(image.region, self.model.align_px),
        )

        store = TileStore.open(self.folder / entry.id, image.fingerprint())
        missing = store.missing(tiles)
        taken_over = len(tiles) - len(missing)
        finished = taken_over
        holes: list[Hole] = []

        def show() -> None:
            self.progress(f"{entry.name}: segmenting", finished + len(holes), len(tiles))

        def one_more() -> None:
            nonlocal finished
            finished += 1
            show()

        def one_failed(tile: Tile, error: Exception) -> None:
            self._check_slide(entry)
            if not holes and not isinstance(error, PatchCLError):
                traceback.print_exception(error)
            holes.append(_hole(tile, slide, error))
            if not finished and len(holes) == min(GIVE_UP, len(tiles)):
                raise ImageError(f"{entry.name}: no tile can be segmented: {holes[0].reason}")
            show()

        show()  # the bar begins at what is taken over
        context = TileContext(image, self.model, self.config)
        seconds = map_tiles(
            self.client, segment_tile, context, missing, store, one_more, one_failed
        )

        holes.sort(key=lambda hole: (hole.y, hole.x))
        left_out = set(store.missing(tiles))
        done = [tile for tile in tiles if tile not in left_out]
        assert len(done) + len(holes) == len(tiles), "a tile was lost"
        count, nuclei = store.count(done), partial(store.nuclei, done)
        self.progress(f"{entry.name}: writing {count:,} nuclei", 0, 0)
        about = self._about_image(entry, image) | {"holes": [asdict(hole) for hole in holes]}
        results = self.project.write(entry, nuclei(), count, self.config.result, about)
        preview = self.project.output / "previews" / f"{entry.id}.png"
        overview = draw_holes(slide.thumbnail(OVERVIEW_MPP), holes, slide.size) if holes else None
        write_preview(preview, slide.read, slide.shape, slide.downsample, nuclei, overview)
        return ImageResult(
            entry.id,
            entry.name,
            note=_note(entry, count, bool(tiles), self.config.result),
            tissue_mm2=about["tissue_mm2"],
            nuclei=count,
            tiles=len(tiles),
            tiles_taken_over=taken_over,
            holes=tuple(holes),
            results=str(results),
            preview=str(preview),
            worker_seconds=seconds,
        )

    def _check_slide(self, entry: ImageEntry) -> None:
        """Raise SlideError for a slide that was there when the run began, and is not any more."""
        try:
            Slide.open(entry, self.config.slide.mpp, self.mpp)
        except SlideError as error:
            raise SlideError(
                f"{error}. It could be read when the run began: once it can be again, run again; "
                "finished tiles are kept"
            ) from error

    def _about_image(self, entry: ImageEntry, image: PreparedImage) -> dict[str, Any]:
        """What made the nuclei of one image, and from what."""
        made = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"run": self.folder.name, "image": entry.name, "made": made, **self.about}
        about["tissue_mm2"] = image.tissue_mm2()
        if entry.regions:
            about["regions"] = [
                {"geometry": json.loads(shapely.to_geojson(r)), "tissue_mm2": image.tissue_mm2(r)}
                for r in entry.regions
            ]
        return about


def _note(entry: ImageEntry, count: int, has_tissue: bool, settings: ResultConfig) -> str | None:
    notes = [entry.note] if entry.note else []
    if not has_tissue:
        notes.append("no tissue in its regions" if entry.regions else "no tissue found, only glass")
    if settings.kind(count) == "detection" and settings.object_type == "auto":
        notes.append(f"more than {settings.max_annotations:,} nuclei: written as detections")
    return "; ".join(notes) or None


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {error} (a fault of this program)"


def _hole(tile: Tile, slide: Slide, error: Exception) -> Hole:
    """What a tile that failed leaves out of the image."""
    (x, y), box = slide.downsample, tile.write
    height, width = box.shape
    reason = str(error) if isinstance(error, PatchCLError) else _fault(error)
    return Hole(
        round(x * box.col0), round(y * box.row0), round(x * width), round(y * height), reason
    )


def _context_px(config: Config, slide: Slide) -> int:
    """How far from its write box a tile must know the confidence, in working px."""
    return math.ceil(context_um(config.segment) / slide.mpp)


@dataclass(frozen=True)
class TileContext:
    """What a worker needs beside the tile."""

    image: PreparedImage
    model: Model
    config: Config


def segment_tile(context: TileContext, tile: Tile) -> tuple[Nuclei, Seconds]:
    """One tile, from pixels to the nuclei that it owns, at level 0."""
    image, slide, model = context.image, context.image.slide, context.model
    assert image.scale is not None, "an image without tissue has no tiles"
    seconds: Seconds = {}
    with timed(seconds, "read"):
        rgb = slide.read(tile.read)
    with timed(seconds, "network"):
        torch.set_num_threads(1)  # sums of several threads would differ by how many these are
        probability, core = confidence(model, rgb, image.scale)
    # The network's share of the halo is used up: what is left has the whole slide's confidence.
    near = tile.write.grow(_context_px(context.config, slide), slide.shape)
    inner = near.within(tile.read)
    tile, rgb, probability = replace(tile, read=near), rgb[inner], probability[inner]
    core = None if core is None else core[inner]
    with timed(seconds, "separate"):
        labels = instances(probability, slide.mpp, context.config.segment, model.threshold, core)
    with timed(seconds, "measure"):
        rows, cols = centroids(labels, tile)
        mine = tile.write.holds(rows, cols) & inside(image.tissue, image.tissue_px, rows, cols)
        if image.region is not None:
            mine &= inside_region(image.region, tile.write, rows, cols)
        nuclei = nuclei_of_tile(
            *(labels, mine, rgb, probability, tile, slide.grid_mpp),
            *(model.threshold, context.config.slide.stain),
        )
        nuclei = nuclei[nuclei.measurements["Solidity"] >= context.config.segment.min_solidity]
        nuclei = to_level0(nuclei, slide.downsample, image.id)
    return nuclei, seconds
