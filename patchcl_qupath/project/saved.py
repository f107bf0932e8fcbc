"""What QuPath saved of a project's images, by its files and their times: without Java."""

from __future__ import annotations

from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from patchcl_qupath.config import CORRECTED, TO_CORRECT
from patchcl_qupath.datatypes import ImageEntry, QuPathSummary
from patchcl_qupath.project.qpproj import as_count, as_object
from patchcl_qupath.storage.files import read_json
from patchcl_qupath.storage.geojson import class_name
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import (
    FileSignature,
    ReceiptRecord,
    data_signature,
    read_record,
)

JAVA_OBJECTS = b"\xac\xed\x00\x05"  # the beginning of a file of Java's serialization
_IMPORTED_PROPERTY = b"patchcl.imported"  # of groovy/import_nuclei.groovy
_RUN_PROPERTY = b"patchcl.run"
SAVING_S = 10.0  # QuPath may save an import so long after the script that made it but did not save


@dataclass(frozen=True)
class SavedImages:
    """The images of a project as QuPath saved them; ``layout`` has the paths of our own files,
    which lie beside its own."""

    layout: Layout

    def data(self, entry: ImageEntry) -> Path:
        """QuPath's file of an image's objects; there is none for an image that was never saved."""
        return self._folder(entry.id) / "data.qpdata"

    def image_type(self, id_: str) -> str | None:
        """The image type that a person set in QuPath, from its summary."""
        found = self._written_summary(id_).get("imageType")
        return None if found is None else str(found)

    def counted(self, entry: ImageEntry, name: str) -> int | None:
        """How many annotations of a class QuPath counted in a saved image; None if unknown."""
        objects = as_object(self._written_summary(entry.id).get("hierarchy"))
        counts = objects.get("annotationClassificationCounts")
        if not isinstance(counts, dict):
            return None
        wanted = class_name(name)
        return sum(as_count(counts[each]) for each in counts if class_name(each) == wanted)

    def is_current(self, file: Path, entry: ImageEntry) -> bool:
        """Whether an exported file exists, and is newer than the last save of its image.

        Where it is known of which data it was exported, these must be there: an older copy has its
        own time.
        """
        data, source = self.data(entry), self.layout.source(file)
        if _modified(source) >= _modified(file) > 0:  # no script exported it since
            known = read_record(source, FileSignature)
            if known is not None and known != data_signature(data):
                return False
        return file.exists() and (
            not data.exists() or file.stat().st_mtime_ns > data.stat().st_mtime_ns
        )

    def summary(self, entry: ImageEntry) -> QuPathSummary:
        """The state of an image in QuPath: from QuPath's summary, and from the times of files."""
        objects = as_object(self._written_summary(entry.id).get("hierarchy"))
        counts = as_object(objects.get("annotationClassificationCounts"))
        written = [self.layout.result(entry.id), self.layout.rois(entry.id)]
        made, imported = max(map(_modified, written)), _modified(self.layout.receipt(entry.id))
        receipt = read_record(self.layout.receipt(entry.id), ReceiptRecord)
        saved = _modified(self.data(entry))
        saving = 0.0 if receipt is None or receipt.saved else SAVING_S
        return QuPathSummary(
            to_correct=as_count(counts.get(TO_CORRECT)),
            corrected=as_count(counts.get(CORRECTED)),
            is_current=imported >= made > 0,
            is_saved=receipt is None or self._has_import(entry, receipt, objects.get("nObjects")),
            saved_later=saved > imported + saving,
        )

    def _has_import(self, entry: ImageEntry, receipt: ReceiptRecord, objects: object) -> bool:
        """Whether what an import did is saved in the image, of which QuPath counted ``objects``.

        An image that is older than its import is another one: a copy of earlier, say. One that was
        saved later may have been saved without it: by a QuPath in which it was open meanwhile, or
        after an import that nobody saved.
        """
        data = self.data(entry)
        saved, imported = _modified(data), _modified(self.layout.receipt(entry.id))
        if receipt.saved and saved <= imported:
            return saved > 0 and receipt.data in (None, data_signature(data))
        has_room = receipt.saved or not isinstance(objects, int) or 2 * objects >= receipt.added
        return saved >= imported and has_room and _may_show(data, receipt.run)

    def _written_summary(self, id_: str) -> dict[str, Any]:
        """The summary that QuPath writes beside an image's objects; empty if never saved."""
        return read_json(self._folder(id_) / "summary.json") or {}

    def _folder(self, id_: str) -> Path:
        return self.layout.root.parent / "data" / id_


def _modified(path: Path) -> float:
    """When a file was written, in s; 0 if there is none, or if its folder may not be read."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _may_show(data: Path, run: str) -> bool:
    """Whether QuPath's file of an image may have the nuclei of a run: unless it says otherwise.

    Imports leave the run in a property of the image, near the end of the file; those of earlier
    versions did not.
    """
    try:
        with data.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            if content[: len(JAVA_OBJECTS)] != JAVA_OBJECTS:
                return True
            at = content.rfind(_RUN_PROPERTY)
            if at < 0:
                return content.rfind(_IMPORTED_PROPERTY) >= 0
            found = content[at + len(_RUN_PROPERTY) :][: 3 + len(run)]
    except (OSError, ValueError):  # of an empty file
        return True
    return found == b"t" + len(run).to_bytes(2) + run.encode()  # a string, as Java writes it
