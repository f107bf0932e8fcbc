"""project.qpproj as QuPath 0.3 to 0.7 write it: the images that it lists.

The format was read in QuPath's source: DefaultProject, ImageServers and UriUpdater.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from patchcl_qupath.errors import ProjectError
from patchcl_qupath.storage.files import ZARR_METADATA

BIO_FORMATS = "BioFormatsServerBuilder"
MICROMETRES = {"µm", "μm", "um"}  # the micro sign, and the Greek letter

# Names in messages of QuPath's builders that change pixels or coordinates.
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


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """One image of a .qpproj file.

    ``path`` is that of its file when the project was saved; None if ``uri`` is not that of a file.
    ``mpp`` is (x, y) µm/px and ``size`` (width, height) at level 0, None if QuPath has none.
    ``problem`` is the reason why such an image cannot be used, wherever its file is, or None.
    """

    id: str
    name: str
    uri: str
    path: PurePath | None
    mpp: tuple[float, float] | None
    size: tuple[int, int] | None
    use_bounds: bool
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class StoredProject:
    """A .qpproj file. ``path`` is that of the file when it was saved, None if it is not given."""

    path: PurePath | None
    images: tuple[StoredImage, ...]


def project_file(path: Path) -> Path:
    """The .qpproj file of a path: the file itself, or the only one of a folder.

    Raises ProjectError.
    """
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


def read_project(file: Path) -> StoredProject:
    """The content of a .qpproj file. Raises ProjectError for one that is damaged."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProjectError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        backup = file.with_name(file.name + ".backup")
        hint = f"put {backup.name} in its place" if backup.exists() else "open it in QuPath"
        raise ProjectError(f"{file} is damaged ({error}): {hint}") from error
    if not _is_project(content):
        raise ProjectError(
            f"{file} does not list its images as QuPath 0.3 to 0.7 do: open it in QuPath and "
            "save it again"
        )
    return StoredProject(
        path=path_of_uri(str(content.get("uri") or "")),
        images=tuple(_image(entry) for entry in content["images"]),
    )


def path_of_uri(uri: str) -> PurePath | None:
    """The path of a file: URI as Java writes it, in the flavour of its own operating system.

    ``file:/D:/a%20b.svs`` and ``file://server/share/a.svs`` are Windows paths anywhere. None for a
    URI of another scheme.
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


def not_brightfield(name: str) -> str:
    """The problem of an image with fluorescence, or with other channels than red, green, blue."""
    return (
        f"{name} is a fluorescence or multichannel image: only brightfield RGB (H&E) can be "
        "segmented; if it is H&E, set its image type in QuPath and save"
    )


def _is_project(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and all(
        isinstance(image, dict)
        and isinstance(image.get("entryID"), int)
        and isinstance(image.get("serverBuilder"), dict)
        for image in images
    )


def _image(entry: dict[str, Any]) -> StoredImage:
    id_, builder = str(entry["entryID"]), entry["serverBuilder"]
    # A generated pyramid has the pixels and the frame of the image within. Metadata that a person
    # corrected are on the outside.
    metadata = builder.get("metadata") or {}
    while builder.get("builderType") == "pyramidize":
        builder = builder.get("builder") or {}
        metadata = metadata or builder.get("metadata") or {}
    uri = str(builder.get("uri", ""))
    path = path_of_uri(uri)
    if path is not None and path.name in ZARR_METADATA:  # QuPath opens the folder by it, too
        path = path.parent
    name = str(entry.get("imageName") or (path.name if path else id_))
    args = [str(arg) for arg in builder.get("args") or []]
    openslide = not str(builder.get("providerClassName")).endswith(BIO_FORMATS)
    return StoredImage(
        id=id_,
        name=name,
        uri=uri,
        path=path,
        mpp=_pixel_size(metadata),
        size=_size(metadata),
        use_bounds=openslide and "--no-crop" not in args,
        problem=_problem(
            name=name,
            kind=str(builder.get("builderType")),
            args=args,
            metadata=metadata,
            # Bio-Formats does not call the channels of an OME-Zarr RGB.
            is_zarr=path is not None and ".zarr" in str(path).lower(),
        ),
    )


def _pixel_size(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """(x, y) µm/px, or None if QuPath has none.

    QuPath keeps a corrected size in project.qpproj; data/*/server.json is written and never read.
    """
    calibration = metadata.get("pixelCalibration") or {}
    sides = [calibration.get(side) or {} for side in ("pixelWidth", "pixelHeight")]
    if any(side.get("unit") not in MICROMETRES for side in sides):
        return None
    x, y = (float(side.get("value", math.nan)) for side in sides)
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _size(metadata: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) in px, or None if QuPath did not save it."""
    width, height = metadata.get("width"), metadata.get("height")
    return (int(width), int(height)) if width and height else None


def _is_red_green_blue(metadata: dict[str, Any]) -> bool:
    """Whether an image is three channels of 8 bit, of these colours, in this order."""
    channels = metadata.get("channels") or []
    colours = [channel.get("color", 0) & 0xFFFFFF for channel in channels]  # of 0xAARRGGBB
    return metadata.get("pixelType") == "UINT8" and colours == [0xFF0000, 0x00FF00, 0x0000FF]


def _problem(
    *, name: str, kind: str, args: list[str], metadata: dict[str, Any], is_zarr: bool
) -> str | None:
    """Why an image with a builder of that kind cannot be used, and what to do; None if it can."""
    if kind != "uri":
        view = VIEWS.get(kind, f"a view of an unknown kind ({kind})")
        return (
            f"{name} is {view}: add the original image to the project, or export this one as "
            "OME-TIFF and add that"
        )
    series = args[args.index("--series") + 1 :][:1] if "--series" in args else ["0"]
    if series != ["0"]:
        return f"{name} is a further image of its file: export it as OME-TIFF and add that"
    if metadata.get("isRGB") is False and not (is_zarr and _is_red_green_blue(metadata)):
        return not_brightfield(name)
    return None
