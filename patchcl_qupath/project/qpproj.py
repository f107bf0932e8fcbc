"""project.qpproj as QuPath 0.3 to 0.7 write it: the images that it lists.

The format was read in QuPath's source: DefaultProject, ImageServers and UriUpdater.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote, urlsplit

from patchcl_qupath.errors import ProjectError, quoted
from patchcl_qupath.project.arguments import ServerArguments, parse_arguments
from patchcl_qupath.storage.files import WINDOWS, ZARR_METADATA, readable

BIO_FORMATS = "BioFormatsServerBuilder"
MICROMETRES = {"µm", "μm", "um"}  # the micro sign, and the Greek letter

_GIVE = "give the path of a project.qpproj, or of its folder"
_SIDES = ("pixelWidth", "pixelHeight")

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
    ``series`` and ``series_name`` name one of several images of the file, or are None. ``problem``
    is the reason why such an image cannot be used, wherever its file is, or None; ``note`` a remark
    for people.
    """

    id: str
    name: str
    uri: str
    path: PurePath | None
    mpp: tuple[float, float] | None
    size: tuple[int, int] | None
    series: int | None
    series_name: str | None
    use_bounds: bool
    problem: str | None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class StoredProject:
    """A .qpproj file. ``path`` is that of the file when it was saved, ``version`` that of QuPath.

    Either is None if it is not given.
    """

    path: PurePath | None
    images: tuple[StoredImage, ...]
    version: str | None = None


def project_files(folder: Path) -> list[Path]:
    """The .qpproj files of a folder; not ._project.qpproj, which macOS writes on other disks."""
    return sorted(folder.glob("[!.]*.qpproj"))


def project_file(path: Path) -> Path:
    """The .qpproj file of a path: the file itself, or the only one of a folder.

    Raises ProjectError.
    """
    if WINDOWS and '"' in str(path):  # "C:\my project\" ends with one, to Windows
        raise ProjectError(f"{path} has a quotation mark: leave out the backslash at the end")
    try:
        mode = path.stat().st_mode  # is_dir and exists say no to any error, from Python 3.14 on
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise ProjectError(f"{path} does not exist: {_GIVE}") from error
    except OSError as error:
        raise ProjectError(
            f"{path} cannot be read: {error.strerror}; mend that, or ask for the permission"
        ) from error
    if stat.S_ISDIR(mode):
        found = project_files(path)
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ProjectError(f"{path} holds several projects: name one of them, {names}")
        raise ProjectError(
            f"{path} holds no project (.qpproj): make one of images with `patchcl-qp init "
            f"{quoted(path)} IMAGE...`, or name another folder"
        )
    if path.suffix.lower() != ".qpproj":
        from patchcl_qupath.slides.pyramid import IMAGE_SUFFIXES  # slow to import

        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise ProjectError(f"{path} is neither a QuPath project nor an image: {_GIVE}")
        raise ProjectError(
            f"{path} is not a QuPath project: make one of images with "
            f"`patchcl-qp init DIR {quoted(path)}`"
        )
    return path


def read_project(file: Path) -> StoredProject:
    """The content of a .qpproj file; an entry that is damaged is an image with a ``problem``.

    Raises ProjectError for a file that cannot be read, or that lists no images.
    """
    content = _content(file)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or (entries and not any(map(_is_entry, entries))):
        raise ProjectError(
            f"{file} does not list its images as QuPath 0.3 to 0.7 do: open it in QuPath and "
            "save it again"
        )
    images = [_image(number, entry) for number, entry in enumerate(entries, start=1)]
    uri, version = content.get("uri"), content.get("version")
    return StoredProject(
        version=version if isinstance(version, str) else None,
        path=path_of_uri(uri) if isinstance(uri, str) else None,
        images=tuple(_with_ids_of_their_own(images)),
    )


def _content(file: Path) -> Any:
    """The JSON of a file, without a byte order mark. Raises ProjectError."""
    try:
        return json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise ProjectError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON; nested too deep
        backup = file.with_name(file.name + ".backup")
        hint = f"put {backup.name} in its place" if backup.exists() else "open it in QuPath"
        raise ProjectError(f"{file} is damaged ({error}): {hint}") from error


