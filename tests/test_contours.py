"""Contours, ownership and measurements, of shapes whose values are known."""

import hashlib
import uuid
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import shapely
from scipy import ndimage

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import Box, Nuclei, Tile
from patchcl_qupath.segmentation import contours
from patchcl_qupath.segmentation.contours import (
    centroids,
    nuclei_of_tile,
    pixel_polygons,
    to_level0,
    trace_contours,
)
from patchcl_qupath.segmentation.measurements import (
    NuclearStain,
    glass_around,
    measure,
    runs_of,
    shape_measurements,
    steepness,
)
from patchcl_qupath.segmentation.rings import Rings, areas_of, rings_of
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E
from patchcl_qupath.slides.stains import densities


def disc_labels(shape, centres, radius):
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5
    labels = np.zeros(shape, dtype=np.int32)
    for label, (row, col) in enumerate(centres, start=1):
        labels[(rows - row) ** 2 + (cols - col) ** 2 < radius**2] = label
    return labels


def test_contours_have_the_area_and_place_of_their_pixels():
    centres = [(20.2, 31.7), (55.5, 90.1), (80, 20)]
    labels = disc_labels((100, 120), centres, 9)
    polygons = trace_contours(labels)
    assert shapely.is_valid(polygons).all()
    np.testing.assert_allclose(shapely.area(polygons), np.pi * 81, rtol=0.02)
    np.testing.assert_allclose(shapely.length(polygons), 2 * np.pi * 9, rtol=0.04)
    for polygon, (row, col) in zip(polygons, centres, strict=True):
        assert shapely.distance(polygon.centroid, shapely.Point(col, row)) < 0.1


def test_contours_touch_the_image_border_without_leaving_it():
    labels = np.zeros((30, 40), dtype=np.int32)
    labels[:10, :12] = 1
    labels[20:, 25:] = 2
    first, second = trace_contours(labels)
    assert shapely.box(0, 0, 40, 30).buffer(0.15).covers(shapely.union(first, second))
    assert first.bounds[:2] == pytest.approx((0, 0), abs=0.15)
    assert second.bounds[2:] == pytest.approx((40, 30), abs=0.15)


def test_contours_of_neighbours_do_not_overlap():
    labels = np.zeros((40, 40), dtype=np.int32)
    labels[10:30, 10:20] = 1
    labels[10:30, 20:30] = 2
    first, second = trace_contours(labels)
    assert shapely.area(shapely.intersection(first, second)) < 1
    assert shapely.distance(first, second) < 0.2


def test_holes_are_left_out_and_the_largest_piece_is_taken():
    labels = np.zeros((60, 60), dtype=np.int32)
    labels[10:40, 10:40] = 1
    labels[20:30, 20:30] = 0
    labels[50:55, 50:55] = 1  # a second piece
    labels[45:50, 45:50] = 1  # ... that touches a third by a corner only
    (polygon,) = trace_contours(labels)
    assert not polygon.interiors
    assert polygon.area == pytest.approx(900, rel=0.01)


@pytest.mark.parametrize("block_px", [4, 64])
def test_pixel_polygons_have_every_pixel(monkeypatch, block_px):
    monkeypatch.setattr(contours, "_BLOCK_PX", block_px)
    labels = np.zeros((20, 30), dtype=np.uint16)
    labels[2:12, 3:13] = 900
    labels[4:8, 5:9] = 0  # a hole, with
    labels[5, 6] = 900  # ... a piece in it
    labels[12:15, 13:16] = 900  # touches by a corner
    labels[18:, 25:] = 7  # at the border
    labels[3, 20] = labels[4, 21] = labels[5, 20] = labels[4, 19] = 8  # a ring of corners
    seven, eight, nine_hundred = pixel_polygons(labels)
    assert seven.equals(shapely.box(25, 18, 30, 20))
    assert (eight.area, len(eight.geoms)) == (4, 4)
    squares = [shapely.box(c, r, c + 1, r + 1) for r, c in np.argwhere(labels == 900)]
    assert nine_hundred.equals(shapely.union_all(squares))
    assert nine_hundred.geom_type == "MultiPolygon"


