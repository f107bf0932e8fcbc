"""The baseline: Otsu's threshold on hematoxylin, then a watershed of the distance transform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from bench.measure import Measures
from bench.sets import ImageSet, project_of
from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, grid_to_level0
from patchcl_qupath.evaluation.ground_truth import ground_truth_files, read_ground_truth
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.evaluation.score import SCORES, ImageScore, mean, per_100_true
from patchcl_qupath.segmentation.contours import pixel_polygons
from patchcl_qupath.slides.slide import Slide


def baseline(images: ImageSet, config: Config) -> Measures:
    """The measures of the baseline, at the working resolution of the networks."""
    assert images.ground_truth is not None
    scored = []
    with project_of(images) as project:
        files = ground_truth_files(images.ground_truth, project.images())
        for entry in project.images():
            slide = Slide.open(entry, config.slide.mpp)
            found = pixel_polygons(otsu(slide.read(Box(0, 0, *slide.shape))))
            true = read_ground_truth(files[entry.id], entry).polygons
            overlaps = Overlaps.of_polygons(grid_to_level0(found, slide.downsample), true)
            scored.append(
                ImageScore(
                    id=entry.id,
                    image=entry.name,
                    true_nuclei=len(true),
                    scores={name: getattr(overlaps, name) for name in SCORES},
                    kinds=overlaps.kinds,
                )
            )
    return {**mean(scored), **per_100_true(scored)}


def otsu(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The baseline's labels; nuclei have centres at least 2.5 µm apart, and at least 8 µm²."""
    hematoxylin = ndimage.gaussian_filter(rgb2hed(rgb)[..., 0], 1)
    threshold = threshold_otsu(hematoxylin)  # type: ignore[no-untyped-call]
    mask = ndimage.binary_opening(hematoxylin > threshold)
    pieces, _ = ndimage.label(mask)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    # Also nuclei that the border of the image cuts, which are in the ground truth, have a marker.
    peaks = peak_local_max(  # type: ignore[no-untyped-call]
        depth, min_distance=5, labels=pieces, exclude_border=False
    )
    markers = np.zeros(mask.shape, dtype=np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: NDArray[np.int32] = watershed(-depth, markers, mask=mask)  # type: ignore[no-untyped-call]
    return np.where(np.bincount(labels.ravel())[labels] >= 32, labels, 0)
