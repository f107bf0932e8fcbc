"""The story of a project, top-down: from slides to a model to nuclei. Read this file first."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import shapely

from patchcl_qupath import __version__
from patchcl_qupath.config import Config, to_dict
from patchcl_qupath.correction.labels import read_corrected_samples
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ConfigError, PatchCLError
from patchcl_qupath.execution.map_tiles import map_tiles
from patchcl_qupath.execution.outcome import ImageResult, TileProgress, internal_error, note
from patchcl_qupath.execution.tile_store import TileStore, write_outcome, write_run
from patchcl_qupath.execution.workers import Workers
from patchcl_qupath.models import engines
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.project import Project
from patchcl_qupath.report.figures import write_gallery, write_preview
from patchcl_qupath.segmentation.segment_tile import (
    TileContext,
    postprocessing_margin_px,
    segment_tile,
)
from patchcl_qupath.segmentation.tiling import plan
from patchcl_qupath.segmentation.uncertainty import merge_grids
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import digest, file_signature
from patchcl_qupath.storage.parquet import write_uncertainty_grid
from patchcl_qupath.timing import Seconds, timed
from patchcl_qupath.training import cdcl, patchcl, selftrain

Progress = Callable[[str, int, int], None]  # what is done, how much of it, out of how much


def train(entries: Sequence[ImageEntry], config: Config, progress: Progress) -> Model:
    """Learn what nuclei look like from random tissue crops of the images themselves: no labels.

    Raises TrainingError.
    """
    images, normalisers = training_crops(entries, config, progress)
    model = patchcl.train(images, normalisers, config, partial(progress, "learning nuclei"))
    if config.recipe != "selftrain":
        return model
    return selftrain.train(images, normalisers, model, progress)


def refine(
    project: Project,
    entries: Sequence[ImageEntry],
    start: Model,
    labels_from: str,
    progress: Progress,
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
    corrected = read_corrected_samples(project, entries, start.config, labels_from, progress)
    images, normalisers = training_crops(entries, start.config, progress)
    sure = partial(progress, "choosing sure nuclei")
    unlabelled = selftrain.pseudo_labelled_samples(images, normalisers, start, sure)
    return cdcl.refine(start, corrected, unlabelled, progress, seed)


@dataclass(frozen=True)
class Run:
    """One model and one set of settings, applied to images of a project.

    ``workers`` do the tiles. ``within`` are classes of annotations; nuclei outside of them are not
    looked for. Equal models, settings and classes make the same run, so that a killed run goes on.
    ``model_name`` is for people.
    """

    project: Project
    model: Model
    config: Config
    workers: Workers
    progress: Progress
    within: tuple[str, ...] = ()
    model_name: str | None = None

    @cached_property
    def engine(self) -> str:
        """What runs the network: the best there is, unless the settings name one."""
        return engines.choose(self.config.engine)

    @property
    def about(self) -> dict[str, Any]:
        """What made the nuclei."""
        return {
            "version": __version__,
            "model": self.model.digest,
            "engine": self.engine,
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
                result = ImageResult(
                    entry.id, entry.name, problem=f"{entry.name}: {internal_error(error)}"
                )
            result = replace(result, seconds=time.perf_counter() - began)
            results.append(result)
            write_outcome(self.project.output, entry.id, asdict(result))
            write_run(self.folder, self.about, self.model.training, [asdict(r) for r in results])
            yield result

    def image(self, entry: ImageEntry) -> ImageResult:
        """Segment one image and write its nuclei into the project."""
        if self.within:
            entry = self.project.within(entry, self.within)
        entry = self.project.with_stains(entry)
        seconds: Seconds = {}
        self.progress(f"{entry.name}: finding tissue", 0, 0)
        with timed(seconds, "prepare"):
            image = prepare(entry, self.config)
        slide = image.slide
        halo_px = self.model.receptive_radius_px + postprocessing_margin_px(self.config, slide)
        tiles = plan(
            *(slide.shape, image.tissue, image.tissue_px, self.config.slide.tile_px, halo_px),
            *(image.region, self.model.divisor),
        )

        store = TileStore.open(self.folder / entry.id, image.fingerprint())
        missing = store.missing(tiles)
        resumed = len(tiles) - len(missing)
        tile_progress = TileProgress(
            *(image, len(tiles), resumed, partial(self.progress, f"{entry.name}: segmenting")),
            reopen=partial(Slide.open, entry, self.config.slide.mpp),
        )
        tile_progress.begin()
        context = TileContext(image, self.model, self.config, self.engine)
        with timed(seconds, "tiles"):
            worker_seconds = map_tiles(
                *(self.workers, segment_tile, context, missing, store),
                *(tile_progress.one_more, tile_progress.one_failed),
            )

        left_out = set(store.missing(tiles))
        done = [tile for tile in tiles if tile not in left_out]
        count, failed_tiles = store.count(done), tile_progress.in_order()
        assert len(done) + len(failed_tiles) == len(tiles), "a tile was lost"
        self.progress(f"{entry.name}: writing {count:,} nuclei", 0, 0)
        about = self._about_image(entry, image) | {
            "holes": [asdict(failed) for failed in failed_tiles]
        }
        with timed(seconds, "write"):
            results = self.project.write(
                entry, store.nuclei(done), count, self.config.result, about
            )
        uncertainty = merge_grids(store.uncertainty_grids(done)) if done else None
        if uncertainty is not None:
            write_uncertainty_grid(
                self.project.output / "surveys" / f"{entry.id}.parquet", uncertainty
            )
        preview = self.project.output / "previews" / f"{entry.id}.png"
        gallery = self.project.output / "report" / "images" / entry.id
        with timed(seconds, "pictures"):
            write_preview(preview, image, store, done, failed_tiles, uncertainty)
            shown = {"run": self.folder.name, "nuclei": count}
            write_gallery(gallery, image, store, done, failed_tiles, uncertainty, shown)
        return ImageResult(
            entry.id,
            entry.name,
            note=note(entry, image, count, bool(tiles), self.config.result),
            tissue_mm2=about["tissue_mm2"],
            nuclei=count,
            tiles=len(tiles),
            tiles_resumed=resumed,
            failed_tiles=failed_tiles,
            results=str(results),
            preview=str(preview),
            main_seconds=seconds,
            worker_seconds=worker_seconds,
            network_px=sum(math.prod(tile.read.shape) for tile in missing),
        )

    def _about_image(self, entry: ImageEntry, image: PreparedImage) -> dict[str, Any]:
        """What made the nuclei of one image, and from what."""
        made = datetime.now(UTC).isoformat(timespec="seconds")
        about = {"run": self.folder.name, "image": entry.name, "made": made, **self.about}
        about["tissue_mm2"] = image.tissue_mm2()
        about["slide"] = {"file": file_signature(entry.path), "mpp": [*image.slide.mpp_level0]}
        if self.model_name:
            about["model_name"] = self.model_name
        about["stains"] = asdict(image.stains)
        if entry.regions:
            about["regions"] = [
                {"geometry": json.loads(shapely.to_geojson(r)), "tissue_mm2": image.tissue_mm2(r)}
                for r in entry.regions
            ]
        return about
