"""What the JSON files below ``patchcl`` hold, each with a type.

Attributes have the names of the code, files those of version 0.1: where they differ, ``rename``
says it. A file that is missing, damaged or of another form reads as None; one with more in it than
is known here, as a later version may leave, reads well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from patchcl_qupath.datatypes import CorrectionRoi, FailedTile, StainVectors
from patchcl_qupath.storage.files import read_json, write_json
from patchcl_qupath.timing import Seconds


class Record(msgspec.Struct, frozen=True):
    """What is written to a JSON file, or printed as JSON."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


class FileSignature(Record, frozen=True, kw_only=True):
    """What changes when a file does, but not when it is moved."""

    bytes: int
    modified_ns: int


class SlideProvenance(Record, frozen=True, kw_only=True):
    """The slide that nuclei are of; ``mpp`` is (x, y) µm/px at level 0."""

    file: FileSignature
    mpp: tuple[float, float]


class RegionRecord(Record, frozen=True, kw_only=True):
    """An analysis region: GeoJSON at level 0, and the area of the tissue in it."""

    geometry: dict[str, Any]
    tissue_mm2: float


class Provenance(Record, frozen=True, kw_only=True):
    """What made nuclei: version, model (its digest), engine, settings, classes of regions."""

    version: str
    model: str
    engine: str
    config: dict[str, Any]
    within: list[str]


class ResultRecord(
    Record, frozen=True, kw_only=True, omit_defaults=True, rename={"failed_tiles": "holes"}
):
    """results/<image>/result.json: what made the nuclei of an image, and the files they are in.

    ``made`` is UTC in ISO 8601; ``files`` are those to import into QuPath.
    """

    run: str
    image: str
    made: str
    version: str
    model: str
    engine: str
    config: dict[str, Any]
    within: list[str]
    tissue_mm2: float
    slide: SlideProvenance
    model_name: str | None = None
    stains: StainVectors
    regions: tuple[RegionRecord, ...] = ()
    failed_tiles: tuple[FailedTile, ...]
    nuclei: int
    object_type: str
    files: tuple[str, ...]


class RemovedRecord(Record, frozen=True, kw_only=True):
    """result.json once the nuclei were removed (UTC), for the import script."""

    removed: str
    nuclei: int = 0
    files: tuple[str, ...] = ()


class ImageOutcome(
    Record,
    frozen=True,
    kw_only=True,
    rename={"tiles_resumed": "tiles_taken_over", "failed_tiles": "holes"},
):
    """What became of one image in a run: ``problem`` is None unless it failed.

    Where it has ``failed_tiles``, the nuclei of all other tiles are written. ``seconds`` are wall
    time; ``main_seconds`` those of the run itself by stage, ``worker_seconds`` of all workers
    together. ``network_px`` are the working pixels that the network saw.
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
    main_seconds: Seconds = {}
    worker_seconds: Seconds = {}
    network_px: int = 0


class RunRecord(Record, frozen=True, kw_only=True):
    """runs/<run>/run.json: what was run, with what, and what became of each image so far."""

    version: str
    model: str
    engine: str
    config: dict[str, Any]
    within: list[str]
    versions: dict[str, str]
    training: dict[str, Any]
    images: list[ImageOutcome]


class ModelRecord(Record, frozen=True, kw_only=True):
    """models/NAME.json: a model without its weights."""

    digest: str
    network: str
    channel: int
    inverted: bool
    threshold: float
    config: dict[str, Any]
    training: dict[str, Any]


class ChannelsRecord(Record, frozen=True, kw_only=True):
    """A crop, and PatchCL's confidence channels on it: JPEGs in base64.

    ``chosen`` is the channel that shows nuclei; where ``inverted``, it is low on them.
    """

    crop: str
    confidences: list[str]
    chosen: int
    inverted: bool


class PatchCLLog(Record, frozen=True, kw_only=True):
    """How PatchCL was trained.

    ``converged_at`` is a step, None where training ended before; ``hematoxylin_correlation`` is
    that of each channel. Loss and mean distances of patches are those of each step that was not
    skipped.
    """

    steps: int
    skipped_steps: int
    converged_at: int | None
    hematoxylin_correlation: list[float]
    loss: list[float]
    positive_positive: list[float]
    positive_negative: list[float]
    channels: ChannelsRecord


class SelfTrainingLog(
    Record,
    frozen=True,
    kw_only=True,
    rename={"nucleus_fraction": "sure_nucleus", "labelled_fraction": "known"},
):
    """How the network that separates nuclei was trained, after PatchCL.

    ``nucleus_fraction`` and ``labelled_fraction`` are those of the pixels of the training crops
    that the pseudo-labels call nucleus, and either nucleus or background. ``loss`` is that of each
    step. ``seconds_for_batches`` are those in which the network waited for its next batch.
    """

    patchcl: PatchCLLog
    nucleus_fraction: float
    labelled_fraction: float
    loss: list[float]
    seconds: float
    seconds_for_batches: float


class CDCLLog(SelfTrainingLog, frozen=True, kw_only=True):
    """How a model was refined: its own training, and the losses of each step of CDCL by name.

    ``refined_from`` is the digest of the model that it began with.
    """

    cdcl: list[dict[str, float]]
    refined_from: str


TrainingLog = PatchCLLog | SelfTrainingLog | CDCLLog


def training_log(plain: dict[str, Any]) -> TrainingLog | None:
    """The log of a model's file; None where it has none. Raises msgspec.ValidationError."""
    if not plain:
        return None
    if "cdcl" in plain:
        return msgspec.convert(plain, CDCLLog)
    if "patchcl" in plain:
        return msgspec.convert(plain, SelfTrainingLog)
    return msgspec.convert(plain, PatchCLLog)