def path_of_uri(uri: str) -> PurePath | None:
    """The path of a file: URI as Java writes it, in the flavour of its own operating system.

    ``file:/D:/a%20b.svs`` and ``file://server/share/a.svs`` are Windows paths anywhere. Bytes that
    are not UTF-8 become surrogates, as in any path of Python. None for a URI of another scheme, and
    for text that is no URI.
    """
    try:
        parts = urlsplit(uri)
    except ValueError:
        return None
    path = unquote(parts.path, errors="surrogateescape")
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


_RAW_COLOURS = (
    "QuPath applies the colour profile of its scanner, which is not done here: optical densities "
    "are those of the colours in the file"
)


def _is_entry(entry: Any) -> bool:
    """Whether an entry has anything of the format that is read, rather than of an older one."""
    return isinstance(entry, dict) and ("entryID" in entry or "serverBuilder" in entry)


def _image(number: int, entry: Any) -> StoredImage:
    """An entry of the list, which is its ``number``-th; whatever is wrong with it is a problem."""
    entry = as_object(entry)
    builder, metadata = _original(entry)
    uri = _text(builder.get("uri"))
    path = path_of_uri(uri)
    if path is not None and path.name in ZARR_METADATA:  # QuPath opens the folder by it, too
        path = path.parent
    id_ = _id(entry.get("entryID"))
    name = _text(entry.get("imageName")) or (path.name if path else "") or id_ or f"image {number}"
    name = readable(name)
    args = builder.get("args") or []
    arguments = parse_arguments([str(arg) for arg in args] if isinstance(args, list) else [])
    problem = _problem_of_entry(entry, name=name, builder=builder, uri=uri) or _problem(
        name=name,
        kind=_text(builder.get("builderType")),
        arguments=arguments,
        metadata=metadata,
        # Bio-Formats does not call the channels of an OME-Zarr RGB.
        is_zarr=path is not None and ".zarr" in str(path).lower(),
    )
    openslide = not _text(builder.get("providerClassName")).endswith(BIO_FORMATS)
    return StoredImage(
        id=id_ or f"entry-{number}",
        name=name,
        uri=readable(uri),
        path=path,
        mpp=None if problem else _pixel_size(metadata),
        size=None if problem else _size(metadata),
        series=arguments.series,
        series_name=arguments.series_name,
        use_bounds=openslide and arguments.crop,
        problem=problem,
        note=_RAW_COLOURS if arguments.icc_profile else None,
    )


