"""Generated slides: ramps that differ in x and y, so that a swapped axis fails, and dark blue
discs in known places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from patchcl_qupath.datatypes import Box, ImageEntry, Nuclei
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.parquet import from_table, to_table

# (x, y, radius) in µm, from the top left corner; no symmetry maps them onto each other.
DISCS_UM = ((30.0, 20.0, 4.0), (80.0, 25.0, 5.0), (45.0, 70.0, 6.0), (110.0, 60.0, 3.0))
BLUE = (60, 40, 120)
TILE_PX = 64  # of what ``write_encoded`` writes

Encode = Callable[[NDArray[np.uint8]], bytes]


def scene(width: int, height: int, mpp: tuple[float, float]) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of ``mpp`` (x, y) µm: red grows with x, green falls with y."""
    x = (np.arange(width) + 0.5)[None, :] * mpp[0]  # (1, width) µm
    y = (np.arange(height) + 0.5)[:, None] * mpp[1]  # (height, 1) µm
    pixels = np.empty((height, width, 3))
    pixels[..., 0] = 150 + 90 * x / x.max()
    pixels[..., 1] = 220 - 70 * y / y.max()
    pixels[..., 2] = 200 + 10 * np.sin(x / 3) * np.cos(y / 5)
    for disc_x, disc_y, radius in DISCS_UM:
        pixels[(x - disc_x) ** 2 + (y - disc_y) ** 2 <= radius**2] = BLUE
    return np.rint(pixels).astype(np.uint8)


def shrunk(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """The mean of whole blocks; rows and columns that do not fill one are cut, as scanners do."""
    height, width = (n // factor for n in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def write_tiff(
    path: Path,
    pixels: NDArray[np.uint8],
    mpp: tuple[float, float] | None = None,
    factors: Sequence[int] = (1,),
    tile_px: int | None = 64,
) -> Path:
    """A TIFF pyramid, each level ``factors`` times smaller; plain strips without ``tile_px``."""
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp[0], 1e4 / mpp[1])}
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            tiff.write(
                shrunk(pixels, factor) if factor > 1 else pixels,
                photometric="rgb",
                tile=tile_px and (tile_px, tile_px),
                compression="deflate",
                subifds=len(factors) - 1 if factor == 1 else None,
                subfiletype=0 if factor == 1 else 1,
                resolutionunit="NONE" if mpp is None else "CENTIMETER",
                metadata=None,
                **resolution,
            )
    return path


def tissue(rows: int, cols: int, seed: int = 0) -> NDArray[np.uint8]:
    """A scene with noise that is as soft as an objective makes it."""
    noise = np.random.default_rng(seed).normal(0, 80, (rows, cols, 3))
    pixels = scene(cols, rows, (0.25, 0.25)) + gaussian_filter(noise, (1.2, 1.2, 0))
    return pixels.clip(20, 235).astype(np.uint8)


def write_encoded(
    path: Path,
    pixels: NDArray[np.uint8],
    encode: Encode,
    *,
    changed: dict[int, Encode] | None = None,
    photometric: str = "ycbcr",
    compression: str | int = "jpeg",
) -> Path:
    """A TIFF of 0.25 µm/px with encoded tiles, of which some are ``changed``."""
    rows, cols = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -rows % TILE_PX), (0, -cols % TILE_PX), (0, 0)), mode="edge")
    tiles = [
        np.ascontiguousarray(padded[row : row + TILE_PX, col : col + TILE_PX])
        for row in range(0, rows, TILE_PX)
        for col in range(0, cols, TILE_PX)
    ]
    encoded = [(changed or {}).get(i, encode)(tile) for i, tile in enumerate(tiles)]
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            iter(encoded),
            shape=pixels.shape,
            dtype=np.uint8,
            tile=(TILE_PX, TILE_PX),
            compression=compression,
            photometric=photometric,
            resolution=(4e4, 4e4),
            resolutionunit="CENTIMETER",
            metadata=None,
        )
    return path


def opened(path: Path, mpp: float = 0.5) -> Slide:
    """The slide of a file, at 0.5 µm/px."""
    return Slide.open(ImageEntry(id="1", name=path.name, path=path), mpp)


def at_full_size(
    path: Path, monkeypatch: pytest.MonkeyPatch, box: Box | None = None
) -> NDArray[np.int64]:
    """A box of a slide at 0.5 µm/px, or all of it, with all tiles decoded at full size."""
    with monkeypatch.context() as patched:
        patched.setattr(Level, "averaged", lambda self, downsample, origin: self)
        slide = opened(path)
        return slide.read(box or whole(slide)).astype(int)


def write_series(path: Path, *images: NDArray[np.uint8], names: Sequence[str] = ()) -> Path:
    """A TIFF of several images of 0.5 µm/px; as OME-TIFF where they have names."""
    with tifffile.TiffWriter(path, ome=bool(names)) as tiff:
        for number, pixels in enumerate(images):
            tiff.write(
                pixels,
                photometric="rgb",
                tile=(TILE_PX, TILE_PX),
                metadata={"Name": names[number], "axes": "YXS"} if names else None,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )
    return path


