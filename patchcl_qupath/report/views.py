"""What the templates of the report show of images and runs: texts, numbers, charts, pictures.

Views are made of what is found in a project (``found``). Nothing is escaped here: the templates
escape all that they are given.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

from patchcl_qupath.project import Project
from patchcl_qupath.report.charts import Chart, histogram
from patchcl_qupath.report.figures import CONTOUR_UNITS
from patchcl_qupath.report.found import FoundImage, FoundRun
from patchcl_qupath.storage.records import (
    FieldOfViewRecord,
    FiguresRecord,
    ResultRecord,
    RoiChangesRecord,
)

_LISTED = 10  # images at most whose names a run lists

P = ParamSpec("P")
T = TypeVar("T")


def title(project: Project) -> str:
    """The project's name: that of its folder, unless the file has one of its own."""
    stem = project.path.stem
    return project.path.resolve().parent.name if stem == "project" else stem


@dataclass(frozen=True, kw_only=True)
class Totals:
    """The project in numbers: images, those of them that have nuclei, their tissue and nuclei."""

    images: int
    done: int
    tissue_mm2: float
    nuclei: int

    @classmethod
    def of(cls, images: Sequence[FoundImage]) -> Totals:
        """Those of a project's images."""
        return cls(
            images=len(images),
            done=sum(image.nuclei is not None for image in images),
            tissue_mm2=sum(image.tissue_mm2 or 0 for image in images),
            nuclei=sum(image.nuclei or 0 for image in images),
        )


class _Measure(NamedTuple):
    """A column of numbers of the table: its name, an attribute of FoundImage, and its format."""

    name: str
    attribute: str
    format: str


_MEASURES = (
    _Measure("tissue mm²", "tissue_mm2", ".2f"),
    _Measure("found", "nuclei", ",d"),
    _Measure("added in QuPath", "added", ",d"),
    _Measure("left out", "left_out", ",d"),
    _Measure("found per mm²", "density", ",.0f"),
    _Measure("median area µm²", "median_area", ".1f"),
    _Measure("mean probability", "probability", ".2f"),
    _Measure("seconds", "seconds", ".1f"),
)


class Column(NamedTuple):
    """The head of a column; ``kind`` is its CSS class: page.js sorts a "number" by its value."""

    name: str
    kind: str


class Cell(NamedTuple):
    """A number: what it is sorted by, what is shown, and the length of a bar below it, if any."""

    value: str
    text: str
    bar_percent: float | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One image of the table."""

    id: str
    name: str
    cells: tuple[Cell, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The table of images."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, images: Sequence[FoundImage]) -> Table:
        """One row an image."""
        highest = max([image.density or 0 for image in images], default=0) or 1
        numbers = [Column(measure.name, "number") for measure in _MEASURES]
        return cls(
            columns=(Column("image", ""), *numbers, Column("warnings", "number warned")),
            rows=tuple(_row(image, highest) for image in images),
        )


def _row(image: FoundImage, highest_density: float) -> Row:
    return Row(
        id=image.id,
        name=image.name,
        cells=tuple(_cell(image, measure, highest_density) for measure in _MEASURES),
        warnings=image.warnings,
    )


def _cell(image: FoundImage, measure: _Measure, highest_density: float) -> Cell:
    value: float | None = attrgetter(measure.attribute)(image)
    if value is None:
        return Cell("", "\N{EN DASH}")
    bar = 100 * value / highest_density if measure.attribute == "density" else None
    return Cell(f"{value:.9g}", format(value, measure.format), bar)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture in the page itself: a data URI, its words, and (width, height) where known."""

    source: str
    alt: str
    size: tuple[int, int] | None = None

    @classmethod
    def of_file(cls, path: Path, alt: str, size: tuple[int, int] | None = None) -> Picture:
        """A PNG or JPEG file. Raises OSError."""
        mime = "image/png" if path.suffix == ".png" else "image/jpeg"
        encoded = b64encode(path.read_bytes()).decode()
        return cls(source=f"data:{mime};base64,{encoded}", alt=alt, size=size)

    @classmethod
    def of_base64(cls, jpeg: str, alt: str) -> Picture:
        """A JPEG in base64. Raises ValueError for anything but base64."""
        encoded = b64encode(b64decode(jpeg, validate=True)).decode()
        return cls(source=f"data:image/jpeg;base64,{encoded}", alt=alt)


