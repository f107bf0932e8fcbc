"""Voids: where a scanner, or a program that turned the image, wrote no picture, but black.

A void is read as glass, pixel by pixel, wherever the image is read. Which blocks of the image have
void pixels is decided once, on its thumbnail: so a black pixel in tissue is a pixel as any other.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.compiled import compiled
from patchcl_qupath.slides.resample import Span

MAX_VOID = 10  # intensity in all channels where the scanner wrote nothing
GLASS = 255  # what is read where there is no picture
MIN_VOID_UM2 = 20_000.0  # area of a void that does not touch the border of the image
MAX_NOISE = 24  # intensity that compression gives a void pixel near the picture
MARGIN_PX = 8  # how near: black pixels so far around a box decide which of its own are void
_SEED, _CANDIDATE = 0.9, 0.02  # fraction of void pixels of a block: all of it, or some
_RUN = 8  # blocks along the border of the image, of a void that is thinner than a block
_AROUND = np.ones((3, 3), bool)


@dataclass(frozen=True, kw_only=True)
class VoidMask:
    """The blocks of an image with void pixels: (rows, cols), compressed.

    A block is ``side`` (x, y) level-0 px wide and high; the first begins at ``origin`` (x, y).
    """

    shape: tuple[int, int]
    packed: bytes
    side: tuple[float, float]
    origin: tuple[int, int]

    @classmethod
    def of(
        cls, blocks: NDArray[np.bool_], side: tuple[float, float], origin: tuple[int, int]
    ) -> VoidMask:
        """The mask of blocks (rows, cols)."""
        rows, cols = blocks.shape
        packed = zlib.compress(np.packbits(blocks).tobytes())
        return cls(shape=(rows, cols), packed=packed, side=side, origin=origin)

    @property
    def blocks(self) -> NDArray[np.bool_]:
        """(rows, cols): do not write to it."""
        return _unpacked(self)

    def within(
        self, source: tuple[Span, Span], scale: tuple[float, float]
    ) -> NDArray[np.bool_] | None:
        """(h, w) whether px of rows and columns of a level lie in such blocks; None if none does.

        ``scale`` (x, y) is that of the level.
        """
        at = []
        for axis, span in enumerate(source):
            side, origin, px = self.side[1 - axis], self.origin[1 - axis], scale[1 - axis]
            number = ((np.arange(*span) + 0.5) * px - origin) // side
            at.append(number.astype(np.int64).clip(0, self.shape[axis] - 1))
        (rows, cols), blocks = at, self.blocks
        if not blocks[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1].any():
            return None
        return np.asarray(blocks[rows[:, None], cols[None, :]])


@lru_cache(maxsize=8)
def _unpacked(mask: VoidMask) -> NDArray[np.bool_]:
    bits = np.frombuffer(zlib.decompress(mask.packed), np.uint8)
    rows, cols = mask.shape
    return np.unpackbits(bits, count=rows * cols).astype(bool).reshape(rows, cols)


def void_blocks(fraction: NDArray[np.float64], block_um2: float) -> NDArray[np.bool_]:
    """The blocks (h, w) of voids, from the fraction of each block whose pixels are black.

    A void is a connected area of black blocks, ``block_um2`` each, that touches the border of the
    image or is 0.02 mm² large; or a black strip along the border. Blocks that are partly black
    belong to the void that they touch, and so does one block around.
    """
    some = fraction > _CANDIDATE
    labels, count = ndimage.label(fraction >= _SEED, _AROUND)
    blocks = np.bincount(labels.ravel(), minlength=count + 1)
    border = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    is_void = blocks * block_um2 >= MIN_VOID_UM2
    is_void[border] = True
    is_void[0] = False
    seeds = is_void[labels] | _strips(some)
    whole = ndimage.binary_propagation(seeds, _AROUND, mask=some)
    return np.asarray(ndimage.binary_dilation(whole, _AROUND))


@compiled
def black(pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> int:
    """Write into ``out`` (h, w, 1) which pixels (h, w, 3) are black, and return their number."""
    count = 0
    for row in range(pixels.shape[0]):
        for col in range(pixels.shape[1]):
            r, g, b = pixels[row, col, 0], pixels[row, col, 1], pixels[row, col, 2]
            is_black = (r <= MAX_VOID) & (g <= MAX_VOID) & (b <= MAX_VOID)
            out[row, col, 0] = is_black
            count += is_black
    return count


def painted(pixels: NDArray[np.uint8], blocks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Pixels (h, w, 3) of which void ones are glass; ``blocks`` (h, w) are those of voids.

    What is void in the outermost ``MARGIN_PX`` is not defined, unless the level ends there.
    """
    brightest = pixels.max(axis=2)
    near = _grown((brightest <= MAX_VOID) & blocks, MARGIN_PX)
    void = near & blocks & (brightest <= MAX_NOISE)
    return np.where(void[..., None], np.uint8(GLASS), pixels)


def _grown(mask: NDArray[np.bool_], px: int) -> NDArray[np.bool_]:
    """A mask dilated by a square."""
    return np.asarray(ndimage.maximum_filter(mask.view(np.uint8), 2 * px + 1, mode="constant") > 0)


def _strips(some: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The blocks on the border of the image that are partly black, many in a row."""
    found = np.zeros_like(some)
    for line, out in (
        (some[0], found[0]),
        (some[-1], found[-1]),
        (some[:, 0], found[:, 0]),
        (some[:, -1], found[:, -1]),
    ):
        length = min(_RUN, len(line))
        out |= ndimage.binary_opening(line, np.ones(length, bool))
    return found
