"""Projects read as files, without Java: .qpproj as QuPath 0.3 to 0.7 write it.

What QuPath does was read in its source: DefaultProject, ImageServers and UriUpdater.
"""

from __future__ import annotations

import itertools
import json
import math
import ntpath
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

import shapely

from patchcl_qupath.config import CORRECTED, TO_CORRECT, ResultConfig
from patchcl_qupath.datatypes import CorrectionRoi, Corrections, ImageEntry, Nuclei, QuPathSummary
from patchcl_qupath.errors import ProjectError
from patchcl_qupath.project.protocol import Backend, BackendKind
from patchcl_qupath.slides.stains import H_DAB
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import ResultRecord, RoisRecord, write_record

SEARCH_DEPTH = 4  # folders, the project's included, in which QuPath looks for a lost image
BIO_FORMATS = "BioFormatsServerBuilder"
SAVING_S = 10.0  # QuPath may save an import so long after the script that did it
MICROMETRES = {"µm", "μm", "um"}  # the micro sign, and the Greek letter

# How QuPath's builders that change pixels or coordinates are called in a message.
VIEWS = {
    "rotated": "a rotated view",
    "flipped": "a flipped view",
    "cropped": "a cropped view",
    "affine": "a transformed view",
    "sparse": "stitched from several images",
    "channels": "merged from several images",
    "color": "a view with other colours",
    "color_deconvolved": "a colour-deconvolved view",
    "normalized": "a view with other colours",
    "swapRedBlue": "a view with red and blue swapped",
}