@dataclass(frozen=True, kw_only=True)
class FovView:
    """A field of view: its picture, and contours on it as an SVG path in a frame of ``view``.

    ``cells`` is such a path of cells, empty without any.
    """

    record: FieldOfViewRecord
    picture: Picture
    view: tuple[int, int]
    contours: str
    cells: str


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures and charts of an image; ``mm`` is its (width, height)."""

    mm: tuple[float, float]
    has_regions: bool
    has_failed_tiles: bool
    overview: Picture
    density: Picture | None
    highest_density: int | None
    fields_of_view: tuple[FovView, ...]
    area: Chart
    stain_name: str
    stain: Chart


@dataclass(frozen=True, kw_only=True)
class RoiView:
    """A corrected ROI before and after refining; contours are SVG paths in a frame of ``view``."""

    record: RoiChangesRecord
    picture: Picture
    view: tuple[int, int]
    before: str
    corrected: str
    after: str


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """An image; ``damaged`` if there are files of pictures and figures that cannot be shown.

    ``rois`` are its corrected ROIs, if a refined model segmented it.
    """

    id: str
    name: str
    nuclei: int | None
    warnings: tuple[str, ...]
    pictures: Pictures | None
    rois: tuple[RoiView, ...]
    damaged: bool

    @classmethod
    def of(cls, image: FoundImage, number: int) -> ImageView:
        """The view of image ``number`` of the page."""
        pictures, damaged = None, image.damaged
        if image.result is not None and image.figures is not None:
            pictures = guarded(_pictures, image, image.result, image.figures, number=number)
            damaged = pictures is None
        rois = guarded(_rois, image)
        return cls(
            id=image.id,
            name=image.name,
            nuclei=image.nuclei,
            warnings=image.warnings,
            pictures=pictures,
            rois=rois or (),
            damaged=damaged or rois is None,
        )


def guarded(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """A section of the page; None where the files that it is made of are missing or damaged."""
    try:
        return make(*args, **kwargs)
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return None


def _pictures(
    image: FoundImage, result: ResultRecord, figures: FiguresRecord, *, number: int
) -> Pictures:
    density, stain = None, figures.stain
    if figures.fields_of_view is not None:
        alt = (
            f"{image.name}: density of nuclei, in colours from 0 to {figures.highest_density:,} "
            "per mm² of tissue"
        )
        density = Picture.of_file(image.pictures / "density.png", alt)
    overview_alt = f"{image.name}: the whole image, its tissue outlined"
    return Pictures(
        mm=figures.mm,
        has_regions=bool(result.regions),
        has_failed_tiles=bool(result.failed_tiles),
        overview=Picture.of_file(image.pictures / "overview.jpg", overview_alt),
        density=density,
        highest_density=figures.highest_density,
        fields_of_view=tuple(
            _field_of_view(record, image) for record in figures.fields_of_view or ()
        ),
        area=histogram(f"area-{number}", f"Areas of nuclei in {image.name}", "µm²", figures.area),
        stain_name=stain.name,
        stain=histogram(
            f"stain-{number}", f"{stain.name} of nuclei in {image.name}", "optical density", stain
        ),
    )


def _field_of_view(record: FieldOfViewRecord, image: FoundImage) -> FovView:
    number = int(record.picture.removeprefix("field-").removesuffix(".jpg"))  # no other path
    alt = (
        f"{record.kind} field of view of {image.name}: {record.nuclei} nuclei, at x {record.x:,}, "
        f"y {record.y:,} px"
    )
    size = (record.width, record.height)
    return FovView(
        record=record,
        picture=Picture.of_file(image.pictures / f"field-{number}.jpg", alt, size),
        view=(record.width * CONTOUR_UNITS, record.height * CONTOUR_UNITS),
        contours="".join(_path(contour) for contour in record.contours),
        cells="".join(_path(cell) for cell in record.cells),
    )


def _rois(image: FoundImage) -> tuple[RoiView, ...]:
    rois = image.changes.rois if image.changes else ()
    return tuple(_roi(record, image) for record in rois)


def _roi(record: RoiChangesRecord, image: FoundImage) -> RoiView:
    number = int(record.picture.removeprefix("roi-").removesuffix(".jpg"))  # no other path
    alt = (
        f"corrected ROI of {image.name}, at x {record.x:,.0f}, y {record.y:,.0f} px: "
        f"{record.in_words}"
    )
    view = (round(record.width * CONTOUR_UNITS), round(record.height * CONTOUR_UNITS))
    return RoiView(
        record=record,
        picture=Picture.of_file(image.changes_folder / f"roi-{number}.jpg", alt),
        view=view,
        before=_paths(record.before, record),
        corrected=_paths(record.corrected, record),
        after=_paths(record.after, record),
    )


def _paths(contours: Sequence[Sequence[float]], roi: RoiChangesRecord) -> str:
    """Contours at level 0 as an SVG path in the frame of a ROI."""
    corner = (roi.x, roi.y)
    return "".join(
        _path([round((v - corner[i % 2]) * CONTOUR_UNITS) for i, v in enumerate(contour)])
        for contour in contours
    )


def _path(contour: Sequence[int]) -> str:
    """The contour [x, y, x, y, ...] as steps from point to point, which are shorter to write."""
    steps = [b - a for a, b in zip(contour, contour[2:], strict=False)]
    return f"M{contour[0]} {contour[1]}l{' '.join(map(str, steps))}z".replace(" -", "-")


@dataclass(frozen=True, kw_only=True)
class RunView:
    """A run: what made its nuclei, by name, and its settings as JSON."""

    id: str
    provenance: dict[str, str]
    settings: str

    @classmethod
    def of(cls, run: FoundRun) -> RunView:
        """The view of a run; what is not known is left out."""
        result, names = run.result, run.images
        provenance = {
            "images": ", ".join(names) if len(names) <= _LISTED else str(len(names)),
            "patchcl-qupath": result.version,
            "model": result.model,
            "engine": result.engine,
            "analysis regions": ", ".join(result.within),
            "packages": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        }
        return cls(
            id=run.id,
            provenance={name: value for name, value in provenance.items() if value},
            settings=json.dumps(result.config, indent=2, ensure_ascii=False),
        )
