"""The paquo backend: an installed QuPath writes nuclei into the images of a project.

Images and results are those of the files backend. Then QuPath's own code writes the nuclei into
data.qpdata, in a process of its own. project.qpproj is only read. QuPath locks no files, so an
image that changed since a run began is not written to.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import shapely

from patchcl_qupath.config import CORRECTED, TMA_CORES, BackendKind, ResultConfig, from_dict
from patchcl_qupath.datatypes import (
    CorrectionRoi,
    Corrections,
    ImageEntry,
    Nuclei,
    QuPathSummary,
    StainVectors,
)
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project.drawn import SELECTED, read_drawn
from patchcl_qupath.project.files import FilesProject
from patchcl_qupath.project.installed import find_qupath
from patchcl_qupath.project.jvm import (
    Done,
    Export,
    ExportStains,
    Image,
    NotWrittenError,
    Process,
    Remove,
    Summarise,
    Write,
    damaged,
)
from patchcl_qupath.project.protocol import Backend
from patchcl_qupath.project.saved import JAVA_OBJECTS
from patchcl_qupath.storage.files import (
    copy_once,
    discard,
    remove_file,
    remove_folder,
    replace_file,
    writing,
)
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import (
    FileSignature,
    Imported,
    ReceiptRecord,
    RegionSummary,
    ResultRecord,
    data_signature,
    read_record,
    write_record,
)
from patchcl_qupath.timing import utc_now

if TYPE_CHECKING:  # it loads pyarrow
    from patchcl_qupath.storage.parquet import Table

logger = logging.getLogger(__name__)


class FileStamps(NamedTuple):
    """The signatures of the files that change when QuPath saves; None for a missing file."""

    project: FileSignature | None
    data: FileSignature | None
    last_version: FileSignature | None


@dataclass(frozen=True)
class PaquoProject:
    """A project that QuPath writes to.

    ``files`` reads it, ``process`` is QuPath's; ``stamps`` are those of each image's files when the
    project was read, which is where a run begins, or when our process saved the image.
    """

    files: FilesProject
    process: Process
    backend: Backend
    stamps: dict[str, FileStamps] = field(default_factory=dict)

    @classmethod
    def open(cls, files: FilesProject, qupath: Path | None = None) -> PaquoProject:
        """The project, if a QuPath is found. Raises ProjectError."""
        backend = Backend(kind=BackendKind.PAQUO, reason=f"with QuPath {find_qupath(qupath)}")
        return cls(files, Process(qupath, files.layout.qupath_log), backend).reread()

    def reread(self) -> PaquoProject:
        """The project as it is on disk now: until it is written to, QuPath must not change it."""
        project = replace(self, files=self.files.reread(), stamps={})
        for entry in project.files.images():
            project.stamps[entry.id] = project._stamps(entry)
        return project

    @property
    def path(self) -> Path:
        """The .qpproj file."""
        return self.files.path

    @property
    def layout(self) -> Layout:
        """The paths of our own files; the nuclei are in QuPath's own files, too."""
        return self.files.layout

    @property
    def qupath_version(self) -> str | None:
        """The QuPath that saved the project before it was opened, if it is known."""
        return self.files.qupath_version

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order."""
        return self.files.images()

    def with_regions(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, limited to annotations: those saved, or those exported since then."""
        self._export(entry, classes)
        return self.files.with_regions(entry, classes)

    def with_drawn(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image with annotations to count in: those saved, or those exported since then."""
        self._export(entry, classes)
        return self.files.with_drawn(entry, classes)

    def _export(self, entry: ImageEntry, classes: Sequence[str]) -> None:
        """Have the annotations exported that are saved, unless they were since then."""
        file = self.layout.regions(entry.id)
        is_current = self.files.saved.is_current(file, entry)
        if TMA_CORES in classes and is_current:  # earlier versions exported none
            is_current = any(region.is_core for region in read_drawn(file, entry.name))
        if not is_current and SELECTED not in classes:  # a selection is not saved
            self._read(entry, partial(Export, file=file))

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with the stains that are saved, or were exported since then."""
        file = self.layout.stains(entry.id)
        if self.files.saved.data(entry).exists() and not self.files.saved.is_current(file, entry):
            self._read(entry, partial(ExportStains, file=file))
        return self.files.with_stains(entry)

    def exported_stains(self, entry: ImageEntry) -> StainVectors | None:
        """The stains that were last exported, of which QuPath is not asked."""
        return self.files.exported_stains(entry)

    def corrections(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The ROIs that are saved, and the nuclei in them; or those exported since then."""
        file = self.layout.labels(entry.id)
        if self.files.saved.is_current(file, entry):
            labels = self.files.labels(entry)
            if labels.may_be_of(roi_class):
                found = self.files.corrections_in(labels, entry, roi_class)
                if found.rois:  # else an earlier version may have exported another class
                    return found
        if entry.problem and self.files.saved.counted(entry, roi_class) == 0:
            return Corrections()  # it must not keep the others from being trained on
        if self.files.saved.data(entry).exists():
            self._read(entry, partial(Export, file=file, roi_class=roi_class))
        return self.files.corrections(entry, roi_class)

    def write(
        self,
        entry: ImageEntry,
        batches: Iterable[Nuclei | Table],
        config: ResultConfig,
        result: ResultRecord,
    ) -> Imported:
        """Replace an image's nuclei: on disk, and in QuPath those that nobody touched."""
        self.process.start()  # takes some seconds, as does writing the files
        self.files.write(entry, batches=batches, config=config, result=result)
        try:
            return self._import(entry, config, result.run).nuclei
        except ImageError as error:
            folder = self.layout.results(entry.id)
            raise ImageError(f"{error}. Meanwhile its nuclei are in {folder}") from error

    def corrected_rois(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The ROIs marked as corrected that are saved, or were exported since then."""
        file = self.layout.labels(entry.id)
        is_marked = self.files.qupath_summary(entry).corrected > 0
        if not is_marked or self.files.saved.is_current(file, entry):
            labels = self.files.labels(entry)
            if not is_marked or labels.may_be_of(CORRECTED):
                return labels.corrected_rois
        self._read(entry, partial(Export, file=file, roi_class=CORRECTED))
        return self.files.corrected_rois(entry)

    def mark_rois(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Mark ROIs in the image; they replace earlier ones that nobody touched."""
        result = read_record(self.layout.result(entry.id), ResultRecord)
        if result is None:
            raise ImageError(f"{entry.name} has no nuclei: do `patchcl-qp run` first")
        done = self.files.mark_rois(entry, rois)
        if not self.layout.rois(entry.id).exists():
            return done
        receipt = self._import(entry, from_dict(result.config).result, result.run)
        made = f"; {receipt.reshapable:,} detections became annotations" * bool(receipt.reshapable)
        return (
            f"{receipt.rois} of {len(rois)} new ROIs marked, {receipt.rois_kept} earlier ones kept"
            f"{made}"
        )

    def _import(self, entry: ImageEntry, config: ResultConfig, run: str) -> ReceiptRecord:
        """Import the nuclei and ROIs on disk into the image, and write the receipt.

        Raises ImageError.
        """
        question = Write(
            image=self._image(entry),
            results=self.layout.results(entry.id),
            rois=self.layout.rois(entry.id),
            class_name=config.class_name,
            color=config.color,
        )
        counts = self._change(entry, question).counts
        now = utc_now()
        about = {"image": entry.name, "run": run, "imported": now}
        saved = data_signature(self.files.saved.data(entry))
        receipt = msgspec.convert(about | counts | {"data": saved}, ReceiptRecord)
        write_record(self.layout.receipt(entry.id), receipt)
        return receipt

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """The state of an image in QuPath."""
        return self.files.qupath_summary(entry)

    def summarise(self, entry: ImageEntry) -> tuple[RegionSummary, ...]:
        """Count the nuclei in the `PatchCL` annotations of the image anew, and save it."""
        receipt = self.layout.receipt(entry.id)
        before, record = self.qupath_summary(entry), read_record(receipt, ReceiptRecord)
        image, results = self._image(entry), self.layout.results(entry.id)
        regions = self._change(entry, Summarise(image=image, results=results)).regions
        if not regions:
            raise ImageError(f"{entry.name} has no PatchCL annotation: do `patchcl-qp run` first")
        if record is not None and not before.saved_later:  # nor is it now, by a person
            if before.is_saved:
                saved = data_signature(self.files.saved.data(entry))
                record = msgspec.structs.replace(record, saved=True, data=saved)
            write_record(receipt, record)
        return regions

    def remove(self, entry: ImageEntry) -> str:
        """Remove our nuclei from the image, except those that a person changed."""
        ours = (self.layout.results(entry.id), self.layout.receipt(entry.id))
        if not any(path.exists() for path in (self.files.saved.data(entry), *ours)):
            remove_file(self.layout.rois(entry.id))
            return "no nuclei"
        counts = self._change(entry, Remove(self._image(entry))).counts
        remove_file(self.layout.rois(entry.id))
        remove_folder(self.layout.results(entry.id))
        remove_file(self.layout.receipt(entry.id))
        return f"{counts['removed']:,} nuclei removed, {counts['kept']:,} other objects kept"

    def close(self) -> None:
        """End QuPath's process."""
        self.process.close()

    def _image(self, entry: ImageEntry) -> Image:
        return Image(
            project=self.path,
            entry_id=entry.id,
            name=entry.name,
            slide=entry.path.absolute(),  # a link has the suffix that QuPath goes by
            backups=self.layout.backups(entry.id),
            data=data_signature(self.files.saved.data(entry)),
        )

    def _stamps(self, entry: ImageEntry) -> FileStamps:
        data = self.files.saved.data(entry)
        return FileStamps(
            project=data_signature(self.path),
            data=data_signature(data),
            last_version=data_signature(_last_version(data)),
        )

    def _change(self, entry: ImageEntry, question: Write | Remove | Summarise) -> Done:
        """Have QuPath's process change an image; it is unchanged on an error (ImageError)."""
        self._check(entry)
        if self.stamps.get(entry.id) != self._stamps(entry):
            raise ImageError(
                f"{entry.name}: QuPath changed the image or its project since this run began, and "
                "nothing was written into it: close it in QuPath and run again"
            )
        data = self.files.saved.data(entry)
        with self._restored_on_error(entry, data):
            done = self.process.ask(question, partial(logger.warning, "%s: %s", entry.name))
        self.stamps[entry.id] = self._stamps(entry)
        return done

    def _read(self, entry: ImageEntry, export: Callable[[Image], Export | ExportStains]) -> None:
        """Have QuPath's process write to a file what is saved in an image.

        Again if somebody saved it meanwhile: the file would be newer, but without that.
        """
        while True:
            self._check(entry)
            question = export(self._image(entry))
            self.process.ask(question)
            if question.image == self._image(entry):
                break
        if question.image.data is not None:
            write_record(self.layout.source(question.file), question.image.data)

    def _check(self, entry: ImageEntry) -> None:
        """Raise ImageError for an image that QuPath cannot open, or should not."""
        data = self.files.saved.data(entry)
        if entry.problem:
            raise ImageError(entry.problem)
        if _last_version(data).exists():
            raise ImageError(
                f"{entry.name}: QuPath is saving it, or was stopped while it did: open the image "
                "in QuPath, save it, close it, and run again"
            )
        if data.exists() and not _is_whole(data):
            raise ImageError(f"{entry.name}: {damaged(data, self.layout.backups(entry.id))}")

    @contextmanager
    def _restored_on_error(self, entry: ImageEntry, data: Path) -> Iterator[None]:
        """Restore an image's data on an error; back them up before our first write."""
        before = data.with_name(data.name + ".patchcl-before")
        signature = data_signature(data)
        with writing(before):  # and QuPath can write there, too
            before.parent.mkdir(parents=True, exist_ok=True)
            existed = _is_there(data)
        if existed:
            copy_once(data, self.layout.backups(entry.id) / data.name)
            with writing(before):
                _link(data, before)
        try:
            yield
        except NotWrittenError:
            raise  # what is there now may be somebody else's
        except BaseException:
            self._keep_other_save(entry, data, signature)
            if existed:
                replace_file(before, data)
            else:
                remove_file(data)
            remove_file(_last_version(data))
            raise
        finally:
            discard(before)  # it remains if both are names of one file

    def _keep_other_save(self, entry: ImageEntry, data: Path, before: FileSignature | None) -> None:
        """Copy an image's data that somebody saved meanwhile to where our copies are."""
        now = data_signature(data)
        if now is None or now == before or not _is_whole(data):
            return
        kept = self.layout.backups(entry.id) / f"{data.name}.{now.modified_ns}"
        copy_once(data, kept)
        logger.warning("%s: what was saved meanwhile is in %s", entry.name, kept)


def _is_there(path: Path) -> bool:
    """Whether a file exists. Raises OSError where that cannot be told, as on a network folder that
    is gone for a moment: what is taken for missing is removed when something fails."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _last_version(data: Path) -> Path:
    """The path to which QuPath moves the old data while it saves the new."""
    return data.with_name(data.name + ".bkp")


def _link(path: Path, other: Path) -> None:
    """A hard link to a file, which QuPath replaces and does not overwrite; else a copy."""
    remove_file(other)
    try:
        os.link(path, other)
    except OSError:  # not on every file system
        shutil.copy2(path, other)


def _is_whole(data: Path) -> bool:
    """Whether a data.qpdata is complete, by both its ends; QuPath reads a part without error."""
    with data.open("rb") as file:
        begins = file.read(4) == JAVA_OBJECTS
        file.seek(max(0, file.seek(0, os.SEEK_END) - 6))
        return begins and file.read() == b"t\x00\x03EOF"  # the string "EOF"
