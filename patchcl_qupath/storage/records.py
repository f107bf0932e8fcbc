"""The JSON files below ``patchcl``, each as a typed record.

Keys in files, and in the output of ``--json``, are those of version 0.1; ``rename`` maps attributes
to keys where the names differ. A file that is missing, damaged or of another form reads as None.
Unknown keys, which a later version may write, are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from patchcl_qupath.datatypes import CorrectionRoi, FailedTile, StainVectors, place_text
from patchcl_qupath.errors import StorageError
from patchcl_qupath.storage.files import digest, read_json, write_json
from patchcl_qupath.timing import Seconds

_SAME_SIZE = 1e-3  # of pixels, relative: QuPath and we may read a file's in other digits
TILE_FORMAT = 11  # version of the content of a finished tile


class Record(msgspec.Struct, frozen=True):
    """The base of records that are written to JSON files, or printed as JSON."""


AnyRecord = TypeVar("AnyRecord", bound=Record)


class FileSignature(Record, frozen=True, kw_only=True, omit_defaults=True):
    """Size and time of a file: they change when the file does, but not when it is moved.

    Of a slide of several files, they are the size of all, and the time of the last one. ``sample``
    is a checksum of some of the content; None in records of earlier versions, and for files that
    are known without.
    """

    bytes: int
    modified_ns: int
    sample: int | None = None

    def is_of(self, other: FileSignature) -> bool:
        """Whether it is that of the same file, as far as both tell."""
        return self.modified_ns == other.modified_ns and self.has_content_of(other)

    def has_content_of(self, other: FileSignature) -> bool:
        """Whether it may be that of a copy, whose time is another one."""
        samples = {self.sample, other.sample} - {None}
        return self.bytes == other.bytes and len(samples) < 2


class SlideProvenance(Record, frozen=True, kw_only=True, omit_defaults=True):
    """The slide in which nuclei were segmented; ``mpp`` is (x, y) µm/px at level 0, ``size`` is
    (width, height) there, None of a run of version 0.1.

    Contours are relative to the bounds of the scanned area, as in QuPath; ``origin`` (x, y) is
    where these begin in the file, in px at level 0, None of an earlier run.
    ``mpp_source`` is where that is given: QuPath, OME-XML, vendor, TIFF resolution, ImageJ, --mpp.
    """

    file: FileSignature
    mpp: tuple[float, float]
    mpp_source: str | None = None
    size: tuple[int, int] | None = None
    origin: tuple[int, int] | None = None

    def has_size(self, mpp: tuple[float, float] | None) -> bool:
        """Whether lengths in µm are as with a pixel size (x, y), or that is not known."""
        return are_one_size(self.mpp, mpp or self.mpp)


def are_one_size(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two pixel sizes (x, y) are the same but for their digits."""
    pairs = zip(one, other, strict=True)
    return all(math.isclose(*pair, rel_tol=_SAME_SIZE) for pair in pairs)


class RegionRecord(Record, frozen=True, kw_only=True):
    """An analysis region: GeoJSON at level 0, and the area of the tissue in it, in mm².

    Tissue in failed tiles is left out of it.
    """

    geometry: dict[str, Any]
    tissue_mm2: float


class Quartiles(Record, frozen=True, kw_only=True):
    """The quartiles of a measurement; of no nuclei there are none."""

    lower: float
    median: float
    upper: float


class ClassSummary(Record, frozen=True, kw_only=True):
    """The number of nuclei of a class, and per mm² of tissue, or of area where that is not known.

    ``per_mm2`` is None where the area is 0.
    """

    nuclei: int
    per_mm2: float | None


class AllredScore(Record, frozen=True, kw_only=True):
    """The Allred score: that of the proportion of positive nuclei, 0 to 5, and of their intensity.

    The intensity is 0 to 3. D. C. Allred et al., Mod Pathol 11 (1998).
    """

    proportion: int
    intensity: int

    @property
    def score(self) -> int:
        """The sum of both, 0 to 8."""
        return self.proportion + self.intensity


