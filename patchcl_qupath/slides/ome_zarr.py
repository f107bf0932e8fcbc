"""OME-Zarr (NGFF 0.1 to 0.5): a folder of chunks, as a pyramid that is decoded chunk by chunk."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ShardingCodec, ShardingCodecIndexLocation
from zarr.storage import LocalStore

from patchcl_qupath.errors import is_damage
from patchcl_qupath.slides.chunks import ChunkedPixels, drawn_from
from patchcl_qupath.slides.level import (
    Level,
    Pyramid,
    Selection,
    check_memory,
    is_associated,
    level_scale,
    shown,
)
from patchcl_qupath.slides.pixel_size import Pair, PixelSize, PixelSizeSource, in_um
from patchcl_qupath.slides.void import MAX_VOID
from patchcl_qupath.storage.files import is_too_long

_AXES = "tczyx"  # of versions that do not name them
_COLOURS = ["FF0000", "00FF00", "0000FF"]
_INDEX_ENTRY_BYTES = 16  # offset and length of a chunk in a shard
_NOT_IN_SHARD = b"\xff" * _INDEX_ENTRY_BYTES  # in place of them
_CHECKSUM_BYTES = 4  # at the end of a shard's index

# Of the place of a missing chunk in a coarser level: what is lighter is glass, what is black was
# left out there, too; and how much of it may be neither, as compression and borders make it.
_MIN_LIGHT = 195
_MIN_STAINED = 0.25

Json = Mapping[str, Any]


def open_ome_zarr(folder: Path, selection: Selection) -> Pyramid:
    """The image of an OME-Zarr that ``selection`` names. May raise any exception."""
    try:
        return _pyramid(folder, selection)
    except (AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"its metadata are not those of an OME-Zarr: {reason}") from error


def _pyramid(folder: Path, selection: Selection) -> Pyramid:
    """As ``open_ome_zarr``, which explains what metadata of other kinds raise."""
    store = LocalStore(folder, read_only=True)  # a path as text may be taken for a URL, or for two
    images = _images(zarr.open_group(store, mode="r", use_consolidated=False))
    number = _choose(images, selection)
    group = images[number]
    _check_colours(_metadata(group))
    image = _multiscale(group)
    frames = [_Frame.of(image, dataset) for dataset in image["datasets"]]
    planes = [
        (_Plane.of(folder, _array(group, dataset), _axes(image)), frame.downsample(frames[0]))
        for dataset, frame in zip(image["datasets"], frames, strict=True)
        if frame.begins_with(frames[0])
    ]
    levels: list[Level] = []
    for number_of_level, (plane, downsample) in enumerate(planes):
        coarser = [] if number_of_level else [other for other, _ in planes[1:]]
        levels.append(_level(plane, downsample, levels, coarser))
    return Pyramid(levels, tuple(_pixel_sizes(image, frames[0])), number=number)


def _images(root: zarr.Group) -> list[zarr.Group]:
    """The groups of images: the root itself, or those that bioformats2raw lays out."""
    metadata = _metadata(root)
    if metadata.get("multiscales"):
        return [root]
    if "plate" in metadata:
        raise ValueError("it is a plate of many wells: add the images in it instead")
    images = [] if "bioformats2raw.layout" not in metadata else list(_listed(root))
    if not images:
        raise ValueError("it is no OME-Zarr image, as it has no multiscales")
    return images


def _choose(images: Sequence[zarr.Group], selection: Selection) -> int:
    """The number of the image that is meant: of that size, number or name, else the one that is
    shown.

    Raises ValueError for a name or number that no image has.
    """
    if not images[0].path:  # the root itself, whatever it is called
        return 0
    sizes = [_size(image) for image in images]
    if sizes.count(selection.size or (0, 0)) == 1:
        return sizes.index(selection.size or (0, 0))
    if selection.series is not None and selection.series < len(images):
        return selection.series
    multiscales = [_multiscale(image) for image in images]
    names = [multiscale.get("name") for multiscale in multiscales]
    if selection.series is None and selection.name is None:
        levels = [len(multiscale["datasets"]) for multiscale in multiscales]
        return shown(sizes, [*map(is_associated, map(str, names), levels)])
    if names.count(selection.name) == 1:
        return names.index(selection.name)
    meant = selection.name or f"number {selection.series}"
    raise ValueError(f"it holds {len(images)} images, but not {meant}")


def _listed(root: zarr.Group) -> Iterator[zarr.Group]:
    """The images of a folder of several, in their order."""
    listed = _metadata(root["OME"]).get("series") if "OME" in root else None
    for path in listed or (str(number) for number in range(root.nmembers())):
        image = root.get(path)
        if isinstance(image, zarr.Group) and _metadata(image).get("multiscales"):
            yield image


def _metadata(group: Any) -> Json:
    """The OME metadata of a group, which have a key of their own since version 0.5."""
    attributes: Json = group.attrs.asdict()
    inner = attributes.get("ome")
    return inner if isinstance(inner, dict) else attributes


def _multiscale(group: zarr.Group) -> Json:
    image: Json = _metadata(group)["multiscales"][0]
    return image


def _axes(image: Json) -> tuple[str, ...]:
    """The names of an image's axes."""
    axes = image.get("axes") or _AXES
    return tuple(axis if isinstance(axis, str) else str(axis["name"]) for axis in axes)


