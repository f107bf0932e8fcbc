"""The files backend: a project whose files are read and written directly, without Java.

Annotations come from what the Groovy scripts exported; nuclei are left for
groovy/import_nuclei.groovy to import.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import shapely

from patchcl_qupath.config import BackendKind, ResultConfig
from patchcl_qupath.datatypes import (
    CorrectionRoi,
    Corrections,
    ImageEntry,
    Nuclei,
    QuPathSummary,
    StainVectors,
)
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project.drawn import (
    ExportedLabels,
    classes_text,
    has_own_stains,
    of_classes,
    read_drawn,
    read_pixel_size,
    read_regions,
    read_stains,
)
from patchcl_qupath.project.locate import Location, Locator
from patchcl_qupath.project.protocol import Backend
from patchcl_qupath.project.qpproj import (
    StoredImage,
    StoredProject,
    not_brightfield,
    project_file,
    read_project,
)
from patchcl_qupath.project.saved import SavedImages
from patchcl_qupath.slides.pixel_size import PixelSize, PixelSizeSource
from patchcl_qupath.slides.stain_vectors import H_DAB
from patchcl_qupath.storage.files import (
    WINDOWS,
    absolute,
    readable,
    remove_file,
    restore_replaced,
    too_long,
)
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import (
    RegionSummary,
    ResultRecord,
    RoisRecord,
    are_one_size,
    write_record,
)
from patchcl_qupath.timing import utc_now

if TYPE_CHECKING:  # it loads pyarrow
    from patchcl_qupath.storage.parquet import Table


@dataclass(frozen=True)
class FilesProject:
    """A project whose files are read and written directly.

    ``path`` is that of the .qpproj file, ``stored`` its content.
    """

    path: Path
    stored: StoredProject
    backend: Backend = field(default_factory=lambda: Backend(kind=BackendKind.FILES))

    @classmethod
    def open(cls, path: Path) -> FilesProject:
        """The project of a .qpproj file, or of a folder that holds one. Raises ProjectError."""
        path = _found(project_file(path))
        return cls(path, read_project(path))._restored()

    def reread(self) -> FilesProject:
        """The project as it is on disk now. Raises ProjectError."""
        return replace(self, stored=read_project(self.path))._restored()

    def _restored(self) -> FilesProject:
        """The project, with the results that a run was replacing as it was killed."""
        restore_replaced(self.layout.root, self.layout.replaced())
        return self

    @property
    def layout(self) -> Layout:
        """The paths of our own files, beside QuPath's."""
        return Layout(self.path.parent / "patchcl")

    @property
    def saved(self) -> SavedImages:
        """The images as QuPath saved them."""
        return SavedImages(self.layout)

    @property
    def qupath_version(self) -> str | None:
        """The QuPath that saved the project, if it is known."""
        return self.stored.version

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order."""
        return [self._entry(image) for image in self.stored.images]

    def with_regions(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, limited to annotations that groovy/export_regions.groovy exported."""
        file = self.layout.regions(entry.id)
        found = read_regions(file, entry.name, classes)
        regions = itertools.chain.from_iterable(found.values())
        note = self._note_of_classes(entry, classes, found)
        return replace(entry, regions=tuple(regions), note=_all_notes(entry.note, note))

    def with_drawn(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image with annotations to count in that groovy/export_regions.groovy exported."""
        all_drawn = read_drawn(self.layout.regions(entry.id), entry.name)
        found = of_classes(all_drawn, classes)
        others = {region.class_name for region in all_drawn if not region.is_core} - {""}
        drawn = itertools.chain.from_iterable(found.values())
        note = self._note_of_classes(entry, classes, found, others)
        return replace(entry, drawn=tuple(drawn), note=_all_notes(entry.note, note))

    def _note_of_classes(
        self,
        entry: ImageEntry,
        classes: Sequence[str],
        found: Mapping[str, Sequence[object]],
        others: Collection[str] = (),
    ) -> str:
        """What a person should know of the annotations of an image that were ``found``, by class.

        Where none was, classes may be misspelt: ``others`` are those that are there.
        """
        if found:
            notes = [f"no annotation of class {name}" for name in classes if name not in found]
        else:
            names = " or ".join(classes)
            notes = [f"no annotation of class {names} (it has {classes_text(others)})"]
        again = "run export_regions.groovy and then this again"
        if not self.saved.is_current(self.layout.regions(entry.id), entry):
            notes.append(
                "its annotations were exported before it was last saved in QuPath: if they changed "
                f"since, {again}"
            )
            return "; ".join(notes)
        for name, exported in found.items():  # times do not tell in a copy of the project
            if (saved := self.saved.counted(entry, name) or 0) > len(exported):
                notes.append(
                    f"{saved:,} annotations of class {name} are saved in QuPath, "
                    f"{len(exported):,} were exported: if that is not meant, {again}"
                )
        return "; ".join(notes)

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with the stains that groovy/export_regions.groovy exported.

        Without an export, an image whose type is H-DAB in QuPath has QuPath's default stains.
        """
        file = self.layout.stains(entry.id)
        own, note = read_stains(file, entry.name), None
        is_current = self.saved.is_current(file, entry)
        if own is not None and not is_current:
            note = (
                "its stains were exported before it was last saved in QuPath: if they changed "
                "since, run export_regions.groovy and then this again"
            )
        elif not is_current and has_own_stains(self.saved.data(entry)):
            note = (
                "its own stain vectors in QuPath were not exported, and QuPath's default ones are "
                "measured: for its own, run export_regions.groovy and then this again"
            )
        stains = own or _stains_of_type(self.saved.image_type(entry.id))
        return replace(entry, stains=stains, note=_all_notes(entry.note, note))

    def exported_stains(self, entry: ImageEntry) -> StainVectors | None:
        """The stains that were exported; else QuPath's default ones of an image of type H-DAB."""
        own = read_stains(self.layout.stains(entry.id), entry.name)
        return own or _stains_of_type(self.saved.image_type(entry.id))

    def corrections(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The ROIs and nuclei that groovy/export_labels.groovy exported.

        Raises ImageError, too, if it exported those of another class, or none of an image in which
        some were saved later.
        """
        return self.corrections_in(self.labels(entry), entry, roi_class)

    def corrections_in(
        self, labels: ExportedLabels, entry: ImageEntry, roi_class: str
    ) -> Corrections:
        """The same, of a file that was read. Raises ImageError as ``corrections`` does."""
        file = self.layout.labels(entry.id)
        again = "run export_labels.groovy in QuPath, and refine again"
        if not labels.may_be_of(roi_class):
            raise ImageError(
                f"{entry.name}: {file} was not exported for ROIs of class {roi_class}: set "
                f"roiClass to that in the script, {again}"
            )
        found = labels.corrections(roi_class, entry.mpp, entry.fallback_mpp)
        is_current = self.saved.is_current(file, entry)
        saved = self.saved.counted(entry, roi_class) or 0
        if saved and not found.rois:
            raise ImageError(
                f"{entry.name}: {saved:,} ROIs of class {roi_class} were not exported: {again}; or "
                "leave the image out with --image"
            )
        exported = labels.count(roi_class)
        if found.rois and not is_current:
            note = (
                "its ROIs were exported before it was last saved in QuPath: if they changed since, "
                + again
            )
        elif found.rois and saved > exported:  # times do not tell in a copy of the project
            note = (
                f"{saved:,} ROIs of class {roi_class} are saved in QuPath, {exported:,} were "
                f"exported: if that is not meant, {again}"
            )
        else:
            return found
        return replace(found, notes=(*found.notes, note))

    def labels(self, entry: ImageEntry) -> ExportedLabels:
        """What groovy/export_labels.groovy exported. Raises ImageError for a damaged file."""
        return ExportedLabels.read(self.layout.labels(entry.id), entry.name)

    def corrected_rois(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The ROIs marked as corrected that groovy/export_labels.groovy exported."""
        return self.labels(entry).corrected_rois

    def write(
        self,
        entry: ImageEntry,
        batches: Iterable[Nuclei | Table],
        config: ResultConfig,
        result: ResultRecord,
    ) -> None:
        """Replace an image's nuclei on disk; see ``write_results``."""
        from patchcl_qupath.project.results import write_results  # loads pyarrow

        folder = self.layout.results(entry.id)
        write_results(
            folder=folder,
            batches=batches,
            config=config,
            result=result,
            qupath_version=self.qupath_version,
        )

    def mark_rois(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Write the ROIs to correct to a file, for groovy/import_nuclei.groovy."""
        file = self.layout.rois(entry.id)
        if not rois and not file.exists():
            return "no ROIs"
        made = utc_now()
        write_record(file, RoisRecord(made=made, rois=tuple(rois)))
        return "import_nuclei.groovy now marks the ROIs in QuPath"

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """The state of an image in QuPath: from QuPath's summary, and from the times of files."""
        return self.saved.summary(entry)

    def summarise(self, entry: ImageEntry) -> tuple[RegionSummary, ...]:
        """Only QuPath can read an image's objects. Raises ImageError."""
        raise ImageError(
            f"{entry.name}: nuclei in QuPath are counted by QuPath: run summarise.groovy "
            "there, or pass --qupath DIR"
        )

    def remove(self, entry: ImageEntry) -> str:
        """Remove an image's files of nuclei; the import script then removes them from QuPath."""
        from patchcl_qupath.project.results import write_removed

        results = self.layout.results(entry.id)
        remove_file(self.layout.rois(entry.id))
        if not results.exists() and not self.layout.receipt(entry.id).exists():
            return "no nuclei"
        write_removed(results)
        return "files removed: import_nuclei.groovy now takes the nuclei out of the image in QuPath"

    def close(self) -> None:
        """Nothing is open."""

    @cached_property
    def _locator(self) -> Locator:
        paths = [image.path for image in self.stored.images if image.path is not None]
        return Locator(folder=self.path.parent, saved=self.stored.path, stored=paths)

    def _entry(self, image: StoredImage) -> ImageEntry:
        found = self._locator.locate(image.path) if image.path else Location()
        problem, image_type = image.problem, self.saved.image_type(image.id)
        if problem is None and image_type == "FLUORESCENCE":
            problem = not_brightfield(image.name)
        if problem is None and found.path is None:
            problem = _lost(image, found, self.path.parent)
        entry = ImageEntry(
            id=image.id,
            name=image.name,
            path=found.path or Path(str(image.path or image.uri)),
            mpp=image.mpp,
            size=image.size,
            series=image.series,
            series_name=image.series_name,
            use_bounds=image.use_bounds,
            problem=problem,
            note=image.note,
            stains=_stains_of_type(image_type),
        )
        return self._with_shown_pixel_size(entry)

    def _with_shown_pixel_size(self, entry: ImageEntry) -> ImageEntry:
        """The image with the pixel size that QuPath showed when its stains were exported.

        It may not be saved in the project, and counts until the image is saved.
        """
        file = self.layout.stains(entry.id)
        shown = read_pixel_size(file)
        if shown is None or are_one_size(shown, entry.mpp or (0.0, 0.0)):
            return entry
        if not self.saved.is_current(file, entry):
            return entry
        note = None
        if entry.mpp is not None:
            own, saved = (PixelSize(PixelSizeSource.QUPATH, mpp) for mpp in (shown, entry.mpp))
            note = (
                f"its pixel size is {own} µm, as exported from QuPath, where {saved} µm are saved: "
                "save the image there, or export it again"
            )
        return replace(entry, mpp=shown, note=_all_notes(entry.note, note))


def _stains_of_type(image_type: str | None) -> StainVectors | None:
    """The stains that the type of an image tells, where they are not those of H&E."""
    return H_DAB if image_type == "BRIGHTFIELD_H_DAB" else None


def _found(path: Path) -> Path:
    """The absolute path of a .qpproj file, beside which the project's other files lie.

    Links to its folder are followed where other machines may not have them. On Windows that would
    make a long path of a drive to which a person mapped a folder to have a short one.
    """
    return absolute(path) if WINDOWS and not path.is_symlink() else path.resolve()


def _all_notes(*notes: str | None) -> str | None:
    """Remarks as one, each of them once: regions of a run and those to count in may share some."""
    each = "; ".join(filter(None, notes)).split("; ")
    return "; ".join(dict.fromkeys(each)) or None


def _lost(image: StoredImage, found: Location, folder: Path) -> str:
    """The problem of an image whose file is not found in the project's ``folder``."""
    if image.path is None and re.match(r"(?!file:)[A-Za-z][\w+.-]+:", image.uri):
        return (
            f"{image.name} is not a file ({image.uri}): only images on disk can be read, "
            "download it"
        )
    if image.path is None:
        return (
            f"{image.name} has no path of a file in the project ({image.uri or 'no URI'}): remove "
            "it from the project in QuPath, and add the image again"
        )
    path = readable(str(image.path))
    if found.candidates:
        files = [readable(str(file.relative_to(folder))) for file in found.candidates[:3]]
        return (
            f"{image.name} is not at {path}, and files of that name in the project's folder may "
            f"belong to another image ({', '.join(files)}): open the project in QuPath and fix the "
            "path"
        )
    if found.denied:
        return (
            f"{image.name} is at {path}, which may not be read from here: ask for the permission, "
            "or copy the file into the project's folder"
        )
    if found.too_long:
        return too_long(image.name, found.too_long)
    return (
        f"{image.name} is not at {path}, nor in the project's folder: put the file beside "
        "the project, or open the project in QuPath and fix the path"
    )