class Histogram(Record, frozen=True, kw_only=True):
    """Counts in equal bars from 0 to ``highest``; the last one counts what lies beyond, too."""

    median: float | None
    highest: int | float
    counts: list[int]


class StainHistogram(Record, frozen=True, kw_only=True):
    """The histogram of a stain's mean optical density."""

    name: str
    median: float | None
    highest: int | float
    counts: list[int]


class FieldOfViewRecord(
    Record, frozen=True, kw_only=True, rename={"contours": "outlines", "entropy": "doubt"}
):
    """A field of view that the report shows.

    ``kind`` is why; ``picture`` a file beside; ``x``, ``y`` px at level 0; ``width``, ``height``
    working px; ``um`` its width in µm; ``density`` nuclei per mm² of tissue; ``entropy`` the mean
    predictive entropy, in bits. ``contours`` are [x, y, x, y, ...] in thirds of a working px.
    """

    kind: str
    picture: str
    x: int
    y: int
    width: int
    height: int
    um: int
    nuclei: int
    density: int
    entropy: float
    contours: list[list[int]]


class FiguresRecord(
    Record, frozen=True, kw_only=True, omit_defaults=True, rename={"fields_of_view": "fields"}
):
    """report/images/<image>/figures.json: what the report shows of an image beside pictures.

    ``mm`` is (width, height); ``probability`` the mean over nuclei; ``highest_density``, nuclei per
    mm², has the last colour of the density map, which is there if this is.
    """

    run: str
    nuclei: int
    mm: tuple[float, float]
    area: Histogram
    stain: StainHistogram
    probability: float | None
    highest_density: int | None = None
    fields_of_view: tuple[FieldOfViewRecord, ...] | None = None


class RoisRecord(Record, frozen=True, kw_only=True, rename={"rois": "fields"}):
    """fields/<image>.json: the ROIs of an image that are to be corrected."""

    made: str
    rois: tuple[CorrectionRoi, ...]


def file_signature(path: Path) -> FileSignature:
    """Size and time of a file. Raises OSError."""
    stat = path.stat()
    return FileSignature(bytes=stat.st_size, modified_ns=stat.st_mtime_ns)


def to_plain(record: Any) -> Any:
    """A record, or what holds some, as dictionaries, lists and numbers, for JSON."""
    return msgspec.to_builtins(record)


def write_record(path: Path, record: Record, compact: bool = False) -> None:
    """Write a record as a JSON file, in one go. Raises StorageError."""
    write_json(path, to_plain(record), compact)


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record of a JSON file; None where there is none of that kind."""
    try:
        return msgspec.convert(read_json(path), kind)
    except msgspec.ValidationError:
        return None


def read_result(path: Path) -> ResultRecord | RemovedRecord | None:
    """What made an image's nuclei, or that they were removed; None where neither is known."""
    return read_record(path, ResultRecord) or read_record(path, RemovedRecord)
