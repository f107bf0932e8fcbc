"""What the templates of the report show of images and runs: texts, numbers, charts, pictures.

Views are made of what is found in a project (``found``). Nothing is escaped here: the templates
escape all that they are given.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, ParamSpec, TypeVar

from patchcl_qupath.config import GRADES
from patchcl_qupath.datatypes import place_text
from patchcl_qupath.project import Project
from patchcl_qupath.report.charts import Chart, Mark, Stack, histogram, stacked
from patchcl_qupath.report.figures import CONTOUR_UNITS
from patchcl_qupath.report.found import FoundImage, FoundRun
from patchcl_qupath.storage.records import (
    FieldOfViewRecord,
    FiguresRecord,
    PositivityFigures,
    ResultRecord,
    RoiChangesRecord,
    Summary,
)

_DENSITIES = ("Mean", "Min", "Max", "Median", "mean", "min", "max")
_LISTED = 10  # images at most whose names a run lists

P = ParamSpec("P")
T = TypeVar("T")
Of = TypeVar("Of")  # what a row of a table is of


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


@dataclass(frozen=True)
class _Measure(Generic[Of]):
    """A column of numbers: its name, the number of a row, None where it has none, and its format.

    One that is ``optional`` is left out where no row has a number in it. With ``bars``, the length
    of a bar shows each number.
    """

    name: str
    value: Callable[[Of], float | None]
    format: str
    optional: bool = False
    bars: bool = False


_MEASURES = (
    _Measure[FoundImage]("tissue mm²", lambda image: image.tissue_mm2, ".2f"),
    _Measure[FoundImage]("found", lambda image: image.nuclei, ",.0f"),
    _Measure[FoundImage]("added in QuPath", lambda image: image.added, ",.0f"),
    _Measure[FoundImage]("left out", lambda image: image.left_out, ",.0f"),
    _Measure[FoundImage]("found per mm²", lambda image: image.density, ",.0f", bars=True),
    _Measure[FoundImage]("positive %", lambda image: image.positive_percent, ".1f", optional=True),
    _Measure[FoundImage]("H-score", lambda image: image.h_score, ".0f", optional=True),
    _Measure[FoundImage]("median area µm²", lambda image: image.median_area, ".1f"),
    _Measure[FoundImage]("mean probability", lambda image: image.probability, ".2f"),
    _Measure[FoundImage]("seconds", lambda image: image.seconds, ".1f"),
)
_REGION_MEASURES = (
    _Measure[Summary]("tissue mm²", lambda region: region.tissue_mm2, ".3f"),
    _Measure[Summary]("nuclei", lambda region: region.nuclei, ",.0f"),
    _Measure[Summary]("nuclei per mm²", lambda region: region.per_mm2, ",.0f", bars=True),
    _Measure[Summary]("positive %", lambda region: region.positive_percent, ".1f", optional=True),
    _Measure[Summary]("H-score", lambda region: region.h_score, ".0f", optional=True),
    _Measure[Summary](
        "Allred",
        lambda region: None if region.allred is None else region.allred.score,
        ".0f",
        optional=True,
    ),
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
        measures = _known(_MEASURES, images)
        numbers = [Column(measure.name, "number") for measure in measures]
        return cls(
            columns=(Column("image", ""), *numbers, Column("warnings", "number warned")),
            rows=tuple(
                Row(
                    id=image.id,
                    name=image.name,
                    cells=tuple(_cell(image, measure, highest) for measure in measures),
                    warnings=image.warnings,
                )
                for image in images
            ),
        )


def _known(measures: Sequence[_Measure[Of]], rows: Sequence[Of]) -> list[_Measure[Of]]:
    """The columns of a table, without optional ones that are empty."""
    return [
        measure
        for measure in measures
        if not measure.optional or any(measure.value(row) is not None for row in rows)
    ]


def _cell(row: Of, measure: _Measure[Of], highest_density: float) -> Cell:
    value = measure.value(row)
    if value is None:
        return Cell("", "\N{EN DASH}")
    bar = 100 * value / highest_density if measure.bars else None
    return Cell(f"{value:.9g}", format(value, measure.format), bar)


class RegionRow(NamedTuple):
    """One region or TMA core: the image that it is in, its texts and its numbers."""

    image_id: str
    image: str
    name: str
    texts: tuple[str, ...]
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class RegionTable:
    """The table of regions, or of TMA cores."""

    id: str
    heading: str
    columns: tuple[Column, ...]
    rows: tuple[RegionRow, ...]

    @classmethod
    def of(cls, images: Sequence[FoundImage], kind: str) -> RegionTable | None:
        """One row for each; None without any. ``kind`` is that of summaries: region or core."""
        found = [
            (image, summary)
            for image in images
            for summary in (image.result.summaries if image.result else ())
            if summary.kind == kind
        ]
        if not found:
            return None
        summaries = [summary for _, summary in found]
        measures = _known(_REGION_MEASURES, summaries)
        highest = max(summary.per_mm2 or 0 for summary in summaries) or 1
        label, text = ("region", "class") if kind == "region" else ("core", "case")
        numbers = [Column(measure.name, "number") for measure in measures]
        return cls(
            id=f"{kind}s",
            heading="Regions" if kind == "region" else "TMA cores",
            columns=(Column(label, ""), Column("image", ""), Column(text, ""), *numbers),
            rows=tuple(
                RegionRow(
                    image_id=image.id,
                    image=image.name,
                    name=summary.name or _place(summary),
                    texts=(summary.class_name if kind == "region" else summary.case_id,),
                    cells=tuple(_cell(summary, measure, highest) for measure in measures),
                )
                for image, summary in found
            ),
        )


def _place(summary: Summary) -> str:
    """What an annotation without a name is called."""
    if summary.x is None or summary.y is None:
        return "annotation"
    return place_text(summary.x, summary.y)


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
    """A field of view: its picture, and contours on it as SVG paths in a frame of ``view``.

    There is a path for each class of nuclei, with the CSS class of that. ``cells`` is a path of
    cells, empty without any.
    """

    record: FieldOfViewRecord
    picture: Picture
    view: tuple[int, int]
    contours: tuple[tuple[str, str], ...]
    cells: str


@dataclass(frozen=True, kw_only=True)
class PositivityView:
    """The classes of nuclei of an image: a map, a table of numbers, and histograms by class.

    ``classes`` are CSS classes, names, numbers of nuclei, and percentages.
    """

    picture: Picture
    classes: tuple[tuple[str, str, int, float], ...]
    judged: str
    measurement: Chart
    area: Chart


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
    positivity: PositivityView | None


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
            _field_of_view(record, image, figures.positivity)
            for record in figures.fields_of_view or ()
        ),
        area=histogram(f"area-{number}", f"Areas of nuclei in {image.name}", "µm²", figures.area),
        stain_name=stain.name,
        stain=histogram(
            f"stain-{number}", f"{stain.name} of nuclei in {image.name}", "optical density", stain
        ),
        positivity=_positivity(image, figures.positivity, number) if figures.positivity else None,
    )


def _positivity(image: FoundImage, figures: PositivityFigures, number: int) -> PositivityView:
    """The classes of nuclei of an image."""
    total = sum(found.nuclei for found in figures.classes) or 1
    kinds = [kind_of_class(found.name) for found in figures.classes]
    by_value = [
        Stack(found.name, kind, found.measurement)
        for found, kind in zip(figures.classes, kinds, strict=True)
    ]
    by_area = [
        Stack(found.name, kind, found.area)
        for found, kind in zip(figures.classes, kinds, strict=True)
    ]
    alt = f"{image.name}: the share of positive nuclei, in colours from 0 to 100 %"
    limits = " and ".join(f"{threshold:.3g}" for threshold in figures.thresholds)
    return PositivityView(
        picture=Picture.of_file(image.pictures / "positivity.png", alt),
        classes=tuple(
            (kind, found.name, found.nuclei, 100 * found.nuclei / total)
            for found, kind in zip(figures.classes, kinds, strict=True)
        ),
        judged=f"{figures.measurement}, from {limits}",
        measurement=stacked(
            f"positivity-{number}",
            f"{figures.measurement} of nuclei in {image.name}, by class",
            "optical density" if figures.measurement.endswith(_DENSITIES) else "",
            highest=figures.highest,
            stacks=by_value,
            marks=[Mark(threshold, f"{threshold:.3g}") for threshold in figures.thresholds],
        ),
        area=stacked(
            f"class-area-{number}",
            f"Areas of nuclei in {image.name}, by class",
            "µm²",
            highest=figures.highest_area,
            stacks=by_area,
            marks=[],
        ),
    )


def kind_of_class(name: str) -> str:
    """The CSS class of a class of nuclei: negative, positive, or grade-1 to grade-3."""
    last = name.rpartition(": ")[2]
    return f"grade-{last[0]}" if last in GRADES else last.lower()


def _field_of_view(
    record: FieldOfViewRecord, image: FoundImage, positivity: PositivityFigures | None
) -> FovView:
    number = int(record.picture.removeprefix("field-").removesuffix(".jpg"))  # no other path
    place = place_text(record.x, record.y)
    alt = f"{record.kind} field of view of {image.name}: {record.nuclei} nuclei, {place}"
    size = (record.width, record.height)
    return FovView(
        record=record,
        picture=Picture.of_file(image.pictures / f"field-{number}.jpg", alt, size),
        view=(record.width * CONTOUR_UNITS, record.height * CONTOUR_UNITS),
        contours=tuple(_contours(record, positivity)),
        cells="".join(_path(cell) for cell in record.cells),
    )


def _contours(
    record: FieldOfViewRecord, positivity: PositivityFigures | None
) -> Iterator[tuple[str, str]]:
    """The contours of a field of view by the CSS classes of their nuclei."""
    if positivity is None or not record.classes:
        yield "", "".join(_path(contour) for contour in record.contours)
        return
    for code, found in enumerate(positivity.classes):
        of_class = [
            _path(contour)
            for contour, its_code in zip(record.contours, record.classes, strict=True)
            if its_code == code
        ]
        if of_class:
            yield kind_of_class(found.name), "".join(of_class)


def _rois(image: FoundImage) -> tuple[RoiView, ...]:
    rois = image.changes.rois if image.changes else ()
    return tuple(_roi(record, image) for record in rois)


def _roi(record: RoiChangesRecord, image: FoundImage) -> RoiView:
    number = int(record.picture.removeprefix("roi-").removesuffix(".jpg"))  # no other path
    alt = f"corrected ROI of {image.name}, {place_text(record.x, record.y)}: {record.in_words}"
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
