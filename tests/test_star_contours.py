"""Star-convex contours: nuclei that are seen by their rim."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.config import SelfTrainConfig
from patchcl_qupath.training.pseudo_labels import PseudoLabels, pseudo_labels
from patchcl_qupath.training.star_contours import star_contours, with_star_contours

MPP = 0.5
SIDE = 120


def disc(row: float, col: float, radius: float) -> NDArray[np.bool_]:
    rows, cols = np.mgrid[:SIDE, :SIDE]
    return np.asarray(np.hypot(rows - row, cols - col) <= radius)


def pale_nuclei(*centres: tuple[int, int], radius: float = 9) -> NDArray[np.float32]:
    """Hematoxylin of nuclei as pale as the cytoplasm around them, with a dark rim of 1 µm."""
    density = np.full((SIDE, SIDE), 0.45, np.float32)
    for centre in centres:
        density[disc(*centre, radius) & ~disc(*centre, radius - 2)] = 0.9
    return np.asarray(ndimage.gaussian_filter(density, 0.7), np.float32)


def found(
    density: NDArray[np.float32], labels: NDArray[np.int32] | None = None, **changed: object
) -> NDArray[np.int32]:
    slope = np.hypot(ndimage.sobel(density, 0), ndimage.sobel(density, 1))
    arguments = {
        "steep": float(np.percentile(slope, 99)),
        "min_density": 0.3,
        "excluded": np.zeros(density.shape, np.bool_),
        "areas_um2": (12.0, 220.0),
        "mpp": MPP,
    } | changed
    none = np.zeros(density.shape, np.int32)
    return with_star_contours(none if labels is None else labels, density, **arguments)  # type: ignore[arg-type]


def iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def test_pale_nucleus_is_found_by_its_rim() -> None:
    labels = found(pale_nuclei((60, 60)))
    assert labels.max() == 1
    assert iou(labels == 1, disc(60, 60, 9)) > 0.85


def test_touching_pale_nuclei_are_two() -> None:
    labels = found(pale_nuclei((60, 50), (60, 67)))
    assert labels.max() == 2
    assert iou(labels == labels[60, 50], disc(60, 50, 9)) > 0.75
    assert iou(labels == labels[60, 67], disc(60, 67, 9)) > 0.75


def test_contour_takes_the_place_of_a_fragment_of_its_rim() -> None:
    density = pale_nuclei((60, 60))
    fragment = ((density > 0.7) & (np.mgrid[:SIDE, :SIDE][0] < 60)).astype(np.int32)
    labels = found(density, fragment)
    assert labels.max() == 1
    assert iou(labels == 1, disc(60, 60, 9)) > 0.85


def test_component_that_is_as_good_stays() -> None:
    dark = disc(60, 60, 9)
    density = np.asarray(ndimage.gaussian_filter(0.3 + 0.6 * dark, 0.7), np.float32)
    labels = found(density, dark.astype(np.int32))
    assert np.array_equal(labels > 0, dark)


def test_component_that_nothing_overlaps_stays() -> None:
    bar = np.zeros((SIDE, SIDE), np.int32)
    bar[10:12, 10:40] = 1  # too thin for a score
    labels = found(pale_nuclei((60, 60)), bar)
    assert labels.max() == 2
    assert len(np.unique(labels[bar > 0])) == 1
    assert labels[10, 10] > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"min_density": 0.9},
        {"areas_um2": (100.0, 220.0)},
        {"areas_um2": (12.0, 40.0)},
        {"excluded": np.ones((SIDE, SIDE), np.bool_)},
    ],
)
def test_contour_must_be_dark_enough_of_nuclear_size_and_no_artefact(
    changed: dict[str, object],
) -> None:
    assert found(pale_nuclei((60, 60)), **changed).max() == 0


def test_even_ground_has_no_contour() -> None:
    assert found(np.full((SIDE, SIDE), 0.5, np.float32), steep=1.0).max() == 0


def test_contours_do_not_depend_on_the_way_up() -> None:
    density = pale_nuclei((50, 40), (70, 80))
    turned = np.ascontiguousarray(np.rot90(density))
    upright = found(density)
    assert upright.max() == 2
    assert iou(np.rot90(upright) > 0, found(turned) > 0) > 0.9


def test_radii_and_area_are_those_of_a_disc() -> None:
    edges = np.asarray(ndimage.gaussian_filter(disc(60, 60, 10).astype(np.float64), 1), np.float32)
    contours = star_contours(edges, np.array([[60.0, 60.0]]), MPP)
    assert np.abs(contours.radii - 10).max() <= 1
    assert contours.area_px[0] == pytest.approx(np.pi * 100, rel=0.1)
    assert contours.solidity[0] > 0.95


def of_slide(stains: NDArray[np.float32], has_brown: bool) -> PseudoLabels:
    (labels,) = pseudo_labels(
        crops=[stains],
        glass=[np.zeros((SIDE, SIDE), np.bool_)],
        confidences=[np.ones((SIDE, SIDE), np.float32)],
        mpp=MPP,
        config=SelfTrainConfig(),
        has_brown=has_brown,
    )
    return labels


def test_brown_nuclei_count_on_slides_that_have_brown() -> None:
    stains = np.full((SIDE, SIDE, 3), 0.1, np.float32)
    blue, brown = [disc(30, col, 8) for col in (30, 90)], [disc(90, col, 8) for col in (30, 90)]
    stains[blue[0] | blue[1], 0] = 0.9
    stains[brown[0] | brown[1], 2] = 1.2
    stains = np.asarray(ndimage.gaussian_filter(stains, (1, 1, 0)), np.float32)
    both = of_slide(stains, has_brown=True)
    assert both.nuclei.max() == 4
    assert all(iou(both.nuclei == both.nuclei[90, col], disc(90, col, 8)) > 0.8 for col in (30, 90))
    assert of_slide(stains, has_brown=False).nuclei[80:100].max() == 0
