"""Touching nuclei whose border is known: copies of clear nuclei, pasted beside others.

Where nuclei touch, pseudo-labels are least right; and what a network is shown to be one nucleus it
does not learn to separate. A pasted copy has the outline of its original, and covers what it lies
on, so that the border of such a pair is exact.

In the manner of G. Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for
Instance Segmentation, CVPR 2021; but beside other nuclei, not anywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.segmentation.contours import solidities
from patchcl_qupath.training.pseudo_labels import PseudoLabels, Stains, keep_labels

_MARGIN_PX = 2  # around a nucleus that is copied
_MIN_SOLIDITY = 0.9  # of a nucleus that is copied
_AREAS = (0.5, 4.0)  # of such nuclei, relative to the crop's median
_MAX_BESIDE = 0.1  # fraction of the pixels around it that may be of other nuclei
_DISTANCE = (0.8, 1.02)  # between centres, relative to the sum of the radii
_SOFT_PX = 0.6  # sigma of the edge of a copy
_MIN_SEEN = 0.4  # of a nucleus of the crop that copies cover in part, or it is none any more
_FEWEST = 3  # nuclei to copy; a crop with fewer stays as it is


class _Copy(NamedTuple):
    """A nucleus that may be pasted: its surroundings (h, w, 3), and its pixels (h, w)."""

    stains: Stains
    mask: NDArray[np.bool_]


def with_touching_nuclei(
    stains: Stains, labels: PseudoLabels, fraction: float, rng: np.random.Generator
) -> tuple[Stains, PseudoLabels]:
    """A crop with copies of its own clear nuclei beside others; ``stains`` (H, W, 3) stay as given.

    At most ``fraction`` times as many are pasted as there are nuclei. A nucleus of the crop of
    which little is left to be seen becomes unlabelled; a copy stays, as long as any of it is.
    """
    count = int(labels.nuclei.max(initial=0))
    copies = _clear_nuclei(stains, labels.nuclei)
    if len(copies) < _FEWEST:
        return stains, labels
    stains, nuclei, background = stains.copy(), labels.nuclei.copy(), labels.background.copy()
    area = np.bincount(nuclei.ravel(), minlength=count + 1)
    centres = np.array(ndimage.center_of_mass(nuclei > 0, nuclei, np.arange(1, count + 1)))
    new = count
    for _ in range(int(fraction * count)):
        beside = int(rng.integers(count))
        copy = _turned(copies[int(rng.integers(len(copies)))], rng)
        radii = math.sqrt(area[beside + 1] / math.pi) + math.sqrt(copy.mask.sum() / math.pi)
        distance, angle = radii * rng.uniform(*_DISTANCE), rng.uniform(0, 2 * math.pi)
        height, width = copy.mask.shape
        top = round(centres[beside, 0] + distance * math.sin(angle) - height / 2)
        left = round(centres[beside, 1] + distance * math.cos(angle) - width / 2)
        if top < 0 or left < 0 or top + height > len(nuclei) or left + width > nuclei.shape[1]:
            continue
        at = (slice(top, top + height), slice(left, left + width))
        opacity = ndimage.gaussian_filter(copy.mask.astype(np.float32), _SOFT_PX)[..., None]
        stains[at] = opacity * copy.stains + (1 - opacity) * stains[at]
        new += 1
        nuclei[at][copy.mask] = new
        background[at][copy.mask] = False
    seen = np.bincount(nuclei.ravel(), minlength=new + 1)
    keep = seen > 0
    keep[: count + 1] = seen[: count + 1] >= _MIN_SEEN * area
    return stains, PseudoLabels(keep_labels(nuclei, keep), background)


def _clear_nuclei(stains: Stains, nuclei: NDArray[np.int32]) -> list[_Copy]:
    """Nuclei that are compact, of usual size, and touch no other."""
    count = int(nuclei.max(initial=0))
    area = np.bincount(nuclei.ravel(), minlength=count + 1)[1:]
    if count < _FEWEST:
        return []
    solidity = solidities(nuclei)
    small, large = (bound * float(np.median(area)) for bound in _AREAS)
    boxes = ndimage.find_objects(nuclei)
    found = []
    for i in np.flatnonzero((solidity >= _MIN_SOLIDITY) & (area >= small) & (area <= large)):
        rows, cols = boxes[i]
        window = (
            slice(max(0, rows.start - _MARGIN_PX), rows.stop + _MARGIN_PX),
            slice(max(0, cols.start - _MARGIN_PX), cols.stop + _MARGIN_PX),
        )
        mask = nuclei[window] == i + 1
        around = ndimage.binary_dilation(mask, iterations=_MARGIN_PX) & ~mask
        if (nuclei[window][around] > 0).mean() < _MAX_BESIDE:
            found.append(_Copy(stains[window].copy(), mask))
    return found


def _turned(copy: _Copy, rng: np.random.Generator) -> _Copy:
    """A copy, turned and mirrored at random."""
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    stains, mask = np.rot90(copy.stains, turns), np.rot90(copy.mask, turns)
    return _Copy(stains[:, ::-1], mask[:, ::-1]) if mirror else _Copy(stains, mask)