@pytest.mark.parametrize("block_px", [7, 512])
def test_pixel_polygons_of_noise_are_valid_and_exact(monkeypatch, block_px):
    monkeypatch.setattr(contours, "_BLOCK_PX", block_px)
    labels = np.random.default_rng(0).integers(0, 9, (40, 50)) ** 2
    areas = pixel_polygons(labels)
    assert shapely.is_valid(areas).all()
    _, count = np.unique(labels[labels > 0], return_counts=True)
    np.testing.assert_array_equal(shapely.area(areas), count)
    assert not len(pixel_polygons(np.zeros_like(labels)))


def test_random_shapes_have_valid_contours():
    labels = np.random.default_rng(0).integers(0, 4, (200, 200)).astype(np.int32)
    polygons = trace_contours(labels)
    assert len(polygons) == 3
    assert shapely.is_valid(polygons).all()
    assert (shapely.area(polygons) > 0).all()


# Confidence in 255ths: the ends of a C lie so near that its contour touches itself between them.
ALMOST_A_RING = np.array(
    [
        [87, 38, 35, 24, 106, 168, 138, 157, 140, 44],
        [92, 45, 64, 101, 152, 122, 124, 124, 124, 124],
        [84, 55, 48, 103, 146, 138, 110, 124, 124, 124],
        [96, 100, 97, 101, 176, 166, 113, 124, 88, 73],
        [124, 73, 108, 177, 182, 188, 139, 119, 120, 124],
        [92, 113, 118, 94, 141, 132, 127, 144, 111, 111],
        [104, 93, 170, 145, 130, 124, 133, 145, 144, 123],
        [113, 146, 144, 131, 143, 186, 189, 104, 67, 84],
        [90, 141, 109, 136, 140, 188, 186, 83, 30, 74],
        [107, 124, 105, 110, 171, 187, 151, 107, 54, 73],
        [124, 94, 87, 90, 146, 143, 111, 105, 124, 103],
        [122, 126, 92, 107, 105, 141, 158, 118, 124, 112],
        [124, 96, 123, 124, 121, 92, 116, 124, 124, 124],
    ],
    np.float32,
)


def test_a_contour_that_closes_a_bay_has_no_hole_and_is_measured_as_it_is():
    confidence = ALMOST_A_RING / np.float32(255)
    labels = (confidence > 0.5).astype(np.int32)
    labels[0] = 0  # of others
    polygons = trace_contours(labels, confidence)
    assert shapely.is_valid(polygons).all()
    assert not shapely.get_num_interior_rings(polygons).any()
    measured = shape_measurements(polygons)
    assert measured["Area µm^2"] == pytest.approx(shapely.area(polygons))
    assert measured["Length µm"] == pytest.approx(shapely.length(polygons))
    hulls = shapely.area(shapely.convex_hull(polygons))
    assert measured["Solidity"] == pytest.approx(shapely.area(polygons) / hulls)


def test_a_line_of_pixels_hardly_above_the_threshold_measures_nothing():
    confidence = np.full((9, 30), 0.1, np.float32)
    confidence[4, 5:25] = 0.5001
    polygons = trace_contours((confidence > 0.5).astype(np.int32), confidence)
    assert shapely.is_empty(polygons).all()
    measured = shape_measurements(polygons)
    for name in ("Area µm^2", "Length µm", "Circularity", "Solidity", "Max diameter µm"):
        assert measured[name] == [0]


def test_labels_with_gaps_are_refused():
    with pytest.raises(ValueError, match="without gaps"):
        trace_contours(np.full((5, 5), 2, dtype=np.int32))


def test_no_labels_no_contours():
    empty = np.zeros((20, 30), dtype=np.int32)
    tile = Tile(row=0, col=0, read=Box(0, 0, 20, 30), write=Box(0, 0, 20, 30))
    rgb = np.zeros((20, 30, 3), dtype=np.uint8)
    assert len(trace_contours(empty)) == 0
    none = np.zeros(0, dtype=bool)
    nuclei = nuclei_of_tile(
        labels=empty,
        owned=none,
        probability=np.zeros(0),
        rgb=rgb,
        confidence=np.zeros((20, 30), np.float32),
        tile=tile,
        mpp=(0.5, 0.5),
    )
    assert len(nuclei) == 0
    assert len(to_level0(nuclei, (2, 2), "1")) == 0


