"""The story of a project, top-down: from slides to a model to nuclei. Read this file first."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from patchcl_qupath import memory
from patchcl_qupath.answers.answer import Answer, answer, check_answerable
from patchcl_qupath.config import TMA_CORES, Config, Recipe
from patchcl_qupath.correction import changes
from patchcl_qupath.correction.labels import (
    drawn_samples,
    pseudo_labelled_samples,
    read_corrected,
    training_samples,
    with_copies,
)
from patchcl_qupath.datatypes import Corrections, ImageEntry
from patchcl_qupath.errors import ConfigError, ImageError, ModelError, count_of
from patchcl_qupath.execution.outcome import (
    failed_image,
    note,
    package_versions,
    write_outcome,
    write_run,
)
from patchcl_qupath.execution.workers import Workers
from patchcl_qupath.finished import finished_outcome, provenance_of, run_id
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Model
from patchcl_qupath.overlap import Stop, Turn, meanwhile, overlapped, turns, usable_cores
from patchcl_qupath.progress import Progress, ShowProgress, Stage, counter
from patchcl_qupath.project import Project
from patchcl_qupath.report.figures import write_pictures
from patchcl_qupath.segmentation.image_tiles import ImageTiles
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.storage.files import check_writable
from patchcl_qupath.storage.geojson import to_object
from patchcl_qupath.storage.parquet import write_uncertainty_grid
from patchcl_qupath.storage.records import (
    CDCLLog,
    ImageOutcome,
    Imported,
    Provenance,
    RegionRecord,
    ResultRecord,
    SlideProvenance,
    read_record,
)
from patchcl_qupath.timing import Seconds, timed, utc_now
from patchcl_qupath.training import cdcl, patchcl, selftrain
from patchcl_qupath.training.calibration import calibrated

logger = logging.getLogger(__name__)

Known = TypeVar("Known")

_RECORD_S = 10.0  # between two records of a run


def train(entries: Sequence[ImageEntry], config: Config, progress: ShowProgress) -> Model:
    """Train a model on random tissue crops of the images themselves, without labels.

    Raises TrainingError where nothing can be learnt from the images.
    """
    _get_ready_to_train()
    crops = training_crops(entries, config, counter(progress, Stage.READING_CROPS))
    count = counter(progress, Stage.TRAINING_PATCHCL)
    model = patchcl.train(crops, config, count)
    if config.recipe is not Recipe.SELFTRAIN:
        return model
    model = selftrain.train(crops, model, progress)
    return calibrated(model, crops, counter(progress, Stage.CALIBRATING))


def _get_ready_to_train() -> None:
    """Let this process keep the memory that it frees, and use no more cores than it may."""
    memory.keep_freed()
    # Torch heeds which cores a process is bound to, but not how much of them a container has.
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))


def train_as(
    name: str,
    project: Project,
    entries: Sequence[ImageEntry],
    config: Config,
    progress: ShowProgress,
) -> Model:
    """Train a model, and save it in the project under a name.

    Raises ConfigError for the name of a refined model: it would be gone, and another one, which has
    seen no correction, in its place.
    """
    path = project.layout.model(name)
    if _is_refined(path):
        raise ConfigError(
            f"the model {name} was made by `patchcl-qp refine`: to refine anew, do that again; to "
            "train without corrections, give the model another name"
        )
    check_writable(path.parent)
    model = train(entries, config, progress)
    model.save(path.parent, name)
    logger.info("model %s trained and saved: %s", name, path)
    return model


def _is_refined(path: Path) -> bool:
    """Whether a file of weights is there, and of a refined model: whatever lies beside it."""
    with suppress(ModelError):
        return isinstance(Model.load(path).training, CDCLLog)
    return False


def refine(
    project: Project,
    entries: Sequence[ImageEntry],
    start: Model,
    labels_from: str,
    progress: ShowProgress,
    seed: int = 0,
) -> tuple[Model, dict[str, Corrections]]:
    """Refine a model by CDCL with ROIs in which a person corrected all nuclei.

    ROIs are annotations of class ``labels_from``. The images' other tissue is used, too, with what
    the model itself finds there as pseudo-labels. Returns the refined model, and the corrections by
    the ids of their images. Raises ImageError for labels that cannot be trained on, TrainingError
    where there are none, ConfigError for a model of PatchCL alone.
    """
    if not start.network.can_be_refined:
        raise ConfigError(
            "a model of PatchCL alone cannot be refined: train one with "
            'recipe = "selftrain", the default'
        )
    _get_ready_to_train()
    corrected = read_corrected(
        project,
        entries,
        start.config,
        labels_from=labels_from,
        show_count=counter(progress, Stage.READING_ROIS),
    )
    labelled = [sample for each in corrected for sample in training_samples(*each)]
    crops = training_crops(entries, start.config, counter(progress, Stage.READING_CROPS))
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    images = with_copies(corrected, entries)
    label = partial(pseudo_labelled_samples, crops=crops, images=images, report=choosing)
    drawn = partial(drawn_samples, crops, images)
    refining = counter(progress, Stage.REFINING)
    model = cdcl.refine(start, labelled, label, drawn, refining, seed)
    model = calibrated(model, crops, counter(progress, Stage.CALIBRATING))
    return model, {image.id: corrections for image, corrections in corrected}


def refine_as(
    name: str,
    project: Project,
    entries: Sequence[ImageEntry],
    start: Model,
    labels_from: str,
    progress: ShowProgress,
    seed: int = 0,
) -> tuple[Model, dict[str, Corrections]]:
    """``refine`` a model, and save the refined one in the project under a name.

    The corrections are saved, too: the next run of the model says how many of them it makes.
    """
    path = project.layout.model(name)
    check_writable(path.parent)
    model, corrections = refine(project, entries, start, labels_from, progress, seed)
    model.save(path.parent, name)
    images = [entry.id for entry in entries]
    notes = changes.begin(
        project.layout,
        images,
        corrections,
        model=model.digest,
        model_name=name,
        roi_class=labels_from,
    )
    logger.info("model %s refined and saved: %s", name, path)
    return model, {
        image: replace(found, notes=(*found.notes, *notes.get(image, ())))
        for image, found in corrections.items()
    }


def check_resolution(model: Model, config: Config, name: str | None) -> None:
    """Raise ConfigError for settings of another µm/px than that of the model; ``name`` is for
    people, who have the options of the command if the model has one."""
    if model.mpp == config.slide.mpp:
        return
    advice = ": leave slide.mpp out of the settings, or train another model"
    if name:
        advice = ": pass --retrain, or --model with the name of another"
    raise ConfigError(
        f"the model {name or model.digest} was trained at {model.mpp} µm/px, the settings ask for "
        f"{config.slide.mpp}{advice}"
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model and one set of settings, applied to images of a project.

    ``workers`` segment the tiles. ``region_classes`` are classes of annotations; where there are
    some, nuclei outside of them are left out. Equal models, settings and classes make the same run,
    so that one that was stopped resumes. ``model_name`` is for people. Raises ConfigError for
    settings of another working resolution than the model's.
    """

    project: Project
    model: Model
    config: Config
    workers: Workers
    progress: ShowProgress
    region_classes: tuple[str, ...] = ()
    model_name: str | None = None
    _stop: Stop = field(default_factory=Stop)
    _showing: threading.Lock = field(default_factory=threading.Lock)
    _asking_qupath: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        check_resolution(self.model, self.config, self.model_name)

    def images(self, entries: Sequence[ImageEntry]) -> Iterator[ImageOutcome]:
        """Segment images, in their order; one that fails does not stop the others.

        While the tiles of one are with workers, the next is prepared, and the last one written.
        """
        outcomes, began = list[ImageOutcome](), utc_now()
        recorded, recorded_at = 0, -math.inf
        self._stop.clear()
        _ = self.id  # it is found here, before threads ask for it
        at_once = self.workers.images_at_once()
        items = [*zip(entries, turns(len(entries)), strict=True)]
        results = overlapped(self._timed_image, items, at_once, self._stop)
        threads = torch.get_num_threads()
        try:
            for entry, result in zip(entries, results, strict=True):
                outcomes.append(self._outcome_of(entry, result, began))
                write_outcome(self.project.layout, outcomes[-1])
                # All of them each time would be hours of writing for thousands of images.
                if time.monotonic() > recorded_at + _RECORD_S:
                    self._record(outcomes)
                    recorded, recorded_at = len(outcomes), time.monotonic()
                yield outcomes[-1]
        finally:
            if len(outcomes) > recorded:
                self._record(outcomes)
            # Threads that segment tiles set it to 1, and torch gives that to all that begin later:
            # to one in which a person trains, too.
            torch.set_num_threads(threads)

    def _record(self, outcomes: Sequence[ImageOutcome]) -> None:
        """Record the run, with what became of its images so far."""
        training = self.model.record.training
        write_run(self.project.layout, self.id, self.provenance, training, outcomes)

    def _outcome_of(
        self, entry: ImageEntry, result: Future[ImageOutcome], began: str
    ) -> ImageOutcome:
        """The outcome of an image, or of its error, which must not cost the others."""
        try:
            outcome = result.result()
        except Exception as error:
            outcome = failed_image(entry, error, self._written(entry, began))
        stages = ", ".join(f"{name} {s:.1f} s" for name, s in outcome.main_seconds.items())
        logger.info("%s: %.1f s: %s", entry.name, outcome.seconds, stages or "failed")
        return outcome

    def _written(self, entry: ImageEntry, since: str) -> str | None:
        """The folder of an image's nuclei, if this run wrote them ``since`` then."""
        found = read_record(self.project.layout.result(entry.id), ResultRecord)
        if found is None or found.run != self.id or found.made < since:
            return None
        return str(self.project.layout.results(entry.id))

    def _timed_image(self, item: tuple[ImageEntry, Turn]) -> ImageOutcome:
        """The outcome of an image, and how long it took, other images beside it."""
        entry, turn = item
        began = time.perf_counter()
        try:
            finished = finished_outcome(self.project, entry, self.provenance)
            outcome = finished or self.image(entry, turn)
        finally:
            turn.pass_on()
        return msgspec.structs.replace(outcome, seconds=time.perf_counter() - began)

    def image(self, entry: ImageEntry, turn: Turn) -> ImageOutcome:
        """One image: read its regions and stains; find tissue; segment tiles; write and draw."""
        seconds: Seconds = {}
        entry = self._with_regions_and_stains(entry)
        with timed(seconds, "prepare"):
            image = self.workers.call(prepare, entry, self.config)
            check_answerable(image, entry, self.config)
        turn.wait(self._stop)
        with timed(seconds, "tiles"):
            segmented, worker_seconds = self._segment(entry, image, turn)
        with timed(seconds, "write"):
            answered = answer(segmented, entry, self.config.result)
            result = self._result(entry, segmented, answered)
            layout, summary = self.project.layout, self.project.qupath_summary(entry)
            note_rois = changes.at_import(layout, entry.id, summary)
            with meanwhile(self._draw, segmented, result, seconds):
                imported = self._write(entry, segmented, answered, result)
            note_rois()
            changed = changes.finish(layout, segmented, self.model.digest, result.run)
        outcome = self._outcome(entry, segmented, answered, result)
        known = {"imported": _or_unset(imported), "corrections": _or_unset(changed)}
        times = {"main_seconds": seconds, "worker_seconds": worker_seconds}
        return msgspec.structs.replace(outcome, **known, **times)

    def _with_regions_and_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with what a person set in QuPath."""
        cores = [name for name in self.region_classes if name == TMA_CORES]
        with self._in_qupath:
            if self.region_classes:
                entry = self.project.with_regions(entry, self.region_classes)
            if counted := [*cores, *self.config.result.summarise]:
                entry = self._with_drawn(entry, counted)
            self._show(Progress(stage=Stage.FINDING_TISSUE, image=entry.name))
            return self.project.with_stains(entry)

    def _with_drawn(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image with the annotations to count in. Raises ImageError, with what else can be."""
        try:
            return self.project.with_drawn(entry, classes)
        except ImageError as error:
            if not self.config.result.summarise:  # of a TMA, the cores are what is segmented
                raise
            raise ImageError(f"{error}; or leave out --summarise") from error

    def _segment(
        self, entry: ImageEntry, image: PreparedImage, turn: Turn
    ) -> tuple[SegmentedImage, Seconds]:
        """Have workers find the nuclei of each tile that is missing, and grow them into cells if
        that is asked for."""
        tiles = ImageTiles(
            entry=entry,
            image=image,
            model=self.model,
            config=self.config,
            engine=self.engine,
            layout=self.project.layout,
            run=self.id,
            run_of_nuclei=self.id_of_nuclei,
            workers=self.workers.until(self._stop.check),
            show=self._show,
        )
        return tiles.segmented(on_few=turn.pass_on)

    def _write(
        self,
        entry: ImageEntry,
        segmented: SegmentedImage,
        answered: Answer,
        result: ResultRecord,
    ) -> Imported | None:
        """Show that the nuclei are written, and do it."""
        nuclei = count_of(segmented.count, "nucleus", "nuclei")
        self._show(Progress(stage=Stage.WRITING, image=entry.name, detail=nuclei))
        write = partial(_write, self.project, entry, segmented, answered, self.config, result)
        with self._in_qupath:
            # QuPath's process is one of this process, and answers no other.
            here = self.project.backend.writes_into_qupath
            return write() if here else self.workers.call(write)

    def _draw(self, segmented: SegmentedImage, result: ResultRecord, seconds: Seconds) -> None:
        """Draw the preview, and the pictures and figures of the report."""
        with timed(seconds, "pictures"):
            self.workers.call(write_pictures, self.project.layout, segmented, result)

    @property
    def _in_qupath(self) -> AbstractContextManager[object]:
        """QuPath, which does one thing at a time; nothing where files are read and written."""
        backend = self.project.backend
        return self._asking_qupath if backend.writes_into_qupath else nullcontext()

    def _show(self, progress: Progress) -> None:
        """Show progress, unless nobody waits for this run any more. Images take turns."""
        self._stop.check()
        with self._showing:
            self.progress(progress)

    @cached_property
    def engine(self) -> EngineKind:
        """What runs the network: the fastest there is, unless the settings name one."""
        engine = engines.choose(self.config.engine, self.model.network)
        logger.info("engine: %s", engine)
        return engine

    @cached_property
    def provenance(self) -> Provenance:
        """What makes the nuclei."""
        return provenance_of(
            model=self.model.digest,
            engine=self.engine,
            config=self.config,
            within=self.region_classes,
        )

    @cached_property
    def id(self) -> str:
        """The name of this run: a digest of all that its finished tiles depend on."""
        return run_id(self.provenance)

    @cached_property
    def id_of_nuclei(self) -> str:
        """The same for nuclei alone: cells of other sizes are grown from the same tiles."""
        return run_id(self.provenance, of_cells=False)

    def _result(
        self, entry: ImageEntry, segmented: SegmentedImage, answered: Answer
    ) -> ResultRecord:
        """What made the nuclei of one image, and from what."""
        image = segmented.image
        regions = [
            RegionRecord(
                geometry=to_object(region),
                tissue_mm2=segmented.tissue_mm2(region) or 0.0,
            )
            for region in entry.regions
        ]
        return ResultRecord(
            run=self.id,
            image=entry.name,
            made=utc_now(),
            **msgspec.structs.asdict(self.provenance),
            tissue_mm2=segmented.tissue_mm2() or 0.0,
            slide=SlideProvenance(
                file=image.file,
                size=image.slide.size,
                mpp=image.slide.mpp_level0,
                mpp_source=image.slide.mpp_source,
                origin=image.slide.origin,
            ),
            model_name=self.model_name,
            stains=image.stains,
            regions=tuple(regions),
            failed_tiles=segmented.failed_tiles,
            nuclei=segmented.count,
            object_type=self.config.kind(segmented.count),
            positivity=answered.record,
            summaries=answered.summaries,
            files=(),
            versions=package_versions(),
        )

    def _outcome(
        self,
        entry: ImageEntry,
        segmented: SegmentedImage,
        answered: Answer,
        result: ResultRecord,
    ) -> ImageOutcome:
        """What to tell a person of the image, as far as the nuclei say."""
        tiles = len(segmented.tiles) + len(segmented.failed_tiles)
        of_nuclei = note(entry, segmented.image, segmented.count, tiles > 0, self.config)
        return ImageOutcome(
            id=entry.id,
            image=entry.name,
            note="; ".join(filter(None, [of_nuclei, *answered.notes])) or None,
            tissue_mm2=result.tissue_mm2,
            nuclei=segmented.count,
            tiles=tiles,
            tiles_resumed=segmented.resumed,
            failed_tiles=segmented.failed_tiles,
            results=str(self.project.layout.results(entry.id)),
            preview=str(self.project.layout.preview(entry.id)),
            network_px=segmented.network_px,
            positivity=_or_unset(result.positivity),
            summaries=_or_unset(result.summaries or None),
        )


def _or_unset(value: Known | None) -> Known | msgspec.UnsetType:
    """A value of a record that leaves out what is not known."""
    return msgspec.UNSET if value is None else value


def _write(
    project: Project,
    entry: ImageEntry,
    segmented: SegmentedImage,
    answered: Answer,
    config: Config,
    result: ResultRecord,
) -> Imported | None:
    """Write the nuclei into the project, and where they are uncertain."""
    batches = answered.classified_tables(segmented.tables())
    imported = project.write(entry, batches, config.result, result)
    if segmented.uncertainty is not None:
        write_uncertainty_grid(project.layout.uncertainty(entry.id), segmented.uncertainty)
    return imported
