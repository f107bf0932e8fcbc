"""New QuPath projects from image files."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ProjectError, SlideError
from patchcl_qupath.project.qpproj import project_files
from patchcl_qupath.storage.files import absolute, is_file, is_too_long, write_json
from patchcl_qupath.storage.layout import Layout

QUPATH_VERSION = "0.5.1"  # whose format is written; 0.4 and later read it
OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
BIO_FORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"
OPENSLIDE_SUFFIXES = {".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".dcm", ".svslide"}

_RGB = {"Red": -65536, "Green": -16711936, "Blue": -16776961}  # Java's 0xAARRGGBB


@dataclass(frozen=True)
class NewImage:
    """An image of a new project.

    ``levels`` are the (width, height) of its pyramid in px, level 0 first. ``mpp`` (x, y) is the
    pixel size in µm for a file that does not have one; None if QuPath finds it in the file.
    ``is_first`` is whether the file begins with it.
    """

    path: Path
    levels: Sequence[tuple[int, int]]
    mpp: tuple[float, float] | None = None
    is_first: bool = True

    @classmethod
    def of_file(cls, path: Path, mpp: float | None) -> NewImage:
        """An image file; ``mpp`` is its pixel size, in µm, if it has none.

        Raises SlideError, which names the path as given.
        """
        from patchcl_qupath.slides.slide import Slide  # loads the readers of all formats

        if not is_file(path) and not is_too_long(absolute(path)):
            raise SlideError(_not_a_file(path))
        slide = Slide.open(ImageEntry("", str(path), absolute(path), fallback_mpp=mpp))
        return cls(
            path=slide.path,
            levels=slide.levels,
            mpp=None if slide.calibrated else slide.mpp_level0,
            is_first=slide.number == 0,
        )


def _not_a_file(path: Path) -> str:
    """What to tell a person of a path that is not that of a file or an OME-Zarr."""
    with suppress(OSError, ValueError):  # no permission, too long, or no path at all
        if path.is_dir():
            return f"{path} is a folder, and no OME-Zarr: name the image files in it"
    return f"{path} does not exist, or may not be read: check the path"


def init_project(folder: Path, images: Sequence[NewImage]) -> Path:
    """Make a QuPath project of ``images`` in ``folder``; the images are not moved or copied.

    Returns the path of project.qpproj. Raises ProjectError without images, or if the folder has a
    project, or files of images of one that is gone; StorageError if it cannot be written to.
    """
    if not images:
        raise ProjectError("a project needs an image: name the files of some")
    if folder.suffix.lower() == ".qpproj" and not folder.is_dir():
        raise ProjectError(f"{folder} is named as the file of a project: name the folder for it")
    if folder.is_file():
        raise ProjectError(f"{folder} is a file: name the folder for the project first")
    if existing := project_files(folder):
        raise ProjectError(
            f"{existing[0]} is there already: add images to it in QuPath, or name another folder"
        )
    if left := _left_by_another(folder, len(images)):
        raise ProjectError(
            f"{left} is of an image of an earlier project, and would be taken for one of the new "
            "image of that number: move the folders data and patchcl away (patchcl/models may "
            "stay), or name another folder"
        )
    path = absolute(folder) / "project.qpproj"
    now = int(time.time() * 1000)
    entries = [_entry(number, image) for number, image in enumerate(images, start=1)]
    write_json(
        path,
        {
            "version": QUPATH_VERSION,
            "createTimestamp": now,
            "modifyTimestamp": now,
            "uri": to_uri(path),
            "lastID": len(entries),
            "images": entries,
        },
    )
    return path


def _left_by_another(folder: Path, count: int) -> Path | None:
    """What an earlier project knew of an image whose number one of ``count`` new images will have.

    Files of images are found by number: QuPath and runs would use it for the new one.
    """
    layout = Layout(folder / "patchcl")
    of_image = (
        layout.result,
        layout.regions,
        layout.stains,
        layout.labels,
        layout.rois,
        layout.receipt,
        layout.changes,
        layout.backups,
        layout.outcome,
    )
    for number in map(str, range(1, count + 1)):
        files = [folder / "data" / number / "data.qpdata", *(of(number) for of in of_image)]
        if left := next(filter(Path.exists, files), None):
            return left
    return None


def to_uri(path: Path) -> str:
    """A file's URI with one slash, as Java writes it."""
    return absolute(path).as_uri().replace("file:///", "file:/", 1)


def _entry(number: int, image: NewImage) -> dict[str, Any]:
    builder: dict[str, Any] = {"builderType": "uri"}
    if image.path.suffix.lower() in OPENSLIDE_SUFFIXES:
        builder["providerClassName"] = OPENSLIDE  # otherwise QuPath chooses another reader
    elif not image.is_first:
        builder["providerClassName"] = BIO_FORMATS  # others, and itself unasked, show the first
    builder |= {"uri": to_uri(image.path), "args": []}
    # Metadata replace what QuPath reads from the file, pyramid levels included. OpenSlide adds
    # levels to NDPI, so metadata are written only if the pixel size is needed.
    if image.mpp is not None:
        builder["metadata"] = _metadata(image.path.name, image.levels, image.mpp)
    return {
        "serverBuilder": builder,
        "entryID": number,
        "randomizedName": str(uuid.uuid4()),
        "imageName": image.path.name,
        "metadata": {},
    }


def _metadata(
    name: str, levels: Sequence[tuple[int, int]], mpp: tuple[float, float]
) -> dict[str, Any]:
    width, height = levels[0]
    return {
        "name": name,
        "width": width,
        "height": height,
        "sizeZ": 1,
        "sizeT": 1,
        "channelType": "DEFAULT",
        "isRGB": True,
        "pixelType": "UINT8",
        "levels": [
            {"downsample": _downsample(levels[0], level), "width": level[0], "height": level[1]}
            for level in levels
        ],
        "channels": [{"name": colour, "color": value} for colour, value in _RGB.items()],
        "pixelCalibration": {
            "pixelWidth": {"value": mpp[0], "unit": "µm"},
            "pixelHeight": {"value": mpp[1], "unit": "µm"},
            "zSpacing": {"value": 1.0, "unit": "z-slice"},
            "timeUnit": "SECONDS",
            "timepoints": [],
        },
        "preferredTileWidth": 256,
        "preferredTileHeight": 256,
    }


def _downsample(level0: tuple[int, int], level: tuple[int, int]) -> float:
    """QuPath's downsample: an integer if the level's size differs by less than a pixel."""
    mean = (level0[0] / level[0] + level0[1] / level[1]) / 2
    whole = round(mean)
    cut = (abs(n0 / whole - n) for n0, n in zip(level0, level, strict=True))
    return float(whole) if all(n < 1 for n in cut) else mean