def test_each_nucleus_has_one_owner_also_on_the_border_of_two_write_boxes():
    # Centroids 0.0, 0.5 px to either side of the border at column 50.
    image = np.zeros((20, 100), dtype=np.int32)
    image[5:10, 45:55] = 1  # centroid 49.5: pixel 49
    image[12:17, 46:55] = 2  # centroid 50: pixel 50
    left = Tile(row=0, col=0, read=Box(0, 0, 20, 70), write=Box(0, 0, 20, 50))
    right = Tile(row=0, col=1, read=Box(0, 30, 20, 100), write=Box(0, 50, 20, 100))
    in_left, in_right = centroids(image[:, :70], left), centroids(image[:, 30:], right)
    np.testing.assert_array_equal(in_left, in_right)
    np.testing.assert_array_equal(in_left, [[7, 14], [49, 50]])
    np.testing.assert_array_equal(left.write.holds(*in_left), [True, False])
    np.testing.assert_array_equal(right.write.holds(*in_right), [False, True])


def test_shape_measurements_of_a_rectangle_as_in_qupath():
    shape = shape_measurements(np.array([shapely.box(0, 0, 3, 4)]))
    expected = {
        "Area µm^2": 12,
        "Length µm": 14,
        "Circularity": 4 * np.pi * 12 / 14**2,
        "Solidity": 1,
        "Max diameter µm": 5,  # of the smallest circle around it
        "Min diameter µm": 3,  # its least width
    }
    assert list(shape) == list(expected)
    for name, value in expected.items():
        assert shape[name][0] == pytest.approx(value), name


def test_min_diameter_is_the_least_width_not_that_of_the_bounding_box():
    tilted = shapely.affinity.rotate(shapely.box(0, 0, 10, 2), 30)
    triangle = shapely.Polygon([(0, 0), (4, 0), (0, 3)])
    notched = shapely.Polygon([(0, 0), (6, 0), (6, 6), (3, 1), (0, 6)])
    shape = shape_measurements(np.array([tilted, triangle, notched]))
    np.testing.assert_allclose(shape["Min diameter µm"], [2, 2.4, 6])
    assert shape["Solidity"][2] == pytest.approx((36 - 15) / 36)


def test_max_diameter_is_that_of_the_smallest_circle_around():
    rng = np.random.default_rng(0)
    clouds = [rng.standard_normal((n, 2)) * 10 + 5000 for n in rng.integers(3, 40, 300)]
    hulls = np.array([shapely.MultiPoint(cloud).convex_hull for cloud in clouds])
    discs = shapely.buffer(shapely.points(rng.uniform(0, 1e5, (300, 2))), rng.uniform(1, 20, 300))
    polygons = np.concatenate([hulls, discs])  # of discs, all points are on the circle
    expected = 2 * shapely.minimum_bounding_radius(polygons)  # GEOS's, as slow as it is sure
    np.testing.assert_allclose(shape_measurements(polygons)["Max diameter µm"], expected)


@pytest.mark.parametrize("stains", [H_E, H_DAB])
def test_intensities_are_qupath_s_optical_densities_of_the_pixels_inside(stains):
    labels = np.zeros((4, 6), dtype=np.int32)
    labels[1:3, 1:3] = 1
    labels[0, 5] = 2
    rgb = np.random.default_rng(0).integers(30, 255, (4, 6, 3)).astype(np.uint8)
    polygons = trace_contours(labels)
    values = measure(polygons, labels, rgb, np.array([0.75, 0.5]), stains)
    found = densities(rgb, stains)
    assert tuple(found) == stains.names
    for name, density in found.items():
        inside = density[1:3, 1:3]
        assert values[f"{name}: Mean"][0] == pytest.approx(inside.mean(), rel=1e-5)
        assert values[f"{name}: Std.Dev."][0] == pytest.approx(inside.std(ddof=1), rel=1e-5)
        assert values[f"{name}: Min"][0] == inside.min()
        assert values[f"{name}: Max"][0] == inside.max()
        assert values[f"{name}: Std.Dev."][1] == 0
    assert values["Detection probability"].tolist() == [0.75, 0.5]


