"""The nuclei of one image, or its cells: tiles are planned, done by workers, and put together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import ImageEntry, Tile
from patchcl_qupath.execution.map_tiles import TileWork, map_tiles
from patchcl_qupath.execution.outcome import TileProgress, in_order
from patchcl_qupath.execution.pixel_store import PixelStore
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import Workers
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import ShowProgress, Stage, counter
from patchcl_qupath.segmentation.grow_tile import CellContext, NucleiOfTiles, grow_tile
from patchcl_qupath.segmentation.segment_tile import (
    TileContext,
    beside_region_px,
    check_machine,
    postprocessing_margin_px,
    segment_tile,
)
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.segmentation.tiling import largest_first, plan
from patchcl_qupath.segmentation.typical_nuclei import TypicalNuclei, typical_nuclei
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.layout import TYPICAL, Layout
from patchcl_qupath.storage.records import TypicalRecord, read_record, write_record
from patchcl_qupath.timing import Seconds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImageTiles:
    """The tiles of one image in a run.

    ``run`` names the folder of finished tiles; ``run_of_nuclei`` that of those with nuclei alone,
    which runs with other cells share. ``show`` is called with each ``Progress``.
    """

    entry: ImageEntry
    image: PreparedImage
    model: Model
    config: Config
    engine: EngineKind
    layout: Layout
    run: str
    run_of_nuclei: str
    workers: Workers
    show: ShowProgress

    def segmented(self, on_few: Callable[[], None]) -> tuple[SegmentedImage, Seconds]:
        """The image with its nuclei or cells, once workers have done all missing tiles, and
        the seconds that these took.

        ``on_few`` is called once there are fewer tiles left than threads. Raises SlideError for a
        slide that changed meanwhile, ImageError where no tile can be done.
        """
        image = self.image
        image.check_unchanged()  # it may have waited for its turn
        folder = self.layout.tiles(self.run_of_nuclei, image.id)
        store = TileStore.open(folder, image.fingerprint())
        typical = self._typical(store)
        tiles = self._plan(typical)
        missing = largest_first(store.missing(tiles))
        resumed = len(tiles) - len(missing)
        logger.info(
            "%s: %d tiles, %d resumed from %s", self.entry.name, len(tiles), resumed, folder
        )
        progress = [self._progress(len(tiles), resumed, Stage.SEGMENTING)]
        pixels = self._pixels(missing, store)
        find: TileWork[Any] = TileWork(
            task=segment_tile,
            context=self._context(typical, pixels) if missing else None,
            tiles=missing,
            store=store,
            on_done=progress[0].one_more,
            on_failed=progress[0].one_failed,
        )
        works = [find]
        if self.config.cells.are_grown:
            works, progress = self._with_cells(tiles, find, progress[0], pixels)
        for each in progress:
            each.tell()
        check = partial(check_machine, engine=self.engine) if missing else Slide.check_same
        seconds = map_tiles(
            *works,
            workers=self.workers,
            on_few=on_few,
            check=partial(check, replace(image.slide, void=None), image.file),
            # Else a tile of another file would be resumed once the first one is back.
            before_storing=image.check_not_replaced,
        )
        pixels.remove()
        image.check_unchanged()
        segmented = SegmentedImage(
            image=image,
            store=works[-1].store,
            tiles=works[-1].store.finished(tiles),
            failed_tiles=in_order([tile for each in progress for tile in each.failed]),
            resumed=resumed,
            network_px=sum(math.prod(tile.read.shape) for tile in missing),
            max_diameter_um=self.config.segment.max_diameter_um,
        )
        assert len(segmented.tiles) + len(segmented.failed_tiles) == len(tiles), "a tile was lost"
        return segmented, seconds

    def _typical(self, store: TileStore) -> TypicalNuclei:
        """The typical nuclei of an image: those by which its finished tiles were segmented.

        On another machine, or by another version of torch, the last bits of probabilities differ,
        and with a pixel what is measured: a run that goes on there would separate nuclei otherwise.
        """
        path, config = store.folder / TYPICAL, self.config.segment
        if record := read_record(path, TypicalRecord):
            return TypicalNuclei.of(record, config)
        typical = self.workers.call(typical_nuclei, self.image, self.model, config, self.engine)
        write_record(path, typical.record)
        return typical

    def _plan(self, typical: TypicalNuclei) -> list[Tile]:
        """The tiles of the image."""
        image = self.image
        margin_px = postprocessing_margin_px(typical.config, image.slide)
        return plan(
            shape=image.slide.shape,
            tissue=image.tissue,
            tissue_px=image.tissue_px,
            tile_px=self.config.slide.tile_px,
            halo_px=self.model.receptive_radius_px + margin_px,
            region=image.region,
            divisor=self.model.divisor,
            beside_px=beside_region_px(image.slide),
        )

    def _pixels(self, missing: Sequence[Tile], store: TileStore) -> PixelStore:
        """Where the pixels of missing tiles are kept, for cells alone."""
        pixels = PixelStore.of(store.folder, self.image.fingerprint())
        grows = self.config.cells.are_grown
        # A run that was stopped left them, and may have had other settings.
        for left in PixelStore.all_in(self.layout.tiles_of_runs(self.image.id)):
            if left != pixels or not grows:
                left.remove()
        if grows:
            pixels.make_room(missing)
        return pixels

    def _context(self, typical: TypicalNuclei, pixels: PixelStore) -> TileContext:
        """What workers need to segment tiles."""
        return TileContext(
            image=self.image,
            model=self.model,
            typical=typical,
            engine=self.engine,
            pixels=pixels,
        )

    def _with_cells(
        self,
        tiles: Sequence[Tile],
        find: TileWork[Any],
        finding: TileProgress,
        pixels: PixelStore,
    ) -> tuple[list[TileWork[Any]], list[TileProgress]]:
        """The work that finds nuclei, and that which grows them; and the progress of both.

        The cells of a tile grow once all nuclei near it are known.
        """
        image = self.image
        nuclei = NucleiOfTiles(
            find.store,
            tiles,
            image.slide,
            self.config.cells,
            missing=find.tiles,
            max_diameter_um=self.config.segment.max_diameter_um,
        )
        made_from = {**image.fingerprint(), "nuclei": [tile.name for tile in tiles]}
        store = TileStore.open(self.layout.tiles(self.run, image.id), made_from)
        changing = [*find.tiles, *store.left_out(tiles)]  # beside them, other cells grow
        store.remove({near for tile in changing for near in nuclei.tiles_near(tile)})
        store.leave_none_out()
        missing = set(store.missing(tiles))
        done = len(tiles) - len(missing)
        growing = self._progress(len(tiles), done, Stage.GROWING_CELLS, finding)

        def not_found(tile: Tile, error: Exception) -> None:
            finding.one_failed(tile, error)
            store.leave_out(tile)
            nuclei.failed(tile)
            growing.one_less()

        def grown(tile: Tile) -> None:
            pixels.forget(tile)
            growing.one_more(tile)

        def not_grown(tile: Tile, error: Exception) -> None:
            find.store.check(tile)  # a worker can only say that it fails
            growing.one_failed(tile, error)

        find = replace(
            find,
            on_failed=not_found,
            then=lambda tile: [each for each in nuclei.ended(tile) if each in missing],
        )
        grow = TileWork(
            task=grow_tile,
            context=CellContext(image=image, config=self.config.cells, pixels=pixels),
            tiles=[tile for tile in tiles if tile in missing and nuclei.can_grow(tile)],
            prepared=nuclei,
            store=store,
            on_done=grown,
            on_failed=not_grown,
        )
        return [find, grow], [finding, growing]

    def _progress(
        self, total: int, done: int, stage: Stage, after: TileProgress | None = None
    ) -> TileProgress:
        """What follows a stage from tile to tile; it is shown ``after`` another one is over."""
        return TileProgress(
            image=self.image,
            total=total,
            done=done,
            show=counter(self.show, stage, self.entry.name),
            reopen=partial(Slide.open, self.entry, self.config.slide.mpp),
            after=after,
        )