class Summary(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What is in an image, an annotation or a TMA core, its ``kind``: image, region or core.

    ``name`` is that of an image or an annotation, or the label of a core; ``class_name`` and ``id``
    are those of the object in QuPath; ``x`` and ``y`` its centroid, ``area_px`` its area, and
    ``bounds`` (x0, y0, x1, y1), at level 0, None of an image. ``area_mm2`` is that of its part that
    was segmented, ``tissue_mm2`` that of the tissue in it; None where it is not known, or where all
    tissue is in failed tiles.

    ``nuclei`` counts all whose centroid lies in it; ``own`` those of them that lie in no smaller
    region. ``classes`` has the numbers by class, also those of classes without a nucleus.
    ``positive_percent`` is a percentage of the nuclei with a class of positive or negative ones,
    ``h_score`` 0 to 300; it and ``allred`` need classes 1+ to 3+. These three are None without
    such nuclei. ``measurements`` are the main ones, by QuPath's name.
    """

    kind: str
    name: str = ""
    class_name: str = ""
    case_id: str = ""
    id: str = ""
    x: float | None = None
    y: float | None = None
    area_px: float | None = None
    bounds: tuple[float, float, float, float] | None = None
    area_mm2: float | None = None
    tissue_mm2: float | None = None
    nuclei: int
    own: int
    per_mm2: float | None = None
    classes: dict[str, ClassSummary] = {}
    positive_percent: float | None = None
    h_score: float | None = None
    allred: AllredScore | None = None
    measurements: dict[str, Quartiles] = {}

    @property
    def label(self) -> str:
        """What people call it: its name, else its class and place."""
        if self.name or self.x is None or self.y is None:
            return self.name or self.class_name
        return f"{self.class_name or 'annotation'} {place_text(self.x, self.y)}"


class PositivityRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What makes a nucleus positive: its ``measurement`` is one of ``thresholds`` or above it.

    One threshold makes classes Positive and Negative, three make Negative and 1+ to 3+. ``found``
    is whether the threshold was found on the slide; ``note`` what a person should know of that.
    """

    measurement: str
    thresholds: tuple[float, ...]
    found: bool = False
    note: str | None = None


class Provenance(Record, frozen=True, kw_only=True):
    """The provenance of nuclei.

    ``model`` is the digest of its weights, ``within`` the QuPath classes of analysis regions.
    """

    version: str
    model: str
    engine: str
    config: dict[str, Any]
    within: list[str]


class ResultRecord(
    Record, frozen=True, kw_only=True, omit_defaults=True, rename={"failed_tiles": "holes"}
):
    """results/<image>/result.json: the provenance of the nuclei of an image, and their files.

    ``made`` is UTC in ISO 8601; ``files`` are those to import into QuPath. Without ``regions`` the
    whole image was segmented. ``tissue_mm2`` is the area of the tissue that was segmented: that in
    failed tiles, which earlier versions counted, is left out. ``model_name`` is that of the run,
    for people. ``positivity`` is there where nuclei have classes, and ``summaries``, the first of
    them that of the image, where these or regions were asked for. ``is_compartment_first`` is
    whether measurements in ``files`` have the names of QuPath 0.6; None of an earlier run.
    ``versions`` are those of packages; earlier runs have them in run.json alone, which a later one
    for other images writes anew.
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
    positivity: PositivityRecord | None = None
    summaries: tuple[Summary, ...] = ()
    files: tuple[str, ...]
    is_compartment_first: bool | None = None
    versions: dict[str, str] = {}

    @property
    def drawn_from(self) -> str:
        """A digest of what pictures and figures of the nuclei depend on, beside ``run``, whose
        tiles do not: what classifies them, regions, stains, and the pixel size."""
        made_by = [self.config, self.slide.mpp, self.stains, self.regions, self.positivity]
        return digest(to_plain(made_by))


class RemovedRecord(Record, frozen=True, kw_only=True):
    """result.json after the nuclei were removed (UTC in ISO 8601), for the import script."""

    removed: str
    nuclei: int = 0
    files: tuple[str, ...] = ()


class Imported(Record, frozen=True, kw_only=True, rename={"in_rois": "in_fields"}):
    """What became in QuPath of the nuclei that a run ``found`` in an image.

    Each was ``added`` or ``left_out``: in the place of an object that a person drew or changed
    (``for_yours``), of a nucleus that a person ``deleted``, of an object of another program
    (``for_others``), or in a correction ROI (``in_rois``). ``replaced`` are objects of other
    programs that were removed for nuclei that were added.

    Nuclei that were added took over ``classes`` of earlier ones, and ``notes``: measurements,
    names, colours, descriptions, or drawings within. Earlier nuclei with such that no new nucleus
    replaces ``stayed`` in the image, or were removed, and are ``lost``.
    """

    found: int
    added: int
    left_out: int
    for_yours: int = 0
    deleted: int = 0
    for_others: int = 0
    in_rois: int = 0
    replaced: int = 0
    classes: int = 0
    notes: int = 0
    stayed: int = 0
    lost: int = 0

    @property
    def in_words(self) -> str:
        """A sentence for people: the three numbers, the reasons, and what became of their work."""
        reasons = _listed(
            (self.for_yours, "in place of objects of yours"),
            (self.deleted, "that you deleted"),
            (self.for_others, "in place of objects of other programs"),
            (self.in_rois, "in correction ROIs"),
        )
        carried = _listed(
            (self.classes, "classes"), (self.notes, "nuclei with measurements or notes")
        )
        alone = _listed((self.stayed, "kept"), (self.lost, "removed"))
        return (
            f"{self.found:,} nuclei found, {self.added:,} added, {self.left_out:,} left out"
            + (f": {reasons}" if reasons else "")
            + (f"; {self.replaced:,} objects of other programs replaced" if self.replaced else "")
            + (f"; carried over: {carried}" if carried else "")
            + (f"; of yours without a new nucleus: {alone}" if alone else "")
        )


class ChangeCounts(Record, frozen=True, kw_only=True):
    """A person's corrections, and how many of them the refined model makes by itself (``_now``).

    Of the nuclei of the model before, a person ``deleted`` some, ``reshaped`` some, ``added``
    others, and ``kept`` the rest as they were. ``new`` are nuclei of the refined model that the
    person has not.
    """

    deleted: int = 0
    added: int = 0
    reshaped: int = 0
    kept: int = 0
    deleted_now: int = 0
    added_now: int = 0
    reshaped_now: int = 0
    kept_now: int = 0
    new: int = 0

    @staticmethod
    def total(counts: Iterable[ChangeCounts]) -> ChangeCounts:
        """The sums of counts."""
        counts = list(counts)
        names = ChangeCounts.__struct_fields__
        return ChangeCounts(**{name: sum(getattr(one, name) for one in counts) for name in names})

    @property
    def made(self) -> int:
        """The number of corrections."""
        return self.deleted + self.added + self.reshaped

    @property
    def made_now(self) -> int:
        """The number of those that the refined model makes by itself."""
        return self.deleted_now + self.added_now + self.reshaped_now

    @property
    def in_words(self) -> str:
        """A sentence for people."""
        return (
            f"the refined model makes {self.made_now:,} of your {self.made:,} corrections by "
            f"itself: {self.deleted_now:,} of {self.deleted:,} deleted, {self.added_now:,} of "
            f"{self.added:,} added, {self.reshaped_now:,} of {self.reshaped:,} reshaped; of "
            f"{self.kept:,} nuclei that were right, it finds {self.kept_now:,}; new false ones: "
            f"{self.new:,}"
        )


class RoiChangesRecord(ChangeCounts, frozen=True, kw_only=True):
    """A corrected ROI: its bounding box at level 0, and contours of nuclei before and after.

    ``geometry`` is GeoJSON at level 0: the ROI without areas of classes that QuPath ignores, and
    without what it shares with a ROI before it.
    Contours are [x, y, x, y, ...] at level 0: of the model ``before``, as a person ``corrected``
    them, and of the refined model (``after``). ``picture`` is a file in the same folder, of the box
    at the working resolution. ``id`` is that in QuPath; empty where nobody knows it. Of nuclei that
    are not ``is_known``, nobody knows which ones a person was given.
    """

    id: str = ""
    is_known: bool = True
    x: float
    y: float
    width: float
    height: float
    geometry: dict[str, Any]
    before: list[list[float]]
    corrected: list[list[float]]
    after: list[list[float]] = []
    picture: str = ""


class ChangesRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """changes/<image>/changes.json: the corrected ROIs of an image, for a refined model.

    ``model`` is the digest of the refined model, ``made`` UTC in ISO 8601; both are empty before a
    model was refined. ``run`` is that in which the refined model segmented the image; empty before
    that. ``rois`` are of the class ``roi_class``. Of other classes, with which the model was not
    refined, those of earlier models are kept (``others``), for the nuclei that a person was given;
    so are suggested ROIs, of the class of those to correct, which have nuclei ``before`` alone.
    """

    model: str
    model_name: str
    made: str
    run: str = ""
    roi_class: str = ""
    rois: tuple[RoiChangesRecord, ...]
    others: dict[str, tuple[RoiChangesRecord, ...]] = {}

    def waits_for(self, model: str, run: str) -> bool:
        """Whether there are ROIs for a model that a run of it has not yet added its nuclei to."""
        return bool(self.rois) and self.model == model and self.run != run


def _listed(*numbers: tuple[int, str]) -> str:
    """The numbers that are not 0, each with its words."""
    return ", ".join(f"{count:,} {words}" for count, words in numbers if count)


class ImageOutcome(
    Record,
    frozen=True,
    kw_only=True,
    rename={"tiles_resumed": "tiles_taken_over", "failed_tiles": "holes"},
):
    """The outcome of one image in a run: ``problem`` is None unless it failed.

    ``results`` is the folder of the nuclei that the run has written; of an image that failed, None
    unless it did so later: as they were imported into QuPath, say.
    With ``failed_tiles``, the nuclei of all other tiles are written. ``seconds`` are wall time;
    ``main_seconds`` those of the run itself by stage (pictures are drawn while nuclei are written),
    ``worker_seconds`` the sums over workers.
    ``network_px`` is the number of working pixels that the network processed. ``imported`` is what
    became of the nuclei in QuPath, unset where they wait to be imported. ``corrections`` are those
    of a person that a refined model makes by itself, unset for other models. ``positivity`` and
    ``summaries`` are those of ``ResultRecord``, unset where they were not asked for. ``unchanged``
    is set for an image that was finished before the run, of which nothing was written.
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
    imported: Imported | msgspec.UnsetType = msgspec.UNSET
    corrections: ChangeCounts | msgspec.UnsetType = msgspec.UNSET
    positivity: PositivityRecord | msgspec.UnsetType = msgspec.UNSET
    summaries: tuple[Summary, ...] | msgspec.UnsetType = msgspec.UNSET
    unchanged: bool | msgspec.UnsetType = msgspec.UNSET


class RunRecord(Provenance, frozen=True, kw_only=True):
    """runs/<run>/run.json: the provenance of a run, and the outcome of each image so far.

    ``versions`` are those of libraries, when it was last continued; ``training`` is the log of the
    model.
    """

    versions: dict[str, str]
    training: dict[str, Any]
    images: list[ImageOutcome]


class ModelRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """models/NAME.json: a model without its weights."""

    digest: str
    network: str
    channel: int
    inverted: bool
    threshold: float
    config: dict[str, Any]
    training: dict[str, Any]
    calibration: tuple[float, ...] | None = None


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
    step, ``unlabelled_cdcl`` are those of each step of CDCL without labels, by name.
    ``seconds_for_batches`` are those in which the network waited for its next batch.
    """

    patchcl: PatchCLLog
    nucleus_fraction: float
    labelled_fraction: float
    loss: list[float]
    seconds: float
    seconds_for_batches: float
    unlabelled_cdcl: list[dict[str, float]] = []


class CDCLLog(SelfTrainingLog, frozen=True, kw_only=True):
    """How a model was refined: its own training, and the losses of each step by name.

    Those of ``cdcl``, and of the ``distillation`` after it, which older models do not have.
    ``refined_from`` is the digest of the model that it began with.
    """

    cdcl: list[dict[str, float]]
    distillation: list[dict[str, float]] = []
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
    """Counts in equal bins from 0 to ``highest``; the last bin counts higher values, too."""

    median: float | None
    highest: int | float
    counts: list[int]


class StainHistogram(Record, frozen=True, kw_only=True):
    """The histogram of a stain's mean optical density."""

    name: str
    median: float | None
    highest: int | float
    counts: list[int]


class ClassHistograms(Record, frozen=True, kw_only=True):
    """The nuclei of a class: their number, and counts of areas and of the judged measurement."""

    name: str
    nuclei: int
    area: list[int]
    measurement: list[int]


class PositivityFigures(Record, frozen=True, kw_only=True):
    """The classes of nuclei in the report, from negative to the most positive.

    ``measurement`` is what they are judged by, with these ``thresholds``. Counts are in equal bins
    from 0 to ``highest``, and of areas to ``highest_area``, in µm²; the last bin counts higher
    values, too.
    """

    measurement: str
    thresholds: tuple[float, ...]
    highest: float
    highest_area: float
    classes: tuple[ClassHistograms, ...]


class FieldOfViewRecord(
    Record,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"contours": "outlines", "entropy": "doubt"},
):
    """A field of view that the report shows.

    ``kind`` is the reason for its choice; ``picture`` a file in the same folder. ``x`` and ``y``
    are px at level 0, ``width`` and ``height`` working px; ``um`` is its width in µm; ``density``
    nuclei per mm² of tissue; ``entropy`` the mean predictive entropy in bits. ``contours`` are
    [x, y, x, y, ...] in thirds of a working px; ``cells`` likewise, none where none were grown.
    ``classes`` are the numbers of the classes of nuclei in ``PositivityFigures``, where they have
    some.
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
    cells: list[list[int]] = []
    classes: list[int] = []


class FiguresRecord(
    Record, frozen=True, kw_only=True, omit_defaults=True, rename={"fields_of_view": "fields"}
):
    """report/images/<image>/figures.json: the figures of an image in the report.

    ``mm`` is (width, height); ``probability`` the mean over nuclei; ``highest_density``, in nuclei
    per mm², is that of the last colour of the density map, None if there is no such map.
    ``positivity`` is there where nuclei have classes. ``drawn_from`` is that of the result; earlier
    versions did not write it.
    """

    run: str
    nuclei: int
    drawn_from: str = ""
    mm: tuple[float, float]
    area: Histogram
    stain: StainHistogram
    probability: float | None
    highest_density: int | None = None
    fields_of_view: tuple[FieldOfViewRecord, ...] | None = None
    positivity: PositivityFigures | None = None


class ReceiptRecord(
    Record,
    frozen=True,
    kw_only=True,
    omit_defaults=True,
    rename={"rois": "fields", "rois_kept": "fields_kept", "left_out_rois": "left_out_fields"},
):
    """imported/<image>.json: what an import into QuPath did, at a time in ISO 8601.

    Numbers of nuclei that were ``added``, ``left_out`` and why (see ``Imported``), and ``removed``;
    of objects of other programs ``replaced``; of what a person had put on nuclei, in four numbers
    (see ``Imported``); of other objects ``kept``; of ROIs to correct that were marked, and kept; of
    detections in them that became annotations, which a person can reshape (``reshapable``). Not
    ``saved``: the image is saved by QuPath, or by a person, later than this file, or not at all.
    ``data`` is QuPath's file of the image as it was saved with them, where that is known.
    groovy/import_nuclei.groovy writes it, too.
    """

    image: str
    run: str
    imported: str
    saved: bool = True
    data: FileSignature | None = None
    added: int
    left_out: int
    left_out_kept: int = 0
    left_out_deleted: int = 0
    left_out_others: int = 0
    left_out_rois: int = 0
    removed: int
    replaced: int = 0
    classes: int = 0
    notes: int = 0
    stayed: int = 0
    lost: int = 0
    kept: int
    rois: int
    rois_kept: int
    reshapable: int = 0

    @property
    def nuclei(self) -> Imported:
        """What became of the nuclei."""
        return Imported(
            found=self.added + self.left_out,
            added=self.added,
            left_out=self.left_out,
            for_yours=self.left_out_kept,
            deleted=self.left_out_deleted,
            for_others=self.left_out_others,
            in_rois=self.left_out_rois,
            replaced=self.replaced,
            classes=self.classes,
            notes=self.notes,
            stayed=self.stayed,
            lost=self.lost,
        )


class RegionSummary(Record, frozen=True, kw_only=True):
    """What is in a `PatchCL` annotation of an image now; ``x`` and ``y`` are its centroid, level 0.

    ``area_mm2`` is that of its tissue where ``is_tissue``, else that of the annotation itself; None
    where the image has no pixel size. ``per_mm2`` is the density of nuclei. Annotations of a person
    that the last run summarised, and TMA cores, are summarised, too. ``positive_percent`` and
    ``h_score`` are unset where nuclei have no such classes.
    """

    name: str
    x: float
    y: float
    nuclei: int
    area_mm2: float | None
    is_tissue: bool
    per_mm2: float | None
    positive_percent: float | msgspec.UnsetType = msgspec.UNSET
    h_score: float | msgspec.UnsetType = msgspec.UNSET


class ImageSummary(Record, frozen=True, kw_only=True):
    """What is in the `PatchCL` annotations of an image; ``problem`` is None unless it failed."""

    id: str
    image: str
    regions: tuple[RegionSummary, ...] = ()
    problem: str | None = None


class TypicalRecord(Record, frozen=True, kw_only=True):
    """runs/<run>/<image>/typical.json: the typical nuclei by which the tiles beside it were made.

    ``nucleus_diameter_um`` is 0 where there were too few to measure it. ``surest`` are the density
    of red light, and its share, of the surest nuclei.
    """

    nucleus_diameter_um: float
    surest: tuple[float, float] | None


class RoisRecord(Record, frozen=True, kw_only=True, rename={"rois": "fields"}):
    """fields/<image>.json: the ROIs of an image to correct; ``made`` is UTC in ISO 8601."""

    made: str
    rois: tuple[CorrectionRoi, ...]


def read_model_record(weights: Path) -> ModelRecord | None:
    """The record of a model, beside its ``weights``; None where either is missing, or where they
    are of two models: weights may have been copied here alone."""
    record = read_record(weights.with_suffix(".json"), ModelRecord)
    try:
        is_theirs = record is not None and record.digest.encode() in weights.read_bytes()
    except OSError:
        return None
    return record if is_theirs else None


def file_signature(path: Path) -> FileSignature:
    """Size and time of a file. Raises OSError."""
    stat = path.stat()
    return FileSignature(bytes=stat.st_size, modified_ns=stat.st_mtime_ns)


def data_signature(path: Path) -> FileSignature | None:
    """The signature of a file; None if it is missing."""
    try:
        return file_signature(path)
    except OSError:
        return None


def to_plain(record: Any) -> Any:
    """A record, or a container of records, as plain dictionaries, lists and numbers, for JSON."""
    return msgspec.to_builtins(record)


def write_record(path: Path, record: Record, compact: bool = False) -> None:
    """Write a record to a JSON file, atomically. Raises StorageError."""
    write_json(path, to_plain(record), compact)


def read_record(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The record in a JSON file; None if the file holds none of that kind."""
    try:
        return msgspec.convert(read_json(path), kind)
    except msgspec.ValidationError:
        return None


def read_kept(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    """The same of a file that must not be taken for missing: as if an image had no nuclei, or to be
    written anew without what is in it.

    Raises StorageError for one that is there, but cannot be read: it may be another person's, or a
    network folder be gone for a moment.
    """
    try:
        path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StorageError(
            f"{path} cannot be read ({error.strerror or error}): do this again when it can be, or "
            "ask for the permission"
        ) from error
    return read_record(path, kind)


def read_result(path: Path) -> ResultRecord | RemovedRecord | None:
    """The record in result.json, of nuclei or of their removal; None if there is neither.

    Raises StorageError as ``read_kept``.
    """
    return read_kept(path, ResultRecord) or read_record(path, RemovedRecord)
