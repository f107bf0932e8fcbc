"""Images that a run would change nothing of, found by their files, in a moment.

What does the work is not imported here: `patchcl-qp run` on a finished project answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from patchcl_qupath import __version__
from patchcl_qupath.config import TMA_CORES, Config, EngineChoice, from_dict, to_dict
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ConfigError, ImageError
from patchcl_qupath.project import Project
from patchcl_qupath.project.names import is_compartment_first
from patchcl_qupath.slides.pixel_size import PixelSizeSource
from patchcl_qupath.slides.signature import signature_without_download
from patchcl_qupath.slides.stain_vectors import stains_to_measure
from patchcl_qupath.storage.files import digest, is_whole_parquet, read_json
from patchcl_qupath.storage.geojson import to_object
from patchcl_qupath.storage.layout import CHANGES, FIGURES, Layout
from patchcl_qupath.storage.records import (
    TILE_FORMAT,
    ChangesRecord,
    FiguresRecord,
    ImageOutcome,
    Provenance,
    ResultRecord,
    SlideProvenance,
    read_model_record,
    read_record,
    to_plain,
)


def provenance_of(*, model: str, engine: str, config: Config, within: Sequence[str]) -> Provenance:
    """What makes the nuclei of a run, from the digest of its ``model`` and its settings."""
    return Provenance(
        version=__version__,
        model=model,
        engine=engine,
        config=to_dict(config),
        within=list(within),
    )


def run_id(provenance: Provenance, *, of_cells: bool = True) -> str:
    """The name of a run: a digest of all that its finished tiles depend on.

    Those of nuclei alone, before cells are grown from them, do not depend on how these are.
    """
    settings = provenance.config
    tables = ["slide", "segment"]
    if of_cells and from_dict(settings).cells.are_grown:
        tables.append("cells")
    return digest({**to_plain(provenance), "config": [settings[table] for table in tables]})


def all_finished(
    project: Project,
    entries: Sequence[ImageEntry],
    *,
    config: Config,
    model_name: str,
    within: Sequence[str],
) -> list[ImageOutcome] | None:
    """The outcomes of the images if a run with this model would change none of them; else None.

    Where the settings leave the engine open, nuclei of any one engine are finished. Raises
    ConfigError for a name that no model can have.
    """
    model = _model_digest(project.layout.model(model_name))
    first = read_record(project.layout.result(entries[0].id), ResultRecord)
    if model is None or first is None or not _fits(first.engine, config.engine):
        return None
    provenance = provenance_of(model=model, engine=first.engine, config=config, within=within)
    outcomes = []
    for entry in entries:
        outcome = finished_outcome(project, entry, provenance)
        if outcome is None:
            return None
        outcomes.append(outcome)
    return outcomes


def is_reported(project: Project, entries: Sequence[ImageEntry]) -> bool:
    """Whether the report was written after what it shows of images: a run may stop before it."""
    layout = project.layout
    made = [
        path for entry in entries for path in (layout.result(entry.id), layout.outcome(entry.id))
    ]
    page = layout.report_page
    return page.exists() and not any(_is_newer(path, page) for path in made)


def finished_outcome(
    project: Project, entry: ImageEntry, provenance: Provenance
) -> ImageOutcome | None:
    """The outcome of an image that a run of ``provenance`` would change nothing of; else None.

    Its slide, pixel size, stains and regions are those of the nuclei on disk, all its files are
    there, and nothing was changed in QuPath since they were written into it.
    """
    layout, run = project.layout, run_id(provenance)
    result = read_record(layout.result(entry.id), ResultRecord)
    outcome = read_record(layout.outcome(entry.id), ImageOutcome)
    if result is None or outcome is None or entry.problem or result.failed_tiles:
        return None
    made_by = {name: getattr(result, name) for name in Provenance.__struct_fields__}
    if digest(made_by) != digest(to_plain(provenance)) or result.run != run or outcome.problem:
        return None
    try:
        if not (
            _is_written(layout, entry.id, result)
            and _is_same_slide(
                read_json(layout.tiles(run, entry.id) / "plan.json") or {}, result.slide, entry
            )
            and _is_same_in_qupath(project, entry, result, outcome.note)
        ):
            return None
    except (OSError, ImageError, ConfigError):  # the run finds it, and tells of it
        return None
    return msgspec.structs.replace(
        outcome,
        image=entry.name,
        tiles_resumed=outcome.tiles,
        seconds=0.0,
        main_seconds={},
        worker_seconds={},
        network_px=0,
        results=str(layout.results(entry.id)),
        preview=str(layout.preview(entry.id)),
        unchanged=True,
    )


def _model_digest(path: Path) -> str | None:
    """The digest of a model by its record, which is written just before its weights."""
    record = read_model_record(path)
    try:
        is_whole = path.stat().st_mtime_ns >= path.with_suffix(".json").stat().st_mtime_ns
    except OSError:
        return None
    return record.digest if record is not None and is_whole else None


def _fits(engine: str, choice: EngineChoice) -> bool:
    """Whether a person who asked for ``choice`` may have nuclei of an engine.

    Who asks for OpenVINO does not ask for 8 bits.
    """
    backend, *precision = engine.split()
    return choice == EngineChoice.AUTO or (backend == choice and precision != ["int8"])


def _is_written(layout: Layout, image: str, result: ResultRecord) -> bool:
    """Whether all that a run writes of an image is there; the outcome is written last.

    Raises OSError for a missing file.
    """
    figures = read_record(layout.figures(image) / FIGURES, FiguresRecord)
    if figures is None or figures.run != result.run:
        return False
    changes = read_record(layout.changes(image) / CHANGES, ChangesRecord)
    if changes is not None and changes.waits_for(result.model, result.run):
        return False
    pictures = [layout.preview(image), layout.figures(image) / "overview.jpg"]
    for path in (*(layout.results(image) / name for name in result.files), *pictures):
        if not path.stat().st_size:
            return False
    tables = [layout.nuclei(image)]
    tables += [layout.uncertainty(image)] if layout.uncertainty(image).exists() else []
    # A run that was stopped in between leaves an outcome of before, which may have the same id: the
    # tiles do not depend on what nuclei are classified by, nor on regions and stains of today.
    written = [layout.result(image), layout.figures(image) / FIGURES]
    last = max(path.stat().st_mtime_ns for path in written)
    return all(map(is_whole_parquet, tables)) and layout.outcome(image).stat().st_mtime_ns >= last


def _is_same_slide(plan: dict[str, Any], slide: SlideProvenance, entry: ImageEntry) -> bool:
    """Whether finished tiles are of the slide as it is now: pixels, choice of image, pixel size.

    What the project does not say of image and pixel size is as it was. Raises OSError for a missing
    slide.
    """
    signature = to_plain(signature_without_download(entry.path))
    if "sample" not in plan:  # of an earlier version
        signature.pop("sample", None)
    image = {"image": entry.series, "size": entry.size and [*entry.size]}
    same = {**signature, "form": TILE_FORMAT, **{k: v for k, v in image.items() if v is not None}}
    return (
        entry.series_name is None  # only the file tells which that is
        and {name: plan.get(name) for name in same} == same
        and _has_its_pixel_size(slide, entry)
    )


def _has_its_pixel_size(slide: SlideProvenance, entry: ImageEntry) -> bool:
    """Whether a slide that was segmented has the pixel size that its image has now."""
    if entry.mpp is not None:
        return slide.has_size(entry.mpp)
    if slide.mpp_source == PixelSizeSource.FALLBACK:
        fallback = entry.fallback_mpp
        return fallback is not None and slide.has_size((fallback, fallback))
    return slide.mpp_source != PixelSizeSource.QUPATH


def _is_same_in_qupath(
    project: Project, entry: ImageEntry, result: ResultRecord, note: str | None
) -> bool:
    """Whether stains and regions are those of the nuclei, and the nuclei those in QuPath.

    Where QuPath's own files would have to be read by QuPath, only their times are looked at.
    """
    settings = from_dict(result.config)
    if settings.cells.are_grown and result.is_compartment_first not in (
        None,
        is_compartment_first(project.qupath_version),
    ):
        return False  # another QuPath has saved the project since, whose names differ
    if settings.result.summarise or TMA_CORES in result.within:
        return False  # what is counted may have changed
    if project.backend.writes_into_qupath:
        summary = project.qupath_summary(entry)
        return (
            not result.within
            and summary.is_current
            and summary.is_saved
            and not summary.saved_later
            and not _is_newer(project.layout.stains(entry.id), project.layout.receipt(entry.id))
        )
    if result.within:
        entry = project.with_regions(entry, result.within)
    entry = project.with_stains(entry)
    return (
        [*map(to_object, entry.regions)] == [region.geometry for region in result.regions]
        and stains_to_measure(entry.stains, settings.slide.stain) == result.stains
        and (entry.note or "") in (note or "")
    )


def _is_newer(path: Path, other: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns > other.stat().st_mtime_ns