def _array(group: zarr.Group, dataset: Json) -> zarr.Array[Any]:
    array = group.get(dataset["path"])
    if not isinstance(array, zarr.Array):
        raise ValueError(f"its level {dataset['path']} is missing")
    return array


def _size(group: zarr.Group) -> tuple[int, int]:
    """(width, height) of level 0 of an image."""
    array = _array(group, _multiscale(group)["datasets"][0])
    rows, cols = (array.shape[_axes(_multiscale(group)).index(axis)] for axis in "yx")
    return cols, rows


def _check_colours(metadata: Json) -> None:
    """Raise ValueError for channels with other colours than red, green and blue."""
    channels = (metadata.get("omero") or {}).get("channels") or []
    colours = [str(channel.get("color") or "").lstrip("#").upper()[:6] for channel in channels]
    if any(colours) and colours != _COLOURS:
        names = ", ".join(str(channel.get("label") or "?") for channel in channels)
        raise ValueError(f"its channels are not red, green and blue, but {names}")


@dataclass(frozen=True)
class _Frame:
    """Where the px of a level are, in the units of the axes.

    ``px`` is the size (x, y) of one, None where it is not given; ``origin`` the centre (x, y) of
    the first.
    """

    px: Pair | None
    origin: Pair

    @classmethod
    def of(cls, image: Json, dataset: Json) -> _Frame:
        """The frame of a level, by its own transformations and those of the whole image."""
        axes = _axes(image)
        px, origin, given = np.ones(len(axes)), np.zeros(len(axes)), False
        for part in (dataset, image):
            for step in part.get("coordinateTransformations") or ():
                if "scale" in step:
                    px, origin, given = px * step["scale"], origin * step["scale"], True
                if "translation" in step:
                    origin = origin + step["translation"]
        x, y = axes.index("x"), axes.index("y")
        known = given and px[x] > 0 and px[y] > 0
        return cls(
            (float(px[x]), float(px[y])) if known else None, (float(origin[x]), float(origin[y]))
        )

    def begins_with(self, level0: _Frame) -> bool:
        """Whether the level begins where level 0 does, within one of its px."""
        if self.px is None or level0.px is None:
            return True
        return all(
            abs(first - first0) < side
            for first, first0, side in zip(self.origin, level0.origin, self.px, strict=True)
        )

    def downsample(self, level0: _Frame) -> Pair | None:
        """(x, y) level-0 px per px; None where it is not given."""
        if self.px is None or level0.px is None:
            return None
        return self.px[0] / level0.px[0], self.px[1] / level0.px[1]


