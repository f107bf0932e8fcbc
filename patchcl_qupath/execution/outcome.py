"""What became of an image: its tiles one by one, those that failed, and what to say of it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import FailedTile, ImageEntry, Tile
from patchcl_qupath.errors import ImageError, PatchCLError, SlideError
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.timing import Seconds

GIVE_UP = 10  # tiles of an image, if none of it succeeds


@dataclass(frozen=True)
class ImageResult:
    """What became of one image: ``problem`` is None unless it failed.

    Where it has ``failed_tiles``, the nuclei of all other tiles are written.
    """

    id: str
    image: str
    problem: str | None = None
    note: str | None = None
    tissue_mm2: float = 0.0
    nuclei: int = 0
    tiles: int = 0
    tiles_resumed: int = 0
    failed_tiles: tuple[FailedTile, ...] = ()
    results: str | None = None
    preview: str | None = None
    seconds: float = 0.0
    main_seconds: Seconds = field(default_factory=dict)  # of the run itself, by stage
    worker_seconds: Seconds = field(default_factory=dict)  # of all workers together
    network_px: int = 0  # working pixels that the network saw


@dataclass
class TileProgress:
    """How many of an image's tiles are done, and where those are that failed.

    ``show`` is told of each, (done, of how many). ``reopen`` raises SlideError for a slide that was
    there when the run began, and is not any more.
    """

    image: PreparedImage
    tiles: int
    done: int
    show: Callable[[int, int], None]
    reopen: Callable[[], object]
    failed_tiles: list[FailedTile] = field(default_factory=list)

    def begin(self) -> None:
        """Show what was done before."""
        self.show(self.done, self.tiles)

    def one_more(self) -> None:
        """A tile is done."""
        self.done += 1
        self.show(self.done + len(self.failed_tiles), self.tiles)

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
        if not self.failed_tiles and not isinstance(error, PatchCLError):
            traceback.print_exception(error)
        self.failed_tiles.append(_failed_tile(tile, self.image.slide, error))
        if not self.done and len(self.failed_tiles) == min(GIVE_UP, self.tiles):
            raise ImageError(f"{name}: no tile can be segmented: {self.failed_tiles[0].reason}")
        self.show(self.done + len(self.failed_tiles), self.tiles)

    def in_order(self) -> tuple[FailedTile, ...]:
        """The holes, from top to bottom."""
        return tuple(sorted(self.failed_tiles, key=lambda failed: (failed.y, failed.x)))


def note(
    entry: ImageEntry, image: PreparedImage, count: int, has_tissue: bool, settings: ResultConfig
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
    if settings.kind(count) == "detection" and settings.object_type == "auto":
        notes.append(f"more than {settings.max_annotations:,} nuclei: written as detections")
    return "; ".join(notes) or None


def internal_error(error: Exception) -> str:
    """A fault of ours, in words."""
    return f"{type(error).__name__}: {error} (a fault of this program)"


def _failed_tile(tile: Tile, slide: Slide, error: Exception) -> FailedTile:
    """What a tile that failed leaves out of the image."""
    (x, y), box = slide.downsample, tile.write
    height, width = box.shape
    reason = str(error) if isinstance(error, PatchCLError) else internal_error(error)
    return FailedTile(
        round(x * box.col0), round(y * box.row0), round(x * width), round(y * height), reason
    )
