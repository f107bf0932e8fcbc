"""Pseudo-labels: confident foreground and confident background, found without labels.

Thresholds at many levels of a hematoxylin map make a component tree: a clump at a low level splits
into its nuclei at a higher one. The score of a component is its area, if it is convex, times the
cube of its edge strength; the best disjoint components are kept, those of the largest total score.
(As in C. Arteta et al., Learning to Detect Cells Using Non-overlapping Extremal Regions, MICCAI
2012, but there the score is learnt from labels.) A component that holds several nuclei is then
separated by its shape (``segmentation.instances``). Nuclei that are no component, since they are
seen by their rim alone, are found by their contour (``star_contours``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.compiled import compiled, take
from patchcl_qupath.config import SegmentConfig, SelfTrainConfig
from patchcl_qupath.overlap import mapped
from patchcl_qupath.segmentation.contours import solidities
from patchcl_qupath.segmentation.instances import instances, large_pieces
from patchcl_qupath.segmentation.measurements import means, runs_of
from patchcl_qupath.segmentation.typical_nuclei import typical_area
from patchcl_qupath.training.star_contours import with_star_contours

Stains = NDArray[np.float32]
_WHITE = 245  # of a scan
_GLASS_DENSITY = 0.05  # mean of the colours; less is no tissue
_RING_UM = (1.0, 3.0)  # around a clump: glass or tissue?
_FULL_SCORE = 0.2  # above the solidity at which a component scores 0
_SEPARATION = SegmentConfig(min_area_um2=2, max_hole_um2=1)  # of components, which have no holes
_MANY_UM2 = 2000.0  # that a clump has room for many nuclei in
_LEAST_COVERED = 0.03  # of the area of such a clump, by nuclei, if there are any in it
_BORDER_PX = 1.5  # width of what separates components that touch
_CROSS = ndimage.generate_binary_structure(2, 1)  # 3 px wide


class PseudoLabels(NamedTuple):
    """Confident foreground and background of a crop; all other pixels are unlabelled.

    By PatchCL, ``artefacts`` are of the background (see ``artefact_mask``), and ``clumps`` are dark
    areas with room for many nuclei. By a network, ``doubtful`` is background that is nearest to
    what may be a nucleus, and is unlabelled for that.
    """

    nuclei: NDArray[np.int32]  # labels (H, W), 1..N
    background: NDArray[np.bool_]  # (H, W)
    artefacts: NDArray[np.bool_] | None = None  # (H, W)
    clumps: NDArray[np.int32] | None = None  # labels (H, W), 1..K
    doubtful: NDArray[np.bool_] | None = None  # (H, W)


def only_sure(
    labels: PseudoLabels, is_sure: NDArray[np.bool_], is_single: NDArray[np.bool_]
) -> PseudoLabels:
    """Pseudo-labels of those nuclei alone that ``is_sure`` and ``is_single`` (N,) both have, and of
    the tissue around those that are sure.

    Background that is nearer to another nucleus is unlabelled, as that is. A network that is
    taught all background, but not all nuclei, would take nuclei for rarer than they are, and miss
    the pale ones. (M. Saerens, P. Latinne, C. Decaestecker, Adjusting the outputs of a classifier
    to new a priori probabilities, Neural Computation 14, 2002, say how much.) Around what is sure,
    but may be several nuclei in one, it stays: much of that is keratin, which no background would
    be taught beside.
    """
    if not len(is_sure):
        return labels
    nearest = ndimage.distance_transform_edt(
        labels.nuclei == 0, return_distances=False, return_indices=True
    )
    near_sure = np.append(False, is_sure)[labels.nuclei[tuple(nearest)]]
    return labels._replace(
        nuclei=keep_labels(labels.nuclei, np.append(False, is_sure & is_single)),
        background=labels.background & near_sure,
        doubtful=labels.background & ~near_sure,
    )


def clumps_without_nuclei(clumps: NDArray[np.int32], sure: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where (H, W) clumps are that hold hardly a nucleus of those (H, W) that a network is sure of.

    In keratin it finds many, but is sure of none: 2,000 µm² of tissue has some 50 nuclei.
    """
    count = int(clumps.max(initial=0))
    covered = means(runs_of(clumps), count, (sure > 0).astype(np.float32))
    return np.asarray(np.append(False, covered < _LEAST_COVERED)[clumps])