@dataclass(frozen=True)
class FilesProject:
    """A project whose files are read and written directly.

    ``path`` of the .qpproj file; ``content`` is what it holds.
    """

    path: Path
    content: dict[str, Any]
    backend: Backend = field(default_factory=lambda: Backend(kind=BackendKind.FILES))

    @classmethod
    def open(cls, path: Path) -> FilesProject:
        """The project of a .qpproj file, or of a folder that holds one. Raises ProjectError."""
        path = _project_file(path).resolve()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProjectError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:  # not UTF-8, or not JSON
            backup = path.with_name(path.name + ".backup")
            hint = f"put {backup.name} in its place" if backup.exists() else "open it in QuPath"
            raise ProjectError(f"{path} is damaged ({error}): {hint}") from error
        if not _is_project(content):
            raise ProjectError(
                f"{path} does not list its images as QuPath 0.3 to 0.7 do: open it in QuPath and "
                "save it again"
            )
        return cls(path, content)

    @property
    def layout(self) -> Layout:
        """Where our own files lie, beside QuPath's."""
        return Layout(self.path.parent / "patchcl")

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order."""
        return [self._image(entry) for entry in self.content["images"]]

    def with_regions(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, cut to annotations that groovy/export_regions.groovy exported."""
        from patchcl_qupath.project.drawn import read_regions

        file = self.layout.regions(entry.id)
        found = read_regions(file, entry.name, classes)
        notes = [f"no annotation of class {name}" for name in classes if name not in found]
        if not self.is_current(file, entry):
            notes.append(
                "its annotations were exported before it was last saved in QuPath: if they changed "
                "since, run groovy/export_regions.groovy and then this again"
            )
        regions = itertools.chain.from_iterable(found.values())
        return replace(entry, regions=tuple(regions), note="; ".join(notes) or None)

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with the stains that groovy/export_regions.groovy exported.

        Else with QuPath's default, where a person said that it is stained with DAB.
        """
        from patchcl_qupath.project.drawn import read_stains

        file = self.layout.stains(entry.id)
        stains = read_stains(file, entry.name)
        if stains is None and self._image_type(entry.id) == "BRIGHTFIELD_H_DAB":
            return replace(entry, stains=H_DAB)
        if stains is None or self.is_current(file, entry):
            return replace(entry, stains=stains)
        note = (
            "its stains were exported before it was last saved in QuPath: if they changed since, "
            "run groovy/export_regions.groovy and then this again"
        )
        return replace(entry, stains=stains, note="; ".join(filter(None, [entry.note, note])))

    def is_current(self, file: Path, entry: ImageEntry) -> bool:
        """Whether a file that QuPath exported is there, and of the image as it was last saved."""
        data = self.data(entry)
        return file.exists() and (
            not data.exists() or file.stat().st_mtime_ns > data.stat().st_mtime_ns
        )

    def corrections(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The ROIs and nuclei that groovy/export_labels.groovy exported."""
        from patchcl_qupath.project.drawn import read_labels

        return read_labels(self.layout.labels(entry.id), entry.name, roi_class)

    def data(self, entry: ImageEntry) -> Path:
        """Where QuPath keeps an image's objects; there is none for an image never saved."""
        return self.path.parent / "data" / entry.id / "data.qpdata"

    def write(
        self,
        entry: ImageEntry,
        parts: Iterable[Nuclei],
        config: ResultConfig,
        result: ResultRecord,
    ) -> Path:
        """Replace an image's nuclei; see ``write_results``."""
        from patchcl_qupath.project.results import write_results

        folder = self.layout.results(entry.id)
        write_results(folder, parts, config, result)
        return folder

    def corrected_rois(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The ROIs marked as corrected that groovy/export_labels.groovy exported."""
        from patchcl_qupath.project.drawn import read_corrected

        return read_corrected(self.layout.labels(entry.id), entry.name)

    def mark_rois(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Write the ROIs to correct to a file, for groovy/import_nuclei.groovy."""
        file = self.layout.rois(entry.id)
        if not rois and not file.exists():
            return "no ROIs"
        made = datetime.now(UTC).isoformat(timespec="seconds")
        write_record(file, RoisRecord(made=made, rois=tuple(rois)))
        return "import_nuclei.groovy now marks the ROIs in QuPath"

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """What QuPath has of an image: from its summary, and from the times of files."""
        objects = self._summary(entry.id).get("hierarchy") or {}
        counts = objects.get("annotationClassificationCounts") or {}
        ours = [self.layout.result(entry.id), self.layout.rois(entry.id)]
        made, imported = max(map(_modified, ours)), _modified(self.layout.receipt(entry.id))
        saved = _modified(self.data(entry))
        return QuPathSummary(
            to_correct=counts.get(TO_CORRECT, 0),
            corrected=counts.get(CORRECTED, 0),
            is_current=imported >= made > 0,
            saved_later=saved > imported + SAVING_S,
        )

    def remove(self, entry: ImageEntry) -> str:
        """Remove an image's nuclei, and tell the import script to take them out of the image."""
        from patchcl_qupath.project.results import write_removed

        results = self.layout.results(entry.id)
        self.layout.rois(entry.id).unlink(missing_ok=True)
        if not results.exists() and not self.layout.receipt(entry.id).exists():
            return "no nuclei"
        write_removed(results)
        return "files removed: import_nuclei.groovy now takes the nuclei out of the image in QuPath"

    def close(self) -> None:
        """Nothing is open."""

    def _image(self, entry: dict[str, Any]) -> ImageEntry:
        id_, builder = str(entry["entryID"]), entry["serverBuilder"]
        # A generated pyramid has the pixels and the frame of the image within. Its metadata, on
        # the outside, are what a person corrected.
        metadata = builder.get("metadata") or {}
        while builder.get("builderType") == "pyramidize":
            builder = builder.get("builder") or {}
            metadata = metadata or builder.get("metadata") or {}
        uri = str(builder.get("uri", ""))
        stored = path_of_uri(uri)
        name = str(entry.get("imageName") or (stored.name if stored else id_))
        found = self._locate(stored) if stored else None
        args = [str(arg) for arg in builder.get("args") or []]
        openslide = not str(builder.get("providerClassName")).endswith(BIO_FORMATS)
        return ImageEntry(
            id=id_,
            name=name,
            path=found or Path(str(stored or uri)),
            mpp=_pixel_size(metadata),
            size=_size(metadata),
            use_bounds=openslide and "--no-crop" not in args,
            problem=_problem(name, builder, args, metadata)
            or (_not_brightfield(name) if self._image_type(id_) == "FLUORESCENCE" else None)
            or (_lost(name, stored, uri) if found is None else None),
        )

    def _locate(self, stored: PurePath) -> Path | None:
        """Where an image is now: as QuPath's window finds it, in the order that it tries.

        Where it was; where it is if it moved along with the project; a file of its name in the
        project's folder.
        """
        if isinstance(stored, PureWindowsPath) == (os.name == "nt") and Path(stored).is_file():
            return Path(stored)
        previous = path_of_uri(str(self.content.get("uri") or ""))
        if previous is not None and type(previous) is type(stored):
            flavour = ntpath if isinstance(stored, PureWindowsPath) else posixpath
            try:
                relative = flavour.relpath(str(stored), str(previous.parent))
            except ValueError:  # another drive
                relative = None
            if relative is not None:
                parts = relative.split(flavour.sep)
                moved = Path(os.path.normpath(self.path.parent.joinpath(*parts)))
                if moved.is_file():
                    return moved
        return self._files_by_name.get(stored.name)

    @cached_property
    def _files_by_name(self) -> dict[str, Path]:
        """Files in the project's folder; of several with one name the first, as in QuPath."""
        found: dict[str, Path] = {}
        for file in _walk(self.path.parent, SEARCH_DEPTH):
            found.setdefault(file.name, file)
        return found

    def _image_type(self, id_: str) -> str | None:
        """The image type that a person set in QuPath, from its summary."""
        found = self._summary(id_).get("imageType")
        return None if found is None else str(found)

    def _summary(self, id_: str) -> dict[str, Any]:
        """What QuPath writes beside an image's objects: how many there are, say."""
        from patchcl_qupath.storage.files import read_json

        # An image that was never saved has none.
        return read_json(self.path.parent / "data" / id_ / "summary.json") or {}


def _modified(path: Path) -> float:
    """When a file was written, in s; 0 where there is none."""
    return path.stat().st_mtime if path.exists() else 0.0


def path_of_uri(uri: str) -> PurePath | None:
    """The path of a file: URI as Java writes it, in the flavour of the system that it names.

    ``file:/D:/a%20b.svs`` and ``file://server/share/a.svs`` are Windows paths anywhere. None for
    what is not a file.
    """
    parts = urlsplit(uri)
    path = unquote(parts.path)
    if parts.scheme not in ("file", "") or not path.startswith("/"):
        return None
    if parts.netloc not in ("", "localhost"):
        return PureWindowsPath(f"//{parts.netloc}{path}")
    if path.startswith("//"):
        return PureWindowsPath(path)
    if re.match(r"/[A-Za-z]:", path):
        return PureWindowsPath(path[1:])
    return PurePosixPath(path)


def _project_file(path: Path) -> Path:
    if path.is_dir():
        found = sorted(path.glob("*.qpproj"))
        if len(found) == 1:
            return found[0]
        many = "several projects, name one of them" if found else "no project (.qpproj)"
        raise ProjectError(f"{path} holds {many}")
    if not path.exists():
        raise ProjectError(f"{path} does not exist: give the path of a project.qpproj")
    if path.suffix.lower() != ".qpproj":
        raise ProjectError(
            f"{path.name} is not a QuPath project: make one of images with "
            f"`patchcl-qp init DIR {path.name}`"
        )
    return path


def _is_project(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and all(
        isinstance(image, dict)
        and isinstance(image.get("entryID"), int)
        and isinstance(image.get("serverBuilder"), dict)
        for image in images
    )


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files of a folder, then those of its folders, without hidden ones."""
    try:
        inside = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    except OSError:
        return
    yield from (item for item in inside if item.is_file())
    if depth > 1:
        for item in inside:
            if item.is_dir():
                yield from _walk(item, depth - 1)


def _pixel_size(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """(x, y) um/px, or None where QuPath knows none.

    QuPath keeps a corrected size in project.qpproj; data/*/server.json it writes and never reads.
    """
    calibration = metadata.get("pixelCalibration") or {}
    sides = [calibration.get(side) or {} for side in ("pixelWidth", "pixelHeight")]
    if any(side.get("unit") not in MICROMETRES for side in sides):
        return None
    x, y = (float(side.get("value", math.nan)) for side in sides)
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _size(metadata: dict[str, Any]) -> tuple[int, int] | None:
    width, height = metadata.get("width"), metadata.get("height")
    return (int(width), int(height)) if width and height else None


def _problem(
    name: str, builder: dict[str, Any], args: list[str], metadata: dict[str, Any]
) -> str | None:
    """Why an image that is there cannot be used, and what to do; None if it can."""
    kind = builder.get("builderType")
    if kind != "uri":
        view = VIEWS.get(str(kind), f"a view of a kind not known here ({kind})")
        return (
            f"{name} is {view}: add the original image to the project, or export this one as "
            "OME-TIFF and add that"
        )
    series = args[args.index("--series") + 1 :][:1] if "--series" in args else ["0"]
    if series != ["0"]:
        return f"{name} is a further image of its file: export it as OME-TIFF and add that"
    if metadata.get("isRGB") is False:
        return _not_brightfield(name)
    return None


def _not_brightfield(name: str) -> str:
    return (
        f"{name} is a fluorescence or multichannel image: only brightfield RGB (H&E) can be "
        "segmented; if it is H&E, set its image type in QuPath and save"
    )


def _lost(name: str, stored: PurePath | None, uri: str) -> str:
    if stored is None:
        return f"{name} is not a file ({uri}): only images on disk can be read, download it"
    return (
        f"{name} is not at {stored}, nor in the project's folder: put the file beside the "
        "project, or open the project in QuPath and fix the path"
    )