@pytest.mark.parametrize(
    ("stains", "vector"),
    [(H_E, [0.2159, 0.8012, 0.5581]), (H_DAB, [0.26917, 0.56824, 0.77759])],
)
def test_pure_stains_unmix_to_themselves(stains, vector):
    hematoxylin = 255 * 10 ** (-0.8 * np.array([0.65111, 0.70119, 0.29049]))
    other = 255 * 10 ** (-0.5 * np.array(vector))
    rgb = np.round([hematoxylin, other, [255] * 3]).astype(np.uint8)
    one, two = densities(rgb, stains).values()
    np.testing.assert_allclose(one, [0.8, 0, 0], atol=0.01)
    np.testing.assert_allclose(two, [0, 0.5, 0], atol=0.01)


def test_level0_coordinates_and_uuids():
    square = shapely.box(10, 20, 12, 26)
    nuclei = Nuclei(np.array([square, shapely.box(0, 0, 1, 1)]), {"a": np.float32([1, 2])})
    moved = to_level0(nuclei, (2, 4), "7")
    assert moved.polygons[0].bounds == (20, 80, 24, 104)
    assert len(set(moved.uuids)) == 2
    assert list(moved.uuids) == list(to_level0(nuclei, (2, 4), "7").uuids)
    assert set(moved.uuids).isdisjoint(to_level0(nuclei, (2, 4), "8").uuids)


def test_contours_run_where_confidence_falls_to_the_threshold():
    """The contours of discs with rims between pixels are exact to a fraction of a pixel."""
    rows, cols = np.mgrid[:60, :60] + 0.5
    for radius in (9.1, 9.35, 9.6, 9.85):
        distance = np.hypot(rows - 30.2, cols - 29.7)
        confidence = np.clip(0.5 + (radius - distance) / 3, 0, 1).astype(np.float32)
        labels = (confidence > 0.5).astype(np.int32)
        disc = shapely.Point(29.7, 30.2).buffer(radius, quad_segs=64)
        (polygon,) = trace_contours(labels, confidence)
        assert polygon.area == pytest.approx(disc.area, rel=0.02)
        assert (
            polygon.hausdorff_distance(disc)
            < 0.3
            < trace_contours(labels)[0].hausdorff_distance(disc)
        )
        assert polygon.is_valid


def rings_of_noise():
    """The smoothed contours of noise, as rings and as polygons."""
    noise = ndimage.gaussian_filter(np.random.default_rng(2).standard_normal((200, 200)), 1.5)
    labels, _ = ndimage.label(noise > 0.01)
    corner, step, first, _ = contours._trace(labels.astype(np.int32))
    xy = contours._smooth(corner + step / 2, first)
    ring = np.repeat(np.arange(len(first) - 1), np.diff(first))
    return Rings(xy, first), shapely.polygons(shapely.linearrings(xy, indices=ring))


def simplified(rings):
    points, starts = contours._simplified(rings, np.arange(len(rings.first) - 1))
    return [points[a:b] for a, b in pairwise(starts)]


def test_simplified_contours_stay_within_a_fifth_of_a_px():
    rings, polygons = rings_of_noise()
    assert len(polygons) > 100
    found = simplified(rings)
    assert sum(map(len, found)) < len(rings.xy) / 2
    for points, polygon in zip(found, polygons, strict=True):
        ring = shapely.LinearRing(points)
        assert len(points) >= 3
        assert shapely.hausdorff_distance(ring, polygon.exterior) <= 0.4  # twice: at the first one


@pytest.mark.skipif(shapely.geos_version < (3, 13, 0), reason="older GEOS keeps the first point")
def test_contours_are_simplified_as_geos_does():
    rings, polygons = rings_of_noise()
    by_geos = shapely.simplify(polygons, 0.2, preserve_topology=False)
    equal = 0
    for points, one, whole in zip(simplified(rings), by_geos, polygons, strict=True):
        if one.geom_type == "Polygon" and not one.is_empty and shapely.Polygon(points).is_valid:
            equal += 1
            assert shapely.equals_exact(shapely.Polygon(points), one)
        elif one.is_empty:
            assert shapely.equals_exact(shapely.Polygon(points), whole)
    assert equal > 0.9 * len(polygons)