def _pixel_sizes(image: Json, level0: _Frame) -> Iterator[PixelSize]:
    """The pixel size, where the axes have a unit of length."""
    axes = [axis for axis in image.get("axes") or () if isinstance(axis, dict)]
    units = {axis["name"]: str(axis.get("unit") or "") for axis in axes}
    x, y = (
        in_um(side, units.get(axis, ""))
        for axis, side in zip("xy", level0.px or (None, None), strict=True)
    )
    if x is not None and y is not None:
        yield PixelSize(PixelSizeSource.OME_ZARR, (x, y))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Plane:
    """The array of a level as RGB (rows, cols, 3), whatever the order of its axes is.

    ``folder`` has its chunks.
    """

    folder: Path
    array: zarr.Array[Any]
    axes: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, array: zarr.Array[Any], axes: tuple[str, ...]) -> _Plane:
        """An array with these axes, in the OME-Zarr at ``root``.

        Raises ValueError if it is not one plane of 8-bit RGB.
        """
        sizes = dict(zip(axes, array.shape, strict=True))
        for axis, n in sizes.items():
            if axis not in "yxc" and n != 1:
                raise ValueError(f"it is a stack of {n} planes (axis {axis})")
        if array.dtype != np.uint8 or sizes.get("c") != 3:
            raise ValueError(f"not 8-bit RGB: {sizes.get('c', 1)} channels of {array.dtype}")
        return cls(folder=root / array.path, array=array, axes=axes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, cols, 3)."""
        return (*self._rows_cols(self.array.shape), 3)

    @property
    def chunk(self) -> tuple[int, int]:
        """(rows, cols) that are decoded together."""
        return self._rows_cols(self.array.chunks)

    def _rows_cols(self, sides: Sequence[int]) -> tuple[int, int]:
        return sides[self.axes.index("y")], sides[self.axes.index("x")]

    def __getitem__(self, at: tuple[slice, slice]) -> NDArray[np.uint8]:
        """Pixels (h, w, 3) of rows and columns."""
        parts = {"y": at[0], "x": at[1], "c": slice(None)}
        pixels = np.asarray(self.array[tuple(parts.get(axis, 0) for axis in self.axes)])
        order = [axis for axis in self.axes if axis in parts]
        return np.ascontiguousarray(pixels.transpose([order.index(axis) for axis in "yxc"]))

    def is_stored(self, row: int, col: int) -> bool:
        """Whether the file has a chunk, given by its row and column, in each of the channels.

        Where gaps are filled with light, one channel is enough: writers leave out what has no other
        value, as the red of eosin may.
        """
        place = {"y": row, "x": col}
        planes = range(-(-3 // self.array.chunks[self.axes.index("c")]))
        chunks = (
            tuple(plane if axis == "c" else place.get(axis, 0) for axis in self.axes)
            for plane in planes
        )
        return (any if self.array.fill_value else all)(map(self._has, chunks))

    def _has(self, chunk: tuple[int, ...]) -> bool:
        """Whether a chunk, given by its number on each axis, is in a file or shard."""
        array = self.array
        if array.shards is None:
            return _is_file(self._path(chunk))
        counts = [shard // side for shard, side in zip(array.shards, array.chunks, strict=True)]
        shard = tuple(n // count for n, count in zip(chunk, counts, strict=True))
        inner = [n % count for n, count in zip(chunk, counts, strict=True)]
        number = int(np.ravel_multi_index(inner, counts))
        metadata: Any = array.metadata  # of version 3, which alone has shards
        return _is_in_shard(self._path(shard), number, math.prod(counts), metadata.codecs[0])

    def _path(self, key: tuple[int, ...]) -> Path:
        """The file of a chunk, or of a shard, given by its number on each axis."""
        return self.folder / self.array.metadata.encode_chunk_key(key)


def _has_chunks(folder: Path | str) -> bool:
    """Whether the folder of an array has any file but metadata. Raises OSError."""
    with os.scandir(folder) as entries:
        return any(
            _has_chunks(entry.path)
            if entry.is_dir()
            else entry.name != "zarr.json" and not entry.name.startswith(".")
            for entry in entries
        )


def _is_file(path: Path) -> bool:
    """Whether there is such a file. Raises OSError where that cannot be found out, as a disk fails:
    from Python 3.14 on, ``Path.is_file`` says that there is none."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        _check_length(path)
        return False


def _check_length(path: Path) -> None:
    """Raise OSError for a path that is not found, but may be there: chunks would become glass."""
    if is_too_long(path):
        reason = "its path is too long for Windows: move the slide to a shorter one"
        raise OSError(errno.ENAMETOOLONG, reason, str(path))


def _is_in_shard(path: Path, number: int, count: int, codec: ShardingCodec) -> bool:
    """Whether a shard, if there is one, has its chunk of a number, of ``count`` in its index.

    A shard without a whole index is damaged: its chunks are not missing, they cannot be decoded.
    """
    at_end = codec.index_location is ShardingCodecIndexLocation.end
    checksums = [each for each in codec.index_codecs if isinstance(each, Crc32cCodec)]
    index_bytes = count * _INDEX_ENTRY_BYTES + len(checksums) * _CHECKSUM_BYTES
    try:
        with path.open("rb") as file:
            first = file.seek(0, os.SEEK_END) - index_bytes if at_end else 0
            file.seek(max(0, first) + number * _INDEX_ENTRY_BYTES)
            return file.read(_INDEX_ENTRY_BYTES) != _NOT_IN_SHARD
    except (FileNotFoundError, NotADirectoryError):
        _check_length(path)
        return False