def pseudo_labels(
    crops: Sequence[Stains],
    glass: Sequence[NDArray[np.bool_]],
    confidences: Sequence[NDArray[np.float32]],
    mpp: float,
    config: SelfTrainConfig,
    has_brown: bool = False,
) -> list[PseudoLabels]:
    """Pseudo-labels of the crops of one slide.

    Of each crop: normalised stains (H, W, 3), glass (H, W) and PatchCL's confidence (H, W).
    ``mpp`` is in µm per pixel. Where the slide ``has_brown``, brown nuclei count, too. All
    thresholds come from the crops together: a crop without nuclei must not yield its own darkest
    spots.
    """
    densities = [*mapped(partial(density, mpp=mpp, config=config, has_brown=has_brown), crops)]
    slopes = [*mapped(_slope, densities)]
    pixels = _pixels(densities)
    threshold = otsu(pixels)
    lowest, highest = config.tree_threshold * threshold, np.percentile(pixels, 99.5)
    if highest <= lowest:  # hardly a pixel is that of a nucleus
        highest = pixels.max()
    slide = _Thresholds(
        otsu=threshold,
        steep=max(float(np.percentile(_pixels(slopes), 95)), 1e-6),
        levels=np.linspace(lowest, highest, config.levels),
    )
    find = partial(_of_crop, slide=slide, mpp=mpp, config=config)
    found = [*mapped(find, densities, slopes, glass, confidences)]
    return _without_fragments(found, config.min_fragment)


class _Thresholds(NamedTuple):
    """What the crops of a slide have in common, in units of its smoothed hematoxylin.

    Otsu's threshold, the slope of the steepest edges, and the levels of the component tree.
    """

    otsu: float
    steep: float
    levels: NDArray[Any]


def _slope(d: NDArray[np.float32]) -> NDArray[np.float32]:
    """The slope (H, W) of a map by a Sobel filter: 8 times that of a pixel."""
    return np.asarray(np.hypot(ndimage.sobel(d, 0), ndimage.sobel(d, 1)))


def _of_crop(
    d: NDArray[np.float32],
    slope: NDArray[np.float32],
    clear: NDArray[np.bool_],
    confidence: NDArray[np.float32],
    slide: _Thresholds,
    mpp: float,
    config: SelfTrainConfig,
) -> PseudoLabels:
    """The pseudo-labels of a crop: its density, slope, glass and confidence, (H, W) each."""
    threshold, steep = slide.otsu, slide.steep
    mean, deviation = _local_statistics(d, config.background_radius_um / mpp)
    mask = (d > mean + config.local_contrast * deviation) & (d > config.mask_threshold * threshold)
    for _ in range(2):
        mask = ndimage.binary_closing(ndimage.binary_opening(mask, _CROSS), _CROSS)
    background = ~mask & ((d < threshold) | (d < mean))
    tree = [_components(mask & (d > level), mpp, config) for level in slide.levels]
    edges = slope / steep
    scores = [component_scores(labels, edges, mpp, config) for labels in tree]
    labels = separated(best_disjoint_components(tree, scores), mpp)
    artefacts = artefact_mask(tree[0], labels, clear, mpp, config)
    labels = np.where(artefacts, 0, labels)
    labels = with_star_contours(
        labels=keep_labels(labels, np.bincount(labels.ravel()) > 0),
        density=d,
        steep=steep,
        min_density=config.contour_threshold * threshold,
        excluded=artefacts,
        areas_um2=(config.min_contour_um2, config.max_area_um2),
        mpp=mpp,
    )
    background |= artefacts
    mean_confidence = means(runs_of(labels), int(labels.max(initial=0)), confidence)
    confident = np.append(False, mean_confidence >= config.min_confidence)
    return PseudoLabels(
        nuclei=keep_labels(labels, confident),
        background=background & (labels == 0),
        artefacts=artefacts & (labels == 0),
        clumps=large_pieces(d > slide.levels[0], mpp**2, _MANY_UM2),
    )


def is_glass(rgb: NDArray[np.uint8], mpp: float, config: SelfTrainConfig) -> NDArray[np.bool_]:
    """Where an image (H, W, 3) lets nearly all light through (H, W): glass, and lumens as well."""
    light = -np.log10(np.maximum(rgb, 1) / _WHITE).mean(axis=-1)
    return np.asarray(ndimage.gaussian_filter(light, config.blur_um / mpp) < _GLASS_DENSITY)


def density(
    stains: Stains, mpp: float, config: SelfTrainConfig, has_brown: bool = False
) -> NDArray[np.float32]:
    """Hematoxylin (H, W), less a fraction of the residual stain; smoothed.

    With a brown chromogen, which is residual, the larger of the two.
    """
    if has_brown:
        nuclear = np.maximum(stains[..., 0], config.brown * stains[..., 2])
    else:
        nuclear = stains[..., 0] - config.residual * stains[..., 2]
    return np.asarray(ndimage.gaussian_filter(nuclear, config.blur_um / mpp), np.float32)