def _original(entry: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The builder of an entry's image, and the metadata that QuPath uses.

    A generated pyramid has the pixels and the frame of the image within. Metadata that a person
    corrected are on the outside.
    """
    builder = as_object(entry.get("serverBuilder"))
    metadata = builder.get("metadata")
    while builder.get("builderType") == "pyramidize":
        builder = as_object(builder.get("builder"))
        metadata = metadata or builder.get("metadata")
    return builder, as_object(metadata)


def _with_ids_of_their_own(images: list[StoredImage]) -> list[StoredImage]:
    """The images; those of one id have a problem: QuPath keeps one file of objects for both."""
    by_id: dict[str, list[StoredImage]] = {}
    for image in images:
        by_id.setdefault(image.id, []).append(image)
    distinct = []
    for image in images:
        same = by_id[image.id]
        if len(same) > 1:
            names = " and ".join(other.name for other in same[:3])
            place = next(k for k, other in enumerate(same, start=1) if other is image)
            problem = (
                f"{image.name} has the id of another image of the project ({image.id}: {names}): "
                "remove all but one of them from the project in QuPath, and add them again"
            )
            image = replace(image, id=f"{image.id}-{place}", problem=image.problem or problem)
        distinct.append(image)
    return distinct


def _id(value: Any) -> str | None:
    """An entry's id, a whole number in Java's range; None for anything else."""
    is_id = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63
    return str(value) if is_id else None


def as_object(value: Any) -> dict[str, Any]:
    """A JSON object, or an empty one in place of another value."""
    return value if isinstance(value, dict) else {}


def as_count(value: Any) -> int:
    """A whole number of JSON, or 0 in place of another value."""
    return value if isinstance(value, int) else 0


def _text(value: Any) -> str:
    """A JSON string, or an empty one in place of another value."""
    return value if isinstance(value, str) else ""


def _pixel_size(metadata: dict[str, Any]) -> tuple[float, float] | None:
    """(x, y) µm/px, or None if QuPath has none. Raises ValueError, TypeError for no numbers.

    QuPath keeps a corrected size in project.qpproj; data/*/server.json is written and never read.
    """
    calibration = as_object(metadata.get("pixelCalibration"))
    sides = [as_object(calibration.get(side)) for side in _SIDES]
    if any(_text(side.get("unit")) not in MICROMETRES for side in sides):
        return None
    x, y = (float(side.get("value", math.nan)) for side in sides)
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _size(metadata: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) in px, or None if QuPath did not save it.

    Raises ValueError, TypeError, OverflowError for no numbers.
    """
    width, height = metadata.get("width"), metadata.get("height")
    return (int(width), int(height)) if width and height else None


def _is_red_green_blue(metadata: dict[str, Any]) -> bool:
    """Whether an image is three channels of 8 bit, of these colours, in this order."""
    channels = metadata.get("channels")
    listed = channels if isinstance(channels, list) else []
    colours = [as_object(channel).get("color") for channel in listed]
    rgb = [colour & 0xFFFFFF for colour in colours if isinstance(colour, int)]  # of 0xAARRGGBB
    return metadata.get("pixelType") == "UINT8" and rgb == [0xFF0000, 0x00FF00, 0x0000FF]


def _problem_of_entry(
    entry: dict[str, Any], *, name: str, builder: dict[str, Any], uri: str
) -> str | None:
    """Why an entry of the project file is damaged, and what to do; None if it is not."""
    again = "remove it from the project in QuPath, and add the image again"
    if _id(entry.get("entryID")) is None:
        return f"{name} has no id in the project file (entryID is no whole number): {again}"
    if not builder or not all(map(_is_builder, _builders(entry))):
        return f"{name} has no image in the project file (serverBuilder is damaged): {again}"
    if not isinstance(builder.get("args") or [], list):
        return f"{name} has arguments in the project file that are no list: {again}"
    if not _are_objects(_metadata(entry)):
        return f"{name} has metadata in the project file that are damaged: {again}"
    if builder.get("builderType") == "uri" and _beyond_path(uri):
        return f"{name} has a URI that is not that of a whole file ({readable(uri)}): {again}"
    return None


def _builders(entry: dict[str, Any]) -> Iterator[Any]:
    """The builder of an entry, and those within generated pyramids."""
    builder = entry.get("serverBuilder")
    yield builder
    while isinstance(builder, dict) and builder.get("builderType") == "pyramidize":
        builder = builder.get("builder")
        yield builder


def _metadata(entry: dict[str, Any]) -> Iterator[Any]:
    """The metadata of an entry's builders, and the objects within that are read."""
    for builder in _builders(entry):
        metadata = as_object(builder).get("metadata")
        calibration = as_object(metadata).get("pixelCalibration")
        yield from (metadata, calibration)
        yield from (as_object(calibration).get(side) for side in _SIDES)


def _are_objects(values: Iterable[Any]) -> bool:
    """Whether all values are JSON objects, or null."""
    return all(value is None or isinstance(value, dict) for value in values)


def _is_builder(builder: Any) -> bool:
    return isinstance(builder, dict) and isinstance(builder.get("builderType"), str)


def _beyond_path(uri: str) -> bool:
    """Whether a file: URI has a query or a fragment: a series, in QuPath before 0.2."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return False
    return parts.scheme in ("file", "") and bool(parts.query or parts.fragment)


def _problem(
    *,
    name: str,
    kind: str,
    arguments: ServerArguments,
    metadata: dict[str, Any],
    is_zarr: bool,
) -> str | None:
    """Why an image with a builder of that kind cannot be used, and what to do; None if it can."""
    if kind != "uri":
        view = VIEWS.get(kind, f"a view of an unknown kind ({readable(kind)})")
        return (
            f"{name} is {view}: add the original image to the project, or export this one as "
            "OME-TIFF and add that"
        )
    if arguments.problems:
        return (
            f"{name} is opened in QuPath with {readable(', '.join(arguments.problems))}, which "
            "cannot be done here: export it as OME-TIFF and add that"
        )
    if metadata.get("isRGB") is False and not (is_zarr and _is_red_green_blue(metadata)):
        return not_brightfield(name)
    try:
        _pixel_size(metadata)
    except (ValueError, TypeError, OverflowError):
        return (
            f"{name} has a pixel size in the project file that is no number: set it in QuPath "
            "(Image tab, double-click 'Pixel width'), and save"
        )
    try:
        _size(metadata)
    except (ValueError, TypeError, OverflowError):
        return (
            f"{name} has a width or height in the project file that is no number: remove it from "
            "the project in QuPath, and add the image again"
        )
    return None