@dataclass(frozen=True, eq=False)
class _Missing:
    """Which chunks (chunk rows, chunk columns) of a level are missing, looked up as it is sliced.

    A whole table would take minutes where a slide has a million files on a network. Of level 0, the
    ``coarser`` levels tell chunks of glass from those that never arrived, as in a copy that was
    stopped: ``arrived`` are the chunks that were looked at.
    """

    plane: _Plane
    coarser: Sequence[_Plane]
    arrived: dict[tuple[int, int], bool] = field(default_factory=dict)

    def __getitem__(self, at: tuple[slice, slice]) -> NDArray[np.bool_]:
        """A part of the table. Raises ValueError for a chunk that never arrived."""
        rows, cols = (range(part.start, part.stop) for part in at)
        found = [self._is_missing(row, col) for row, col in product(rows, cols)]
        return np.array(found, dtype=bool).reshape(len(rows), len(cols))

    def _is_missing(self, row: int, col: int) -> bool:
        if self.plane.is_stored(row, col):
            return False
        if self.coarser:
            if (row, col) not in self.arrived:
                self.arrived[row, col] = not self._is_tissue(row, col)
            if not self.arrived[row, col]:
                raise ValueError("a chunk is missing where a coarser level shows tissue")
        return True

    def _is_tissue(self, row: int, col: int) -> bool:
        """Whether a coarser level, the finest that has such a place, shows tissue in a chunk's."""
        for plane in self.coarser:
            spans = [
                _span(number, side, n, m)
                for number, side, n, m in zip(
                    (row, col), self.plane.chunk, self.plane.shape[:2], plane.shape[:2], strict=True
                )
            ]
            chunks = [
                range(span.start // side, -(-span.stop // side))
                for span, side in zip(spans, plane.chunk, strict=True)
            ]
            if all(plane.is_stored(*chunk) for chunk in product(*chunks)):
                try:
                    pixels = plane[spans[0], spans[1]]
                except Exception as error:  # decoders raise anything
                    if not is_damage(error):
                        raise
                    continue
                is_stained = (pixels.min(axis=2) < _MIN_LIGHT) & (pixels.max(axis=2) > MAX_VOID)
                return bool(is_stained.mean() > _MIN_STAINED)
        return False


def _span(number: int, side: int, n: int, m: int) -> slice:
    """The px of a level of ``m`` px that lie in a chunk of one of ``n`` px, on an axis; one at
    least."""
    first = min(m - 1, -(-number * side * m // n))
    return slice(first, max(first + 1, min(m, (number + 1) * side * m // n)))


def _level(
    plane: _Plane, downsample: Pair | None, finer: Sequence[Level], coarser: Sequence[_Plane]
) -> Level:
    """One level of an image, of which the ``finer`` ones are open; level 0 has ``coarser`` ones.

    ``downsample`` is that of the metadata, which is used if the size of the level agrees, and would
    not be a whole number: writers give the ratio of two sizes, of which one was rounded.
    """
    if not finer and not _has_chunks(plane.folder):
        raise ValueError("it holds no pixels")
    shape, chunk = plane.shape[:2], plane.chunk
    scale = level_scale(shape, finer)
    is_whole = all(map(float.is_integer, scale))
    if downsample is not None and not is_whole and _agrees(downsample, shape, finer):
        scale = downsample
    pixels = ChunkedPixels(
        stored=plane,
        chunk=chunk,
        to_rgb=np.asarray,
        missing=_Missing(plane, coarser),
        finer=drawn_from(finer[-1], shape, scale) if finer else None,
    )
    if chunk[0] >= shape[0] and chunk[1] >= shape[1]:
        check_memory(math.prod(shape))
        return Level(pixels[:, :], (1, 1), scale)
    return Level(pixels, chunk, scale)


def _agrees(downsample: Pair, shape: tuple[int, int], finer: Sequence[Level]) -> bool:
    """Whether a level of ``shape`` is level 0 at ``downsample``, but for a px that is cut off."""
    level0 = finer[0].pixels.shape[:2] if finer else shape
    cut = (abs(n0 / d - n) for n0, d, n in zip(level0, downsample[::-1], shape, strict=True))
    return all(px < 1 for px in cut)