def test_areas_of_rings_are_those_of_their_polygons():
    rings, polygons = rings_of_noise()
    for each in (rings, rings_of(polygons)):  # without their first point again, and with it
        np.testing.assert_array_equal(areas_of(each), shapely.area(polygons))


def test_contours_at_touching_nuclei_and_at_the_border_stay_between_pixels():
    labels = np.zeros((20, 30), np.int32)
    labels[:, :15], labels[:, 15:] = 1, 2
    confidence = np.where(labels == 1, 0.9, 0.6).astype(np.float32)
    plain, exact = trace_contours(labels), trace_contours(labels, confidence)
    assert shapely.equals_exact(plain, exact, 1e-9).all()


def enough_stain(labels, rgb, config, has_brown=False):
    stain = NuclearStain.of(labels, rgb, mpp=0.5, config=config)
    return stain.is_enough(config, has_brown).tolist()


def test_nuclei_have_hematoxylin_and_on_glass_more_of_it():
    labels = disc_labels((120, 120), [(20, 20), (20, 80), (80, 20), (80, 80)], 5)
    amounts = {1: 0.2, 2: 0.02, 3: 0.2, 4: 0.4}  # two in stroma, two on glass
    vector = np.array([0.65111, 0.70119, 0.29049])
    rgb = np.full((120, 120, 3), 240, dtype=np.uint8)
    rgb[:50] = (230, 150, 190)
    for label, amount in amounts.items():
        rgb[labels == label] = np.round(255 * 10 ** -(amount * vector))
    config = SegmentConfig(min_hematoxylin=0.05, min_hematoxylin_on_glass=0.3, max_glass=0.3)
    assert enough_stain(labels, rgb, config) == [True, False, False, True]
    anywhere = replace(config, max_glass=1.0)
    assert enough_stain(labels, rgb, anywhere) == [True, False, True, True]
    assert enough_stain(np.zeros_like(labels), rgb, config) == []


def test_ink_is_no_nucleus_but_brown_and_violet_are():
    densities = {
        "hematoxylin": (0.65, 0.70, 0.29),
        "violet": (0.30, 0.62, 0.33),
        "DAB": (0.27, 0.57, 0.78),
        "green ink": (0.60, 0.25, 0.38),
        "red ink": (0.05, 0.90, 0.80),
        "cyan ink": (0.60, 0.32, 0.26),
        "blue hematoxylin": (0.60, 0.38, 0.22),
        "nucleus under a haze of green": (0.75, 0.70, 0.50),
    }
    at = [(row, col) for row in (20, 60) for col in (20, 60, 100, 140)]
    labels = disc_labels((80, 160), at, 6)
    rgb = np.full((80, 160, 3), 200, dtype=np.uint8)
    for label, density in enumerate(densities.values(), start=1):
        rgb[labels == label] = np.round(255 * 10 ** -np.array(density))
    config = SegmentConfig()
    of_brown_slide = enough_stain(labels, rgb, config, has_brown=True)
    assert dict(zip(densities, of_brown_slide, strict=True)) == {
        "hematoxylin": True,
        "violet": True,
        "DAB": True,
        "green ink": False,
        "red ink": False,
        "cyan ink": False,
        "blue hematoxylin": True,
        "nucleus under a haze of green": True,
    }
    assert enough_stain(labels, rgb, config) == [True] * 2 + [False] * 4 + [True] * 2


@pytest.mark.parametrize(("blur_um", "kept"), [(0, True), (1, True), (8, False)])
def test_what_is_far_out_of_focus_is_no_nucleus(blur_um, kept):
    """A disc of 6 µm, with the density of dark hematoxylin, that is spread by a blur."""
    labels = disc_labels((120, 120), [(60, 60)], 6)
    amount = 0.9 * (labels > 0) + 0.1
    if blur_um:
        amount = ndimage.gaussian_filter(amount, blur_um / 0.5)
        amount = 0.1 + 0.8 * (amount - amount.min()) / np.ptp(amount)
    rgb = np.round(255 * 10 ** -(amount[..., None] * np.array(H_E.vectors[0]))).astype(np.uint8)
    assert enough_stain(labels, rgb, SegmentConfig()) == [kept]


