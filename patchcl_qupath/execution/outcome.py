"""What became of an image: its tiles one by one, those that failed, and what to tell a person."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from msgspec.structs import asdict

from patchcl_qupath.config import Config, ObjectType
from patchcl_qupath.datatypes import FailedTile, ImageEntry, Tile
from patchcl_qupath.errors import FORESEEN, ImageError, SlideError, StorageError, reason_of
from patchcl_qupath.slides.pixel_size import PixelSize
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import (
    ImageOutcome,
    Provenance,
    RunRecord,
    read_record,
    write_record,
)

logger = logging.getLogger(__name__)

GIVE_UP = 10  # tiles of an image, if none of it succeeds
COARSE_UM = 1.5  # of a pixel, of which a nucleus is a few wide: others are found than at 0.5 µm
_PACKAGES = (
    "torch",
    "openvino",
    "numpy",
    "numba",
    "scipy",
    "scikit-image",
    "shapely",
    "tiffslide",
    "tifffile",
    "openslide-python",
    "openslide-bin",
    "imagecodecs",
    "simplejpeg",
    "zarr",
    "dask",
)


@dataclass(kw_only=True)
class TileProgress:
    """How many of an image's tiles are done, and which failed.

    ``show`` is called with (done, total) after each tile, but not before the progress ``after``, of
    an earlier stage, has ended; ``reopen`` raises SlideError for a slide that was there when the
    run began, and is not any more.
    """

    image: PreparedImage
    total: int
    done: int
    show: Callable[[int, int], None]
    reopen: Callable[[], object]
    after: TileProgress | None = None
    failed: list[FailedTile] = field(default_factory=list)

    @property
    def ended(self) -> int:
        """How many tiles are done, or failed."""
        return self.done + len(self.failed)

    def tell(self) -> None:
        """Show how far it is."""
        if self.after is None or self.after.ended == self.after.total:
            self.show(self.ended, self.total)

    def one_more(self, tile: Tile) -> None:
        """A tile is done."""
        self.done += 1
        self.tell()

    def one_failed(self, tile: Tile, error: Exception) -> None:
        """A tile was given up. Raises ImageError if there is no use in going on."""
        name = self.image.slide.name
        try:
            self.reopen()
        except SlideError as gone:
            raise SlideError(
                f"{gone}. It could be read when the run began: once it can be again, run again; "
                "finished tiles are kept"
            ) from gone
        if not self.failed and not isinstance(error, FORESEEN):
            logger.error("%s: internal error in tile %s", name, tile.name, exc_info=error)
        self.failed.append(_failed_tile(tile, self.image.slide, error))
        self._check_hope()
        self.tell()

    def one_less(self) -> None:
        """A tile is not to be done. Raises ImageError if there is no use in going on."""
        self.total -= 1
        self._check_hope()
        self.tell()

    def _check_hope(self) -> None:
        """Raise ImageError if all tiles failed, or so many that all will."""
        if self.failed and not self.done and len(self.failed) >= min(GIVE_UP, self.total):
            name, reason = self.image.slide.name, self.failed[0].reason
            raise ImageError(f"{name}: no tile can be segmented: {reason}")


def in_order(failed: Sequence[FailedTile]) -> tuple[FailedTile, ...]:
    """Failed tiles, from top to bottom."""
    return tuple(sorted(failed, key=lambda tile: (tile.y, tile.x)))


def note(
    entry: ImageEntry, image: PreparedImage, count: int, has_tissue: bool, settings: Config
) -> str | None:
    """What a person should know of an image's nuclei, ``count`` of them; None if nothing."""
    notes = [entry.note] if entry.note else []
    if entry.stains not in (None, image.stains):
        notes.append(
            f"measured {' and '.join(image.stains.names)} as asked for, with QuPath's default "
            f"vectors: its own stains in QuPath are {' and '.join(entry.stains.names)}"
        )
    if not has_tissue:
        notes.append("no tissue in its regions" if entry.regions else "no tissue found, only glass")
    elif image.is_green:
        notes.append("most of it is green as ink, which no stain of nuclei is: left out there")
    else:
        if image.is_grey:
            notes.append("most of it is grey: found by shape, with stains that are not told apart")
        if max(image.slide.mpp_level0) > COARSE_UM:
            size = PixelSize(image.slide.mpp_source, image.slide.mpp_level0)
            notes.append(f"pixels of {size} µm: too coarse to tell nuclei apart, or to count them")
        if not count:
            notes.append("no nucleus found in its tissue")
    result = settings.result
    is_auto = result.object_type is ObjectType.AUTO and not result.positive
    if is_auto and settings.kind(count) == ObjectType.DETECTION:
        notes.append(f"more than {result.max_annotations:,} nuclei: written as detections")
    return "; ".join(notes) or None


def failed_image(entry: ImageEntry, error: Exception, results: str | None = None) -> ImageOutcome:
    """The outcome of an image that failed; ``results`` is the folder of its nuclei, if it did so
    once these were written."""
    if not isinstance(error, FORESEEN):
        logger.error("%s: internal error", entry.name, exc_info=error)
    problem = reason_of(error)
    if entry.name not in problem:
        problem = f"{entry.name}: {problem}"
    return ImageOutcome(id=entry.id, image=entry.name, problem=problem, results=results)


def write_outcome(layout: Layout, outcome: ImageOutcome) -> None:
    """Record what became of an image, unless it stayed as it was."""
    with suppress(StorageError):  # an image on a full disk has said so already
        if not outcome.unchanged:
            write_record(layout.outcome(outcome.id), outcome)


def write_run(
    layout: Layout,
    run: str,
    provenance: Provenance,
    training: dict[str, Any],
    outcomes: Sequence[ImageOutcome],
) -> None:
    """Record a run, with what became of its images so far: also before it was last continued."""
    path = layout.run_record(run)
    before = read_record(path, RunRecord)
    images = {outcome.id: outcome for outcome in before.images} if before else {}
    images |= {outcome.id: outcome for outcome in outcomes}
    record = RunRecord(
        **asdict(provenance),
        versions=package_versions(),
        training=training,
        images=list(images.values()),
    )
    with suppress(StorageError):  # an image on a full disk has said so already
        write_record(path, record)


@cache
def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that nuclei depend on, as far as they are here."""
    found = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found | {"python": platform.python_version()}


def _failed_tile(tile: Tile, slide: Slide, error: Exception) -> FailedTile:
    """What a tile that failed leaves out of the image: up to where the next one begins."""
    (x, y), box = slide.downsample, tile.write
    left, top = round(x * box.col0), round(y * box.row0)
    return FailedTile(
        x=left,
        y=top,
        width=round(x * box.col1) - left,
        height=round(y * box.row1) - top,
        reason=reason_of(error),
    )
