"""The data types of the package, and the functions that convert coordinates from frame to frame.

Arrays are ``(row, col[, channel])``; geometry is ``(x, y)``. Pixel ``i`` covers ``[i, i + 1)``
in both. There are three frames:

tile-local     pixels of one tile's ``read`` box; the origin is its top left corner
working grid   pixels of the whole image at the working resolution (``Slide.mpp``)
level 0        pixels of the image as QuPath shows it (its bounds already subtracted)

``tile_to_grid``, ``grid_to_level0`` and ``level0_to_grid`` convert geometry; contours as flat
arrays are converted by ``segmentation.rings.scaled``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import shapely
from numpy.typing import NDArray

Polygons = NDArray[np.object_]  # (N,) of shapely.Polygon; of what a person drew, MultiPolygon, too
AnyGeometry = TypeVar("AnyGeometry", shapely.Geometry, Polygons)
Labels = NDArray[np.integer[Any]]  # (H, W): 0 is background, each other value is one nucleus


@dataclass(frozen=True)
class Box:
    """A half-open rectangle of whole pixels: rows [row0, row1), columns [col0, col1)."""

    row0: int
    col0: int
    row1: int
    col1: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.row1 - self.row0, self.col1 - self.col0

    def holds(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether pixels (N,) lie in the box: (N,) bool."""
        in_rows = (self.row0 <= rows) & (rows < self.row1)
        return in_rows & (self.col0 <= cols) & (cols < self.col1)

    def within(self, outer: Box) -> tuple[slice, slice]:
        """The slices (rows, columns) of the box in an array of the pixels of ``outer``."""
        rows = slice(self.row0 - outer.row0, self.row1 - outer.row0)
        return rows, slice(self.col0 - outer.col0, self.col1 - outer.col0)

    def meets(self, other: Box) -> bool:
        """Whether the boxes have a pixel in common."""
        rows = self.row0 < other.row1 and other.row0 < self.row1
        return rows and self.col0 < other.col1 and other.col0 < self.col1

    def common(self, other: Box) -> Box:
        """The pixels of both boxes, which have some in common."""
        return Box(
            max(self.row0, other.row0),
            max(self.col0, other.col0),
            min(self.row1, other.row1),
            min(self.col1, other.col1),
        )

    def grow(self, margin: int, within: tuple[int, int]) -> Box:
        """The box grown by ``margin`` px on each side, clipped to an image of shape ``within``."""
        return Box(
            max(0, self.row0 - margin),
            max(0, self.col0 - margin),
            min(within[0], self.row1 + margin),
            min(within[1], self.col1 + margin),
        )

    def aligned(self, multiple: int, within: tuple[int, int]) -> Box:
        """The box grown to whole multiples of px, clipped to an image of shape ``within``."""
        return Box(
            self.row0 // multiple * multiple,
            self.col0 // multiple * multiple,
            min(within[0], -(-self.row1 // multiple) * multiple),
            min(within[1], -(-self.col1 // multiple) * multiple),
        )


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One unit of work on the working grid.

    The ``write`` boxes of an image's tiles do not overlap and cover all its tissue. ``read`` is
    ``write`` plus the halo, clipped to the image. A tile owns the nuclei whose centroid lies in its
    ``write`` box. ``row`` and ``col`` count tiles, not pixels.
    """

    row: int
    col: int
    read: Box
    write: Box

    @property
    def name(self) -> str:
        """A file name that sorts row by row."""
        return f"{self.row:05d}-{self.col:05d}"


class StainKind(StrEnum):
    """The type of a brightfield image in QuPath."""

    H_E = "h-e"
    H_DAB = "h-dab"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class StainVectors:
    """The stain vectors of an image in QuPath, for colour deconvolution.

    ``names`` are those of two or three stains; ``vectors`` the optical densities (R, G, B) of each,
    of any length; ``background`` (R, G, B) the intensity where there is no stain.
    """

    kind: StainKind
    names: tuple[str, ...]
    vectors: tuple[tuple[float, float, float], ...]
    background: tuple[float, float, float] = (255.0, 255.0, 255.0)


@dataclass(frozen=True)
class ImageEntry:
    """One image of a project, as the project describes it.

    ``mpp`` is (x, y) in µm/px at level 0 where the project has it, or an export of what QuPath
    shows: QuPath's value, which a person may have corrected, takes precedence over the file's own.
    ``fallback_mpp`` is the µm/px of images without a usable pixel size in QuPath or in the file, as
    given by --mpp. ``size`` is (width, height) at level 0 as QuPath saved it; ``series`` and
    ``series_name`` are the number and the name of the image in its file, where the project names
    them. ``use_bounds`` is false where QuPath ignores the bounds of the scanned area. ``problem``
    is the reason why the image cannot be segmented, with advice; ``note`` a remark for people.
    ``regions`` are the analysis regions, one geometry for each annotation. ``drawn`` are the
    annotations and TMA cores to count nuclei in.
    ``stains`` are the stain vectors that are set in QuPath, where they are known; QuPath's default
    ones where its type alone is, and is not H&E.
    """

    id: str
    name: str
    path: Path
    _: KW_ONLY
    mpp: tuple[float, float] | None = None
    fallback_mpp: float | None = None
    size: tuple[int, int] | None = None
    series: int | None = None
    series_name: str | None = None
    use_bounds: bool = True
    problem: str | None = None
    note: str | None = None
    regions: tuple[shapely.Geometry, ...] = ()  # level 0, valid; empty: the whole image
    drawn: tuple[DrawnRegion, ...] = ()
    stains: StainVectors | None = None

    @property
    def source(self) -> tuple[Path, int | None, str | None]:
        """The file, and which of its images this is: equal for entries of one slide."""
        return self.path.resolve(), self.series, self.series_name

    @property
    def pixels(self) -> tuple[object, ...]:
        """What is read of that: equal for an image and its duplicates in QuPath."""
        return *self.source, self.size, self.mpp, self.use_bounds


@dataclass(frozen=True, kw_only=True)
class DrawnRegion:
    """An annotation of an image in QuPath, or a core of its TMA grid that is not missing.

    ``geometry`` is a valid polygon or multipolygon at level 0; ``id`` that of the object in QuPath;
    ``name`` its name, of a core its label; ``class_name`` its class; ``case_id`` that of a core.
    Texts are "" where there is none.
    """

    geometry: shapely.Geometry
    id: str = ""
    name: str = ""
    class_name: str = ""
    is_core: bool = False
    case_id: str = ""


@dataclass(frozen=True)
class FailedTile:
    """A tile that could not be segmented: its rectangle at level 0, and why."""

    x: int
    y: int
    width: int
    height: int
    reason: str


def area_of_tiles(tiles: Iterable[FailedTile]) -> shapely.Geometry:
    """The area of tiles that failed, at level 0; empty without any."""
    corners = [(t.x, t.y, t.x + t.width, t.y + t.height) for t in tiles]
    return shapely.union_all([shapely.box(*each) for each in corners])


@dataclass(frozen=True)
class CorrectionRoi:
    """A rectangle of an image that a person is asked to correct, in px at level 0.

    ``id`` is a UUID; ``name`` and ``description`` are for people.
    """

    id: str
    name: str
    description: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class QuPathSummary:
    """What QuPath has of an image, as it was last saved.

    ``to_correct`` and ``corrected`` are the numbers of its ROIs of these classes. ``is_current``:
    the nuclei and ROIs on disk were imported; ``is_saved``: and the image was saved with them;
    ``saved_later``: it was saved again, some time after.
    """

    to_correct: int
    corrected: int
    is_current: bool
    is_saved: bool
    saved_later: bool


@dataclass(frozen=True)
class Corrections:
    """The ``rois`` of an image, at level 0, in which a person outlined all ``nuclei``.

    ROIs are valid polygons, nuclei such without holes; they may reach out of a ROI. ``ignored`` are
    areas of a class that QuPath ignores: neither nucleus nor background. ``left_out`` are the
    numbers of objects in ROIs that are no nuclei, by kind; ``notes`` remarks for people. ``ids``
    are those of the ROIs in QuPath, none where nobody knows them; pieces of one ROI share its id.
    """

    rois: tuple[shapely.Geometry, ...] = ()
    nuclei: tuple[shapely.Geometry, ...] = ()
    ignored: tuple[shapely.Geometry, ...] = ()
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Nuclei:
    """Nuclei as columns, one row each, in a fixed order.

    ``polygons`` (N,) valid shapely polygons without holes; ``measurements`` maps QuPath's name of
    a measurement to (N,) float32; ``uuids`` (N,) str, empty before they are known; ``cells`` (N,)
    such polygons of the cells that were grown from them, None where none were. Which frame the
    polygons are in is said by whoever hands them over. ``classes`` (N,) are QuPath classes such as
    ``Nucleus: Positive``; None where all nuclei have the class of the settings.
    """

    polygons: Polygons
    measurements: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    uuids: NDArray[np.str_] = field(default_factory=lambda: np.empty(0, dtype="U36"))
    cells: Polygons | None = None
    classes: NDArray[np.str_] | None = None

    def __post_init__(self) -> None:
        if not len(self.uuids):
            object.__setattr__(self, "uuids", np.full(len(self.polygons), "", dtype="U36"))

    def __len__(self) -> int:
        return len(self.polygons)

    def __getitem__(self, rows: slice | NDArray[np.bool_] | NDArray[np.intp]) -> Nuclei:
        """The nuclei of some rows, by slice, mask or index array."""
        return Nuclei(
            self.polygons[rows],
            {name: values[rows] for name, values in self.measurements.items()},
            self.uuids[rows],
            None if self.cells is None else self.cells[rows],
            None if self.classes is None else self.classes[rows],
        )

    def of_nucleus(self, name: str) -> NDArray[np.float32] | None:
        """A measurement (N,) of the nuclei themselves, such as ``Area µm^2``; None without it.

        Where there are cells, QuPath calls it ``Nucleus: Area µm^2``.
        """
        return self.measurements.get(name_of_nucleus(name, self.measurements))


def name_of_nucleus(name: str, names: Collection[str]) -> str:
    """What a measurement of nuclei is called among others: ``Nucleus: `` before it for cells."""
    return name if name in names else f"Nucleus: {name}"


@dataclass(frozen=True)
class UncertaintyGrid:
    """What was seen of an image in square bins, which begin at its top left corner.

    ``bin_size`` is (width, height) of a bin at level 0. One row for each bin with tissue, (N,)
    int64: ``rows`` and ``cols`` say which it is; ``points`` of tissue in it were looked at;
    ``entropy`` is the sum of their entropies, in thousandths of a bit; ``nuclei`` have their
    centroid in it. Whole numbers add up to the same however an image is cut into tiles.
    """

    bin_size: tuple[float, float]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    points: NDArray[np.int64]
    entropy: NDArray[np.int64]
    nuclei: NDArray[np.int64]


def place_text(x: float, y: float) -> str:
    """A place at level 0 in words, as QuPath shows it below the pointer."""
    return f"at x {x:.0f}, y {y:.0f} px"


def names_text(names: Sequence[str], most: int) -> str:
    """The first names of a list, ``most`` of them, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def distinct_names(
    names: Sequence[str], endings: Sequence[str], key: Callable[[str], str] = str.casefold
) -> list[str]:
    """Names (N,) that have no ``key`` in common: as files, no two that differ by case alone.

    One that another name has, too, gets its ending (N,), of which no two are equal.
    """
    found, shared = list(names), set[int]()
    while True:
        count = Counter(map(key, found))
        more = {i for i, name in enumerate(found) if count[key(name)] > 1} - shared
        if not more:
            return found
        # With its ending, a name may be that of yet another image: slide-1 of slide, number 1.
        shared |= more
        for i in more:
            found[i] = names[i] + endings[i]


def centroids_of(contours: Polygons) -> NDArray[np.float64]:
    """The centroids (N, 2) of contours (N,), in their frame.

    As in QuPath, they tell in which regions nuclei lie.
    """
    return np.asarray(shapely.get_coordinates(shapely.centroid(contours)), np.float64)


def tile_to_grid(polygons: Polygons, tile: Tile) -> Polygons:
    """Polygons from tile-local coordinates to the working grid."""
    origin = np.array([tile.read.col0, tile.read.row0], dtype=np.float64)
    return np.asarray(shapely.transform(polygons, lambda xy: xy + origin))


def grid_to_level0(polygons: Polygons, downsample: tuple[float, float]) -> Polygons:
    """Polygons from the working grid to level 0; ``downsample`` is level-0 px per px."""
    factor = np.asarray(downsample, dtype=np.float64)
    return np.asarray(shapely.transform(polygons, lambda xy: xy * factor))


def level0_to_grid(geometry: AnyGeometry, downsample: tuple[float, float]) -> AnyGeometry:
    """One geometry, or polygons, from level 0 to the working grid: the inverse of
    ``grid_to_level0``."""
    factor = np.asarray(downsample, dtype=np.float64)
    found: AnyGeometry = shapely.transform(geometry, lambda xy: xy / factor)
    return found
