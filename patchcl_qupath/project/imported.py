"""What became in QuPath of the nuclei of an image, by the receipt of their import."""

from __future__ import annotations

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project.protocol import Project
from patchcl_qupath.storage.records import Imported, ReceiptRecord, ResultRecord, read_record


def imported_nuclei(project: Project, entry: ImageEntry) -> Imported | None:
    """What became of the nuclei on disk; None where they are not in the image as it is saved.

    An import into QuPath's window that nobody saved is none, nor is one of earlier nuclei.
    """
    layout = project.layout
    result = read_record(layout.result(entry.id), ResultRecord)
    receipt = read_record(layout.receipt(entry.id), ReceiptRecord)
    if result is None or receipt is None or not project.qupath_summary(entry).is_saved:
        return None
    same_run = (receipt.run, receipt.nuclei.found) == (result.run, result.nuclei)
    later = layout.receipt(entry.id).stat().st_mtime >= layout.result(entry.id).stat().st_mtime
    return receipt.nuclei if same_run and later else None