def write_svs(
    path: Path, pixels: NDArray[np.uint8], mpp: float, factors: Sequence[int] = (1, 4)
) -> Path:
    """An Aperio SVS: JPEG tiles, a thumbnail as the second page, the pixel size in the text."""
    text = f"Aperio Image Library v11.2.1\r\nmade for a test|AppMag = 40|MPP = {mpp}"
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            tiff.write(
                shrunk(pixels, factor) if factor > 1 else pixels,
                photometric="rgb",
                tile=(128, 128),
                compression="jpeg",
                compressionargs={"level": 95},
                description=text,
                metadata=None,
            )
            if factor == 1:
                tiff.write(shrunk(pixels, 16), photometric="rgb", description=text, metadata=None)
    return path


def write_ome_zarr(
    path: Path,
    pixels: NDArray[np.uint8],
    mpp: tuple[float, float] | None = None,
    factors: Sequence[int] = (1,),
    *,
    version: str = "0.4",
    axes: str = "cyx",
    chunk_px: int = 64,
    unit: str = "micrometer",
    shard_px: int | None = None,
    index_location: str = "end",
    fill: int = 0,
    compressor: Any = "auto",
    omero: dict[str, Any] | None = None,
) -> Path:
    """An OME-Zarr pyramid of pixels (H, W, C), each level ``factors`` times smaller."""
    zarr_format: Any = 3 if version == "0.5" else 2
    group = zarr.open_group(str(path), mode="w", zarr_format=zarr_format)
    sides = {"y": chunk_px, "x": chunk_px}
    for number, factor in enumerate(factors):
        level = shrunk(pixels, factor) if factor > 1 else pixels
        order = ["yxc".index(axis) for axis in axes if axis in "yxc"]
        data = level.transpose(order).reshape(
            [level.shape["yxc".index(axis)] if axis in "yxc" else 1 for axis in axes]
        )
        array = group.create_array(
            str(number),
            shape=data.shape,
            dtype=data.dtype,
            chunks=tuple(sides.get(axis, 1) for axis in axes),
            shards=shard_px
            and {
                "shape": tuple(shard_px if axis in sides else 1 for axis in axes),
                "index_location": index_location,
            },
            chunk_key_encoding={"name": "v2" if zarr_format == 2 else "default", "separator": "/"},
            fill_value=fill,
            compressors=compressor,
        )
        array[:] = data
    kinds = {"t": "time", "c": "channel"}
    px = {"x": mpp[0], "y": mpp[1]} if mpp else {}
    image = {
        "name": path.name,
        "axes": [
            {"name": axis, "type": kinds.get(axis, "space")}
            | ({"unit": unit} if mpp and unit and axis in px else {})
            for axis in axes
        ],
        "datasets": [
            {
                "path": str(number),
                "coordinateTransformations": [
                    {
                        "type": "scale",
                        "scale": [
                            px.get(axis, 1.0) * (factor if axis in "yx" else 1) for axis in axes
                        ],
                    }
                ],
            }
            for number, factor in enumerate(factors)
        ],
    }
    metadata: dict[str, Any] = {"multiscales": [image | {"version": version}]}
    metadata |= {"omero": omero} if omero else {}
    group.attrs.update({"ome": metadata} if zarr_format == 3 else metadata)
    return path


def crops_of(
    images: Sequence[NDArray[np.uint8]],
    normaliser: StainNormaliser | None = None,
    slides: Sequence[str] = (),
) -> TrainingCrops:
    """Whole images as training crops, of slides of these ids, or of one, where they lie apart."""
    count, normaliser = len(images), normaliser or StainNormaliser.fit(images)
    sizes = [image.shape[:2] for image in images]
    last = accumulate(cols for _, cols in sizes)
    boxes = tuple(
        Box(0, end - cols, rows, end) for (rows, cols), end in zip(sizes, last, strict=True)
    )
    return TrainingCrops(
        tuple(images), (normaliser,) * count, tuple(slides) or ("1",) * count, boxes
    )


def whole(slide: Slide) -> Box:
    """The working grid of a slide."""
    return Box(0, 0, *slide.shape)


def check_boxes(slide: Slide, count: int = 8) -> None:
    """A pixel is the same, to the bit, in random boxes as in the whole image."""
    everything = slide.read(whole(slide))
    rng = np.random.default_rng(0)
    for _ in range(count):
        row0, row1 = np.sort(rng.choice(slide.shape[0] + 1, 2, replace=False)).tolist()
        col0, col1 = np.sort(rng.choice(slide.shape[1] + 1, 2, replace=False)).tolist()
        np.testing.assert_array_equal(
            slide.read(Box(row0, col0, row1, col1)), everything[row0:row1, col0:col1]
        )


def joined(parts: Sequence[Nuclei]) -> Nuclei:
    """All nuclei of ``parts``, in that order; the parts have the same columns."""
    return from_table(pa.concat_tables([*map(to_table, parts)]))