@pytest.mark.parametrize("mpp", [0.25, 0.5])
def test_steepness_is_the_gradient_of_the_density_of_red_light(mpp):
    """Densities that rise by 0.03 with each column, and by 0.04 with each row."""
    rows, cols = np.mgrid[:20, :20]
    rgb = np.full((20, 20, 3), 255, np.uint8)
    rgb[..., 0] = np.round(255 * 10 ** -(0.03 * cols + 0.04 * rows))
    labels = np.zeros((20, 20), np.int32)
    labels[2:8, 3:9] = 1
    labels[19, 19] = 3  # nothing beyond it: flat; of 2, there are no pixels
    found = steepness(runs_of(labels), int(labels.max()), rgb, mpp)
    np.testing.assert_allclose(found, [0.05 / mpp, 0, 0], rtol=0.02)


def test_densities_of_nuclei_are_those_of_light_and_of_hematoxylin():
    amounts = [(0.15, 0.3), (0.15, 0.05), (0.4, 0.6)]  # of hematoxylin and eosin
    labels = disc_labels((60, 120), [(30, 20), (30, 60), (30, 100)], 6)
    rgb = np.full((60, 120, 3), 200, dtype=np.uint8)
    of_light = np.array(amounts) @ np.array(H_E.vectors)
    for label, density in enumerate(of_light, start=1):
        rgb[labels == label] = np.round(255 * 10**-density)
    stain = NuclearStain.of(labels, rgb, mpp=0.5, config=SegmentConfig())
    assert np.allclose(stain.hematoxylin, [0.15, 0.15, 0.4], atol=0.01)
    assert np.allclose(stain.red, of_light[:, 0], atol=0.005)
    assert np.allclose(stain.share_of_red, of_light[:, 0] / of_light.sum(axis=1), atol=0.005)


def test_glass_around_nuclei_is_that_of_squares_mirrored_at_the_border():
    labels = disc_labels((60, 70), [(4, 3), (30, 40), (57, 66), (20, 60)], 5)
    rgb = np.random.default_rng(0).integers(200, 256, (60, 70, 3)).astype(np.uint8)
    wanted = np.array([True, True, True, False])
    glass = rgb.sum(axis=-1) > 3 * 225
    around = ndimage.uniform_filter(glass.astype(float), 17, mode="reflect")
    expected = ndimage.mean(around, labels, [1, 2, 3])
    found = glass_around(runs_of(labels), wanted, rgb, mpp=0.5)
    np.testing.assert_allclose(found, [*expected, 0], rtol=1e-12)
    assert 0 < found[0] != found[1]


@pytest.mark.parametrize("stains", [H_E, H_DAB])
def test_measurements_of_noise_are_those_of_numpy(stains):
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)
    labels = rng.integers(0, 6, (50, 60)).astype(np.int32)
    boxes = np.array([shapely.box(0, 0, 1, 1)] * 5)
    found = measure(boxes, labels, rgb, np.zeros(5), stains)
    for name, density in densities(rgb, stains).items():
        of = [density[labels == label] for label in range(1, 6)]
        for statistic, expected in (
            ("Mean", [np.mean(values, dtype=np.float64) for values in of]),
            ("Std.Dev.", [np.std(values, ddof=1, dtype=np.float64) for values in of]),
            ("Min", [values.min() for values in of]),
            ("Max", [values.max() for values in of]),
        ):
            np.testing.assert_allclose(found[f"{name}: {statistic}"], expected, rtol=1e-6)


def test_ids_are_uuids_of_version_5():
    polygons = shapely.buffer(shapely.points(np.arange(300), 0), 5)
    found = to_level0(Nuclei(polygons), (1.0, 1.0), "7").uuids
    seed = hashlib.sha256(b"7").digest()
    rounded = shapely.transform(polygons, lambda xy: np.round(xy, 2))
    for contour, name in zip(shapely.to_wkb(rounded), found, strict=True):
        digest = hashlib.blake2b(contour, digest_size=16, key=seed).digest()
        assert name == str(uuid.UUID(bytes=digest, version=5))
