"""Pseudo-labels: the nuclei that are beyond doubt, found without a label.

Thresholds at many levels cut a map into a tree of components: a clump at a low level falls into
its nuclei at a higher one. Each component is worth its area, if it is convex and has a sharp rim;
the disjoint components that are worth most together are kept (as in maximally stable regions, but
by shape and rim: C. Arteta et al., Learning to Detect Cells Using Non-overlapping Extremal Regions,
MICCAI 2012, who learn the worth from labels).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.config import SelfTrainConfig
from patchcl_qupath.segmentation.contours import trace_contours
from patchcl_qupath.segmentation.measurements import means

Stains = NDArray[np.float32]
Answer = tuple[NDArray[np.int32], NDArray[np.bool_]]  # labels, background: (H, W) each
_WHITE = 245  # of a scan
_GLASS_DENSITY = 0.05  # mean of the colours; less is no tissue
_BESIDE_UM = (1.0, 3.0)  # how far off is what is around a clump
_CROSS = ndimage.generate_binary_structure(2, 1)  # 3 px wide


def pseudo_labels(
    crops: Sequence[Stains],
    glass: Sequence[NDArray[np.bool_]],
    confidences: Sequence[NDArray[np.float32]],
    mpp: float,
    config: SelfTrainConfig,
) -> list[Answer]:
    """What is beyond doubt in the crops of one slide: its nuclei, and where there is surely none.

    From scaled stains (H, W, 3), glass (H, W) and PatchCL's confidence (H, W) of each crop to
    labels (H, W), 1..N, and background (H, W). ``mpp`` is in um per pixel. All statistics are those
    of the crops together: a crop without a nucleus shall not find its own darkest spots.
    """
    densities = [density(crop, mpp, config) for crop in crops]
    slopes = [np.hypot(ndimage.sobel(d, 0), ndimage.sobel(d, 1)) for d in densities]
    pixels = _all(densities)
    dark = otsu(pixels)
    steep = max(float(np.percentile(_all(slopes), 95)), 1e-6)
    levels = np.linspace(config.tree_threshold * dark, np.percentile(pixels, 99.5), config.levels)
    answers = []
    for d, slope, clear, confidence in zip(densities, slopes, glass, confidences, strict=True):
        mean, deviation = _surroundings(d, config.background_radius_um / mpp)
        mask = (d > mean + config.local_contrast * deviation) & (d > config.mask_threshold * dark)
        for _ in range(2):
            mask = ndimage.binary_closing(ndimage.binary_opening(mask, _CROSS), _CROSS)
        background = ~mask & ((d < dark) | (d < mean))
        components = [_components(mask & (d > level), mpp, config) for level in levels]
        values = [_values(labels, slope / steep, mpp, config) for labels in components]
        labels = _best_disjoint(components, values)
        artefacts = _artefacts(components[0], labels, clear, mpp, config)
        labels, background = np.where(artefacts, 0, labels), background | artefacts
        confident = means(labels, int(labels.max(initial=0)), confidence)
        sure = np.append(False, confident >= config.min_confidence)
        answers.append((_only(labels, sure), background & (labels == 0)))
    return _without_fragments(answers, config.min_fragment)


def is_glass(rgb: NDArray[np.uint8], mpp: float, config: SelfTrainConfig) -> NDArray[np.bool_]:
    """Where an image (H, W, 3) lets nearly all light through (H, W): glass, and lumens as well."""
    light = -np.log10(np.maximum(rgb, 1) / _WHITE).mean(axis=-1)
    return np.asarray(ndimage.gaussian_filter(light, config.blur_um / mpp) < _GLASS_DENSITY)


def density(stains: Stains, mpp: float, config: SelfTrainConfig) -> NDArray[np.float32]:
    """Hematoxylin (H, W), less what the residual stain says is none of it, smoothed."""
    hematoxylin = stains[..., 0] - config.residual * stains[..., 2]
    return np.asarray(ndimage.gaussian_filter(hematoxylin, config.blur_um / mpp), np.float32)


def otsu(values: NDArray[np.float32]) -> float:
    """The threshold that parts ``values`` (N,) into two classes with the least variance within.

    N. Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Trans SMC 9 (1979).
    """
    count, edges = np.histogram(values, 256)
    centre = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(count)[:-1]
    above = below[-1] + count[-1] - below
    total = np.cumsum(count * centre)
    apart = total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1)
    return float(centre[np.argmax(below * above * apart**2)])


def _all(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([values.ravel() for values in maps])


def _surroundings(
    values: NDArray[np.float32], sigma_px: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Local mean and standard deviation (H, W)."""
    mean = ndimage.gaussian_filter(values, sigma_px)
    square = ndimage.gaussian_filter(values * values, sigma_px)
    return mean, np.sqrt(np.maximum(square - mean * mean, 0))


