"""Instance separation: what is one nucleus, what are two, what is none."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.segmentation.instances import (
    _distance,
    _elevation,
    _highest_near,
    _offsets,
    _smooth,
    instances,
    large_pieces,
    postprocessing_margin_um,
)

MPP = 0.5
CONFIG = SegmentConfig()


def discs(shape, centres_radii):
    """Confidence 0.9 on discs (row, col, radius in px), 0.1 elsewhere."""
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5
    inside = np.zeros(shape, dtype=bool)
    for row, col, radius in centres_radii:
        inside |= (rows - row) ** 2 + (cols - col) ** 2 < radius**2
    return np.where(inside, 0.9, 0.1).astype(np.float32)


def test_a_disc_is_one_nucleus_with_all_its_pixels():
    confidence = discs((60, 80), [(25.3, 41.8, 8)])
    labels = instances(confidence, MPP, CONFIG)
    assert labels.dtype == np.int32
    assert labels.max() == 1
    mismatch = (labels == 1) != (confidence > 0.5)
    assert mismatch.mean() < 0.002


def test_touching_discs_are_separated_along_their_waist():
    labels = instances(discs((60, 80), [(30, 30, 8), (30, 44, 8)]), MPP, CONFIG)
    assert labels.max() == 2
    assert labels[30, 30] != labels[30, 44]
    waist = np.flatnonzero(np.diff(labels[30]) * (labels[30, 1:] > 0) * (labels[30, :-1] > 0))
    assert abs(waist[0] + 1 - 37) <= 1


def test_an_ellipse_is_not_cut_in_two():
    rows, cols = np.mgrid[:80, :120]
    confidence = (((rows - 40) / 8) ** 2 + ((cols - 60) / 20) ** 2 < 1).astype(np.float32)
    assert instances(confidence, MPP, CONFIG).max() == 1


def two_cores(half_length, half_width):
    """An ellipse (semi-axes in px) with two cores, which a prominence of about 0.3 µm separates."""
    rows, cols = np.mgrid[:60, :100]
    x = np.abs(cols - 50) / half_length
    inside = ((rows - 30) / half_width) ** 2 + x**2 < 1
    confidence = inside.astype(np.float32)
    core = np.where(np.abs(x - 0.5) < 0.25, 1.0, 0.8) * confidence
    return confidence, core.astype(np.float32)


def test_parts_that_are_one_ellipse_are_joined_and_touching_discs_are_not():
    apart = replace(CONFIG, join_diameter=0.0, join_ellipse=0.0, join_core=0.0)
    confidence, core = two_cores(11, 6)
    assert instances(confidence, MPP, apart, core=core).max() == 2
    labels = instances(confidence, MPP, CONFIG, core=core)
    np.testing.assert_array_equal(labels, confidence > 0.5)
    waist = discs((60, 100), [(30, 44.5, 6), (30, 55.5, 6)]).round()
    typical = replace(CONFIG, nucleus_diameter_um=6.0)
    assert instances(waist, MPP, typical, core=waist).max() == 2


@pytest.mark.parametrize(("typical_um", "nuclei"), [(4.5, 2), (7.0, 2), (9.0, 1)])
def test_what_is_small_for_its_image_is_part_of_a_nucleus(typical_um, nuclei):
    """Two discs of 4.5 µm, which touch: lymphocytes, or the two halves of a larger nucleus."""
    scene = discs((40, 60), [(20.5, 26, 4.5), (20.5, 34.5, 4.5)])
    core = np.where(scene > 0.5, 0.5, 0.0) + discs((40, 60), [(20.5, 26, 2), (20.5, 34.5, 2)]) / 2
    config = replace(CONFIG, nucleus_diameter_um=typical_um)
    labels = instances(scene, MPP, config, core=core.astype(np.float32))
    assert labels.max() == nuclei
    np.testing.assert_array_equal(labels > 0, scene > 0.5)


def test_nuclei_twice_as_large_are_separated_in_the_same_way():
    """The same scene at half the pixel size, as a picture of nuclei twice as large."""
    rng = np.random.default_rng(3)
    scene = discs((200, 200), rng.uniform([10, 10, 6], [190, 190, 9], (90, 3))).round()
    noise = ndimage.gaussian_filter(rng.standard_normal(scene.shape), 2.5)
    core = (scene * np.clip(0.7 + noise, 0, 1)).astype(np.float32)
    lengths = replace(CONFIG, core_um=0.0, max_depth_um=100.0, nucleus_diameter_um=6.0)
    small = instances(scene, MPP, lengths, core=core)
    twice = replace(lengths, nucleus_diameter_um=12.0, max_area_um2=1600.0, max_diameter_um=60.0)
    large = instances(
        scene, 2 * MPP, replace(twice, min_area_um2=12.0, max_hole_um2=160.0), core=core
    )
    assert small.max() > 40
    np.testing.assert_array_equal(small, large)


def test_no_more_is_joined_than_the_margin_of_a_tile_holds():
    """Parts of 40 px, 20 µm, stay apart, unless nuclei may be so large that the margin holds it."""
    confidence, core = two_cores(20, 9)
    config = replace(CONFIG, nucleus_diameter_um=12.0)
    assert instances(confidence, MPP, config, core=core).max() == 2
    large = replace(config, max_diameter_um=60.0)
    assert postprocessing_margin_um(large) > postprocessing_margin_um(config)
    assert instances(confidence, MPP, large, core=core).max() == 1


@pytest.mark.parametrize("typical_um", [2.0, 7.0, 40.0])
@pytest.mark.parametrize("seed", range(6))
def test_nuclei_depend_on_no_pixel_beyond_the_margin(seed, typical_um):
    """A crowd of nuclei with uneven cores: cut beyond the margin, those in the middle stay."""
    rng = np.random.default_rng(seed)
    scene = discs((520, 520), rng.uniform([0, 0, 4], [520, 520, 11], (1260, 3))).round()
    noise = ndimage.gaussian_filter(rng.standard_normal(scene.shape), 2.5)
    core = (scene * np.clip(0.6 + 2 * noise, 0, 1)).astype(np.float32)
    config = replace(CONFIG, min_core=0.0, nucleus_diameter_um=typical_um)
    margin = int(np.ceil(postprocessing_margin_um(config) / MPP))
    whole = instances(scene, MPP, config, core=core)
    cut = slice(160 - margin, 360 + margin)
    part = instances(scene[cut, cut], MPP, config, core=core[cut, cut])

    def owned(labels, origin):
        pixels = [np.argwhere(labels == k) + origin for k in range(1, labels.max() + 1)]
        inside = (p for p in pixels if ((p.mean(0) >= 160) & (p.mean(0) < 360)).all())
        return sorted(p.tolist() for p in inside)

    found = owned(whole, 0)
    assert len(found) > 20
    assert owned(part, 160 - margin) == found


def test_a_nucleus_beside_a_fibre_that_a_tile_cuts_stays():
    """The elevation of the fibre rises to the right, up to beyond where the tile is cut: the cut
    one is hardly higher there than where the nucleus touches it."""
    scene, core = np.full((2, 100, 500), 0.1, np.float32)
    scene[46:56, 60:480] = 0.9
    core[47:55, 60:480] = np.interp(np.arange(60, 480), [60, 300, 400], [0.6, 0.62, 1])
    rows, cols = np.mgrid[:100, :500]
    nucleus = (rows - 50.5) ** 2 + (cols - 51.5) ** 2 < 81
    scene[nucleus], core[nucleus] = 0.9, 0.8
    right = 70 + int(np.ceil(postprocessing_margin_um(CONFIG) / MPP))
    assert right < 300
    whole = instances(scene, MPP, CONFIG, core=core)
    part = instances(scene[:, :right], MPP, CONFIG, core=core[:, :right])
    assert whole[50, 51]
    np.testing.assert_array_equal(part[:, :70] == part[50, 51], whole[:, :70] == whole[50, 51])
    assert part[50, 51]


def test_a_gap_that_the_border_of_a_tile_closes_is_no_hole():
    """Two rows of touching nuclei, a gap of a pixel between them, which is open far to the right:
    its area up to where a tile is cut off is that of a hole."""
    scene, core = np.full((2, 260, 700), 0.1, np.float32)
    for first in range(150, 580, 36):
        for top in (91, 101):
            scene[top : top + 9, first : first + 36] = 0.9
            core[top + 2 : top + 7, first + 4 : first + 32] = 0.9
    scene[100, 150:158] = 0.9
    margin = int(np.ceil(postprocessing_margin_um(CONFIG) / MPP))
    whole = instances(scene, MPP, CONFIG, core=core)

    def owned(labels, right):
        pixels = [np.argwhere(labels == k) for k in range(1, labels.max() + 1)]
        return sorted(p.tolist() for p in pixels if p.mean(0)[1] < right)

    for right in range(170, 330, 20):
        cut = slice(0, right + margin)
        part = instances(scene[:, cut], MPP, CONFIG, core=core[:, cut])
        assert owned(part, right) == owned(whole, right)


def rows_beside_a_gap(height):
    """Two rows of nuclei, a gap of a pixel between them, that meet far to the right."""
    scene, core = np.full((2, 60, 600), 0.1, np.float32)
    for top in (20, 21 + height):
        scene[top : top + height, 60:580] = 0.9
        for first in range(60, 540, 40):
            core[top : top + height, first + 12 : first + 28] = 0.95
    scene[20 : 21 + 2 * height, 570:580] = 0.9
    return scene, core


def chains_that_meet_at_a_corner():
    """A nucleus whose corner touches that of another; both belong to chains that meet far away."""
    scene, core = np.full((2, 100, 500), 0.1, np.float32)
    scene[20:42, 50:56] = scene[30:42, 50:62] = scene[41, 60:71] = 0.9
    core[33:39, 53:59] = 0.95
    scene[42:54, 71:83] = 0.9
    core[43:50, 72:80] = 0.95
    scene[20:30, 50:480] = scene[54:64, 71:480] = scene[20:64, 470:480] = 0.9
    for first in range(60, 460, 20):
        core[22:28, first + 4 : first + 16] = core[56:62, first + 4 : first + 16] = 0.95
    return scene, core


@pytest.mark.parametrize(
    ("scene", "core"),
    [chains_that_meet_at_a_corner(), *map(rows_beside_a_gap, range(2, 6))],
    ids=["corner", *(f"gap beside {height} px" for height in range(2, 6))],
)
@pytest.mark.parametrize("typical_um", [7.0, 12.0, 17.5])
def test_what_connects_two_nuclei_far_away_does_not_matter(scene, core, typical_um):
    """A tile does not see it, and finds the same nuclei, of one piece each."""
    config = replace(CONFIG, nucleus_diameter_um=typical_um)
    margin = int(np.ceil(postprocessing_margin_um(config) / MPP))

    def owned(right):
        cut = slice(0, right + margin)
        labels = instances(scene[:, cut], MPP, config, core=core[:, cut])
        pixels = [np.argwhere(labels == k) for k in range(1, labels.max() + 1)]
        return sorted(p.tolist() for p in pixels if p.mean(0)[1] < 120)

    whole = owned(scene.shape[1])
    assert len(whole) >= 4
    assert owned(120) == whole
    for nucleus in whole:
        mask = np.zeros(scene.shape, bool)
        mask[tuple(np.transpose(nucleus))] = True
        assert ndimage.label(mask)[1] == 1


def test_labels_have_no_gaps_and_are_4_connected():
    rng = np.random.default_rng(1)
    confidence = discs((300, 300), rng.uniform([10, 10, 4], [290, 290, 9], (120, 3)))
    labels = instances(confidence, MPP, CONFIG)
    assert labels.max() > 30
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


def test_merged_maxima_leave_no_gap_in_the_labels():
    """Also where no nucleus is too small."""
    rng = np.random.default_rng(1)
    confidence = discs((300, 300), rng.uniform([10, 10, 4], [290, 290, 9], (120, 3)))
    config = replace(CONFIG, min_area_um2=0.0, min_prominence_um=2.0)
    labels = instances(confidence, MPP, config)
    assert 10 < labels.max() < instances(confidence, MPP, CONFIG).max()
    assert np.array_equal(np.unique(labels), np.arange(labels.max() + 1))


def test_cores_separate_what_depth_does_not():
    """A bar, and two nuclei in it that only their cores separate."""
    confidence = np.full((60, 90), 0.1, np.float32)
    confidence[24:36, 20:70] = 0.9
    core = discs(confidence.shape, [(30, 32, 5), (30, 58, 5)])
    assert instances(confidence, MPP, CONFIG).max() == 1
    labels = instances(confidence, MPP, CONFIG, core=core)
    assert labels.max() == 2
    assert labels[30, 32] != labels[30, 58]
    assert ((labels > 0) == (confidence > 0.5)).mean() > 0.998


def test_an_object_without_a_core_is_no_nucleus():
    confidence = discs((60, 120), [(30, 30, 8), (30, 80, 8)])
    labels = instances(confidence, MPP, CONFIG, core=discs(confidence.shape, [(30, 80, 4)]))
    assert labels.max() == 1
    assert labels[30, 80] == 1


@pytest.mark.parametrize(
    ("radius_px", "is_nucleus"),
    [(1.5, False), (2, True), (20, True), (25, False)],  # 1, 3, 314 and 491 µm²
)
def test_size_limits(radius_px, is_nucleus):
    labels = instances(discs((120, 120), [(60, 60, radius_px)]), MPP, CONFIG)
    assert (labels.max() == 1) == is_nucleus


def test_small_holes_are_filled_and_large_ones_stay():
    confidence = discs((120, 60), [(30, 30, 12), (90, 30, 15)])
    confidence[28:32, 28:32] = 0.1  # 4 µm²
    confidence[84:97, 24:37] = 0.1  # 42 µm²
    labels = instances(confidence, MPP, CONFIG)
    assert labels[30, 30] > 0
    assert labels[90, 30] == 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_image_of_one_confidence_has_no_nuclei(value):
    assert instances(np.full((100, 90), value, np.float32), MPP, CONFIG).max() == 0


def test_a_nucleus_has_the_same_pixels_wherever_it_lies_in_the_image():
    rng = np.random.default_rng(2)
    smooth = ndimage.gaussian_filter(rng.normal(size=(400, 400)), 5)
    confidence = np.round(255 / (1 + np.exp(-60 * smooth))).astype(np.float32) / np.float32(255)
    whole = instances(confidence, MPP, CONFIG)
    row, col = 37, 53
    part = instances(confidence[row:, col:].copy(), MPP, CONFIG)
    inner = np.unique(part[90:, 90:])[1:]
    inner = [label for label in inner if not (part[:90] == label).any()]
    inner = [label for label in inner if not (part[:, :90] == label).any()]
    assert len(inner) > 20
    for label in inner:
        pixels = part == label
        names = np.unique(whole[row:, col:][pixels])
        assert len(names) == 1
        assert names[0] > 0
        assert (whole == names[0]).sum() == pixels.sum()


@pytest.mark.parametrize("most", [0.4, 3.0, 7.5, 150.0])
@pytest.mark.parametrize("shape", [(60, 90), (1, 50), (50, 2)])
def test_distances_are_exact_up_to_the_maximum(shape, most):
    mask = np.random.default_rng(3).random(shape) < 0.9
    mask[:, : shape[1] // 2] |= np.arange(shape[1] // 2) > 3  # a large inside
    mask[0, 0] = False
    exact = ndimage.distance_transform_edt(mask)
    np.testing.assert_array_equal(np.minimum(_distance(mask, most), most), np.minimum(exact, most))


def test_a_mask_without_background_has_no_small_distance():
    assert (_distance(np.ones((40, 50), dtype=bool), 6.0) >= 6).all()


@pytest.mark.parametrize("shape", [(70, 90), (1, 40), (40, 1), (5, 2)])
@pytest.mark.parametrize("least_um2", [0.0, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("longest_px", [4, 12, np.inf])
def testlarge_pieces_are_those_of_scipy(shape, least_um2, longest_px):
    """Of noise, whose pieces wind about and meet below; and of masks of one value."""
    noise = np.random.default_rng(5).random(shape) < 0.58
    for mask in (noise, ~noise, np.ones(shape, bool), np.zeros(shape, bool)):
        labels, _ = ndimage.label(mask)
        boxes = ndimage.find_objects(labels)
        length = np.array([0] + [max(s.stop - s.start for s in box) for box in boxes])
        large = np.bincount(labels.ravel())[labels] * 0.25 >= least_um2
        large = mask & (large | (length[labels] > longest_px))
        found = large_pieces(mask, 0.25, least_um2, longest_px)
        np.testing.assert_array_equal(found > 0, large)
        pairs = np.unique(np.stack([found[large], labels[large]]), axis=1)
        assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@pytest.mark.parametrize("shape", [(30, 40), (1, 40), (40, 1), (30, 2)])
def test_the_highest_pixel_near_is_connected_and_the_last_of_equal_ones(shape):
    rng = np.random.default_rng(6)
    mask = rng.random(shape) < 0.6
    elevation = rng.integers(1, 4, shape).astype(np.float32) * mask  # many are equal
    found = _highest_near(elevation, mask, _offsets(1.5)).reshape(shape)
    for row, col in np.argwhere(mask):
        near = [
            (r, c)
            for r in range(max(row - 1, 0), min(row + 2, shape[0]))
            for c in range(max(col - 1, 0), min(col + 2, shape[1]))
            if mask[r, c] and (mask[row, c] or mask[r, col])
        ]
        assert divmod(found[row, col], shape[1]) == max(near, key=lambda p: (elevation[p], p))


@pytest.mark.parametrize("shape", [(50, 60), (2, 30), (30, 3)])
def test_elevations_are_smoothed_as_scipy_does(shape):
    rng = np.random.default_rng(7)
    values, mask = rng.random(shape), rng.random(shape) < 0.5
    half = np.exp(-0.5 * (np.arange(6) / 1.2) ** 2)
    half /= 2 * half.sum() - half[0]
    kernel = np.concatenate([half[:0:-1], half])
    expected = ndimage.correlate1d(ndimage.correlate1d(values, kernel, axis=0), kernel, axis=1)
    np.testing.assert_allclose(_smooth(values, mask, half), expected * mask, rtol=1e-6)


@pytest.mark.parametrize("smooth_um", [0.0, 0.01, 0.6])
def test_no_pixel_outside_is_as_high_as_those_inside(smooth_um):
    """Not where the network sees cores outside, either: a step to such a pixel would never end."""
    rng = np.random.default_rng(8)
    mask, core = rng.random((40, 50)) < 0.7, rng.random((40, 50)).astype(np.float32)
    config = replace(CONFIG, smooth_um=smooth_um)
    elevation = _elevation(mask, core, MPP, config)
    assert elevation[mask].min() > 0
    assert not elevation[~mask].any()
    steps = _highest_near(elevation, mask, _offsets(1.5)).reshape(mask.shape)
    assert mask.flat[steps[mask]].all()


def test_without_smoothing_nuclei_are_found_where_cores_lie_outside():
    confidence = discs((60, 80), [(30, 30, 8), (30, 44, 8)])
    core = np.where(confidence > 0.5, 0.7, 1.0).astype(np.float32)
    labels = instances(confidence, MPP, replace(CONFIG, smooth_um=0.0), core=core)
    assert labels.max() == 2
    np.testing.assert_array_equal(labels > 0, confidence > 0.5)