def otsu(values: NDArray[np.float32]) -> float:
    """The threshold that splits ``values`` (N,) into two classes of least variance within.

    N. Otsu, A Threshold Selection Method from Gray-Level Histograms, IEEE Trans SMC 9 (1979).
    scikit-image's ``threshold_otsu`` counts in float32, which changes the bin where two are nearly
    as good: on one in 300 sets of real pixels.
    """
    count, edges = np.histogram(values, 256)
    centre = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(count)[:-1]
    above = below[-1] + count[-1] - below
    total = np.cumsum(count * centre)
    between = total[:-1] / np.maximum(below, 1) - (total[-1] - total[:-1]) / np.maximum(above, 1)
    return float(centre[np.argmax(below * above * between**2)])


def _pixels(maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """All pixels (N,) of maps."""
    return np.concatenate([values.ravel() for values in maps])


def _local_statistics(
    values: NDArray[np.float32], sigma_px: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Local mean and standard deviation (H, W)."""
    mean = ndimage.gaussian_filter(values, sigma_px)
    square = ndimage.gaussian_filter(values * values, sigma_px)
    return mean, np.sqrt(np.maximum(square - mean * mean, 0))


def keep_labels(labels: NDArray[np.int32], keep: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Labels (H, W) without those that ``keep`` (N + 1,) has not, renumbered; 0 is background."""
    keep = keep.copy()
    keep[0] = False
    return take(np.where(keep, np.cumsum(keep), 0).astype(np.int32), labels)


def artefact_mask(
    clumps: NDArray[np.int32],
    labels: NDArray[np.int32],
    glass: NDArray[np.bool_],
    mpp: float,
    config: SelfTrainConfig,
) -> NDArray[np.bool_]:
    """Dark clumps (H, W) that do not split into nuclei: keratin, ink, pigment, folds.

    ``clumps`` (H, W) are the components of the lowest level, ``labels`` (H, W) the best disjoint
    components. Artefacts are far larger than a nucleus, or strands and flakes that lie on glass,
    and little of them is in components that look like a nucleus. They become background.
    """
    count = int(clumps.max()) + 1
    area, rim, _ = _rims(clumps, glass.astype(np.float32), count - 1)
    covered = np.bincount(clumps.ravel(), labels.ravel() > 0, count) / np.maximum(area, 1)
    large = (area * mpp**2 > config.min_clump_um2) & (covered < config.min_covered)

    strand = 4 * np.pi * area < config.max_circularity * rim**2
    distance, nearest = ndimage.distance_transform_edt(clumps == 0, return_indices=True)
    ring = (distance * mpp > _RING_UM[0]) & (distance * mpp <= _RING_UM[1])
    owner = clumps[tuple(nearest[:, ring])]
    pixels = np.maximum(np.bincount(owner, None, count), 1)
    on_glass = np.bincount(owner, glass[ring], count) / pixels
    strand &= (on_glass > config.min_glass) & (covered < config.min_covered_strand)

    artefacts = large | strand
    artefacts[0] = False
    return np.asarray(artefacts[clumps])


def separated(labels: NDArray[np.int32], mpp: float) -> NDArray[np.int32]:
    """Labels (H, W) of components, in which those of the shape of several nuclei are separated.

    As in the tiles of a slide, but by the distance to the rim alone: a U-Net, which would show
    cores of nuclei, is still to be trained.
    """
    wide = np.pad(labels, ((0, 1), (0, 1)), mode="edge")
    border = np.zeros(labels.shape, np.bool_)  # of two components that touch
    for beside in (wide[1:, :-1], wide[:-1, 1:]):
        border |= (beside != labels) & (beside > 0)
    inside = (labels > 0) & ~border
    parts = instances(inside.astype(np.float32), mpp, _SEPARATION)
    # What the borders took, and what was too small to be seen without it, goes to the nearest part.
    distance, nearest = ndimage.distance_transform_edt(parts == 0, return_indices=True)
    found = np.where((labels > 0) & (distance <= _BORDER_PX), parts[tuple(nearest)], 0)
    return np.asarray(found, np.int32)


def _without_fragments(found: list[PseudoLabels], min_fragment: float) -> list[PseudoLabels]:
    """Nuclei below a fraction of the slide's typical area become unlabelled.

    The typical area is the one that splits the labelled pixels: half of them are in larger nuclei.
    """
    areas = [np.bincount(labels.nuclei.ravel()) for labels in found]
    every = np.concatenate([area[1:] for area in areas])
    if not len(every):
        return found
    typical = typical_area(every)
    return [
        labels._replace(nuclei=keep_labels(labels.nuclei, area >= min_fragment * typical))
        for labels, area in zip(found, areas, strict=True)
    ]


def _components(mask: NDArray[np.bool_], mpp: float, config: SelfTrainConfig) -> NDArray[np.int32]:
    """Labels (H, W) of the connected components, holes filled. They nest from level to level."""
    background = large_pieces(~mask, mpp**2, config.max_area_um2) > 0
    return large_pieces(~background, mpp**2, 0)


def component_scores(
    labels: NDArray[np.int32], slope: NDArray[np.float32], mpp: float, config: SelfTrainConfig
) -> NDArray[np.float64]:
    """The scores (N + 1,) of components 0..N (H, W) as nuclei; 0, the background, scores 0.

    ``slope`` (H, W) is that of the map, relative to the slide's steepest.
    """
    area_px, length, total = _rims(labels, slope, int(labels.max(initial=0)))
    area = area_px * mpp**2
    edge = total / np.maximum(length, 1)
    possible = (area >= config.min_area_um2) & (area <= config.max_area_um2)
    possible &= edge >= config.min_edge
    possible[0] = False
    solidity = solidities(keep_labels(labels, possible))  # that of a ring is low
    convex = np.clip((solidity - config.min_solidity) / _FULL_SCORE, 0, 1)
    scores = np.zeros(len(area))
    scores[possible] = area[possible] * convex * edge[possible] ** 3
    return scores


def are_several(
    nuclei: NDArray[np.int32], large_area: float, min_solidity: float
) -> NDArray[np.bool_]:
    """Which nuclei 1..N (H, W) seem to be several in one, (N,): those of more than ``large_area``
    times the median area of all, and less than ``min_solidity``."""
    area = np.bincount(nuclei.ravel())[1:]
    if not len(area):
        return np.zeros(0, np.bool_)
    return np.asarray((area > large_area * np.median(area)) & (solidities(nuclei) < min_solidity))


@compiled
def _rims(
    labels: NDArray[np.int32], values: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Of components 0..count (H, W), (count + 1,) each: their pixels; those of their rim; and the
    sum of ``values`` (H, W) there. A rim touches the background; that of 0 is not counted."""
    rows, cols = labels.shape
    area, length = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    total = np.zeros(count + 1)
    for row in range(rows):
        for col in range(cols):
            label = labels[row, col]
            area[label] += 1
            if label == 0:
                continue
            is_rim = row > 0 and labels[row - 1, col] == 0
            is_rim |= row + 1 < rows and labels[row + 1, col] == 0
            is_rim |= col > 0 and labels[row, col - 1] == 0
            is_rim |= col + 1 < cols and labels[row, col + 1] == 0
            if is_rim:
                length[label] += 1
                total[label] += values[row, col]
    return area, length, total


@compiled
def _parents(lower: NDArray[np.int32], upper: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """The component of ``lower`` (H, W) that holds each of ``upper`` 0..count: (count + 1,)."""
    parents = np.zeros(count + 1, np.int64)
    for row in range(upper.shape[0]):
        for col in range(upper.shape[1]):
            if upper[row, col]:
                parents[upper[row, col]] = lower[row, col]
    return parents


def best_disjoint_components(
    tree: list[NDArray[np.int32]], scores: list[NDArray[np.float64]]
) -> NDArray[np.int32]:
    """Labels (H, W) of the disjoint components with the largest total score.

    ``tree`` are the components (H, W) of each level from the lowest to the highest, ``scores``
    those of each component, (N + 1,).
    """
    # The parent of each component, one level below: all its pixels lie in the same one.
    parents = []
    for (lower, upper), score in zip(pairwise(tree), scores[1:], strict=True):
        parents.append(_parents(lower, upper, len(score) - 1))

    # From the leaves to the roots: does a component score more than its children together?
    best = scores[-1]
    wins = [best > 0]
    for score, parent in zip(scores[-2::-1], parents[::-1], strict=True):
        children = np.bincount(parent, best, len(score))
        children[0] = 0
        wins.insert(0, (score > 0) & (score >= children))
        best = np.maximum(score, children)

    # From the roots to the leaves: the first winner on each path is kept.
    labels = np.zeros(tree[0].shape, dtype=np.int32)
    covered, count = np.zeros(len(wins[0]), dtype=bool), 0
    for level, (components, win) in enumerate(zip(tree, wins, strict=True)):
        if level:
            covered = covered[parents[level - 1]]
        kept = win & ~covered
        number = np.where(kept, count + np.cumsum(kept), 0).astype(np.int32)
        labels += take(number, components)
        count += int(np.count_nonzero(kept))
        covered = covered | kept
    return labels