def _only(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The labels to keep, (N + 1,), renumbered; 0 stays the background."""
    keep = keep.copy()
    keep[0] = False
    return np.where(keep, np.cumsum(keep), 0).astype(np.int32)[labels]


def _artefacts(
    clumps: NDArray[np.int32],
    labels: NDArray[np.int32],
    glass: NDArray[np.bool_],
    mpp: float,
    config: SelfTrainConfig,
) -> NDArray[np.bool_]:
    """Clumps (H, W) that are dark, but do not fall into nuclei: keratin, ink, pigment, folds.

    They are far larger than a nucleus, or strands and flakes that lie on glass, and little of them
    is in what looks like a nucleus. The network is shown them as what is none.
    """
    count = int(clumps.max()) + 1
    area = np.bincount(clumps.ravel(), minlength=count)
    covered = np.bincount(clumps.ravel(), labels.ravel() > 0, count) / np.maximum(area, 1)
    large = (area * mpp**2 > config.min_clump_um2) & (covered < config.min_covered)

    rim = np.bincount(clumps[_rim(clumps)], minlength=count)
    strand = 4 * np.pi * area < config.max_circularity * rim**2
    distance, nearest = ndimage.distance_transform_edt(clumps == 0, return_indices=True)
    around = (distance * mpp > _BESIDE_UM[0]) & (distance * mpp <= _BESIDE_UM[1])
    owner = clumps[tuple(nearest[:, around])]
    beside = np.bincount(owner, glass[around], count) / np.maximum(
        np.bincount(owner, None, count), 1
    )
    strand &= (beside > config.min_glass) & (covered < config.min_covered_strand)

    artefacts = large | strand
    artefacts[0] = False
    return np.asarray(artefacts[clumps])


def _without_fragments(answers: list[Answer], least: float) -> list[Answer]:
    """Labels that are small beside the slide's typical nucleus are left in doubt.

    Typical is the area that half of all labelled pixels lie in nuclei larger than.
    """
    areas = [np.bincount(labels.ravel()) for labels, _ in answers]
    every = np.sort(np.concatenate([area[1:] for area in areas]))
    if not len(every):
        return answers
    typical = every[np.searchsorted(np.cumsum(every), every.sum() / 2)]
    return [
        (_only(labels, area >= least * typical), background)
        for (labels, background), area in zip(answers, areas, strict=True)
    ]


def _rim(labels: NDArray[np.int32]) -> NDArray[np.bool_]:
    """The outermost pixels (H, W) of components: those that touch the background."""
    return np.asarray((labels > 0) & (ndimage.grey_erosion(labels, footprint=_CROSS) == 0))


def _components(mask: NDArray[np.bool_], mpp: float, config: SelfTrainConfig) -> NDArray[np.int32]:
    """Labels of the connected components, holes filled. They nest from level to level."""
    holes, _ = ndimage.label(~mask)
    small = np.bincount(holes.ravel()) * mpp**2 < config.max_area_um2
    small[0] = False
    labels, _ = ndimage.label(mask | small[holes])
    return np.asarray(labels, np.int32)


def _values(
    labels: NDArray[np.int32], slope: NDArray[np.float32], mpp: float, config: SelfTrainConfig
) -> NDArray[np.float64]:
    """What components 0..N are worth as nuclei, (N + 1,); 0, the background, is worth nothing."""
    area = np.bincount(labels.ravel()) * mpp**2
    rim = _rim(labels)
    length = np.bincount(labels[rim], minlength=len(area))
    edge = np.bincount(labels[rim], slope[rim], len(area)) / np.maximum(length, 1)
    possible = (area >= config.min_area_um2) & (area <= config.max_area_um2)
    possible &= edge >= config.min_edge
    possible[0] = False
    hulls = shapely.convex_hull(trace_contours(_only(labels, possible)))
    solidity = area[possible] / (shapely.area(hulls) * mpp**2)  # a ring has little
    convex = np.clip((solidity - config.min_solidity) / 0.2, 0, 1)
    value = np.zeros(len(area))
    value[possible] = area[possible] * convex * edge[possible] ** 3
    return value


def _best_disjoint(
    components: list[NDArray[np.int32]], values: list[NDArray[np.float64]]
) -> NDArray[np.int32]:
    """Labels of the disjoint components that are worth most together.

    ``components`` are label images (H, W) from the lowest level to the highest, ``values`` what
    each label is worth.
    """
    # Whose part a component is, one level below: all its pixels lie in the same one.
    parents = []
    for lower, upper in pairwise(components):
        parent = np.zeros(upper.max() + 1, dtype=np.int64)
        parent[upper.ravel()] = lower.ravel()
        parent[0] = 0
        parents.append(parent)

    # From the top down to the roots: a component, or its parts?
    best = values[-1]
    wins = [best > 0]
    for value, parent in zip(values[-2::-1], parents[::-1], strict=True):
        parts = np.bincount(parent, best, len(value))
        parts[0] = 0
        wins.insert(0, (value > 0) & (value >= parts))
        best = np.maximum(value, parts)

    # From the roots up: the first on each path that is worth more than its parts.
    labels = np.zeros(components[0].shape, dtype=np.int32)
    taken, count = np.zeros(len(wins[0]), dtype=bool), 0
    for level, (component, win) in enumerate(zip(components, wins, strict=True)):
        if level:
            taken = taken[parents[level - 1]]
        kept = win & ~taken
        number = np.where(kept, count + np.cumsum(kept), 0).astype(np.int32)
        labels += number[component]
        count += int(np.count_nonzero(kept))
        taken = taken | kept
    return labels
