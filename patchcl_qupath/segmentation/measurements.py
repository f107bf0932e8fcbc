"""Measurements of nuclei under QuPath's own names: shapes and optical densities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import Box, Polygons, StainVectors
from patchcl_qupath.segmentation.rings import Rings, areas_of, hulls_of, lengths_of, rings_of
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.slides.stains import (
    COLOUR_DENSITIES,
    density_tables,
    hematoxylin_density,
    is_cyan_ink,
    is_green_ink,
    is_red_ink,
)

PROBABILITY = "Detection probability"
_STATISTICS = ("Mean", "Std.Dev.", "Min", "Max")
_GLASS = 225  # grey of a pixel that lets nearly all light through
_AROUND_UM = 8.0
NO_LIGHT = 1e-3  # optical density, so that ratios of densities are finite
# Per µm, of a nucleus's density of red light: the least of 23,400 outlined nuclei is 0.087. With a
# blur of 1 µm (sigma), of six sets none to 6 % are below 0.055; of 78 pieces of a smear, 75 are.
_LEAST_STEEPNESS = 0.055
_GREEN, _BLUE = np.uintp(1), np.uintp(2)  # places after that of red
# Pixels are read this many rows before they are measured, and each 64 bytes of them: they wait in a
# core's cache. One cell after the other would fetch them in no order, and wait for each row.
_AHEAD, _FETCHED = 16, 64
_IN_CELL, _IN_NUCLEUS = 1, 2  # marks of a contour that pixels are in

# Pixels of one label, above 0, that follow each other in a row: the label, the row, and the first
# column and that after the last, (R, 4), row by row. A loop over them need not look at others.
Runs = NDArray[np.int32]
Places = NDArray[np.uintp]  # of the red of pixels, in these as a flat array
_Sums = tuple[float, float, float, float]  # of values, of their squares; the least, the most


def measure(
    polygons_um: Polygons,
    labels: NDArray[np.int32],
    rgb: NDArray[np.uint8],
    probability: NDArray[np.float64],
    stains: StainVectors = H_E,
) -> dict[str, NDArray[np.float32]]:
    """Measurements of labels 1..N under QuPath's own names -> name: (N,) float32.

    ``polygons_um`` (N,) are their contours in µm, ``probability`` (N,) those that they are nuclei;
    ``labels`` (H, W) and ``rgb`` (H, W, 3) belong to the same tile. Shapes are defined as in
    QuPath's ``ObjectMeasurements`` (0.3 and later); optical densities are those of ``stains``, at
    the working resolution, over the pixels of the nucleus.
    """
    named = shape_measurements(polygons_um)
    n = len(polygons_um)
    statistics = _statistics(runs_of(labels), n, rgb, density_tables(stains))
    for stain, of_stain in zip(stains.names, statistics, strict=True):
        for name, per_nucleus in zip(_STATISTICS, of_stain, strict=True):
            named[f"{stain}: {name}"] = per_nucleus
    named[PROBABILITY] = probability
    return {name: values.astype(np.float32) for name, values in named.items()}


def measurement_names(stains: StainVectors) -> list[str]:
    """The names of the measurements that ``measure`` makes."""
    none = np.zeros((1, 1), np.int32)
    rgb = np.zeros((1, 1, 3), np.uint8)
    return list(measure(np.empty(0, object), none, rgb, np.empty(0), stains))


def measure_cells(
    of_nuclei: dict[str, NDArray[np.float32]],
    cells_um: Rings,
    *,
    cells: Rings,
    nuclei: Rings,
    rgb: NDArray[np.uint8],
    box: Box,
    stains: StainVectors = H_E,
) -> dict[str, NDArray[np.float32]]:
    """Measurements of cells 1..N under the names of QuPath 0.6 -> name: (N,) float32.

    ``of_nuclei`` are those of their nuclei, as of ``measure``; ``cells_um`` (N,) the contours of
    cells in µm; ``cells`` and ``nuclei``, of which the first N are theirs, on the working grid;
    ``rgb`` (H, W, 3) the pixels of a ``box`` there. Shapes and densities are defined as in QuPath's
    ``ObjectMeasurements``: the cytoplasm is the cell without the nucleus, and a pixel is in a
    contour by its centre, whatever other contours it is in. A cytoplasm of no pixel has no density
    (NaN).
    """
    shapes = _shapes(cells_um)
    ratio = of_nuclei["Area µm^2"] / shapes["Area µm^2"]
    named: dict[str, NDArray[Any]] = {f"Nucleus: {name}": of_nuclei[name] for name in shapes}
    named |= {f"Cell: {name}": values for name, values in shapes.items()}
    named["Nucleus/Cell area ratio"] = np.minimum(ratio, 1)
    found = _compartments(cells, nuclei, (box.row0, box.col0), rgb, density_tables(stains))
    for compartment, of_compartment in zip(("Nucleus", "Cytoplasm", "Cell"), found, strict=True):
        for stain, of_stain in zip(stains.names, of_compartment, strict=True):
            for name, per_cell in zip(_STATISTICS, of_stain, strict=True):
                named[f"{compartment}: {stain}: {name}"] = per_cell
    named[PROBABILITY] = of_nuclei[PROBABILITY]
    return {name: np.asarray(values, np.float32) for name, values in named.items()}


@compiled
def _compartments(
    cells: Rings,
    nuclei: Rings,
    corner: tuple[int, int],
    rgb: NDArray[np.uint8],
    tables: NDArray[np.float32],
) -> NDArray[np.float64]:
    """Statistics of S stains in nuclei, cytoplasms and whole cells (N,): (3, S, 4, N).

    As of ``_statistics``; NaN for a compartment without pixels. ``corner`` (row, column) is that of
    the pixels ``rgb`` (H, W, 3).
    """
    n, stains, flat = len(cells.first) - 1, tables.shape[2], rgb.ravel()
    found = np.empty((n, 3, stains, 4))
    of_stains = np.ascontiguousarray(tables.transpose(2, 0, 1))
    crossed = np.zeros((64, 64), np.uint8)
    pixels = np.empty((2, crossed.size), np.uintp)
    step, fetched = 3 * rgb.shape[1], 0
    for k in range(n):
        cell = cells.xy[cells.first[k] : cells.first[k + 1]]
        nucleus = nuclei.xy[nuclei.first[k] : nuclei.first[k + 1]]
        top, bottom, left, right = _window(cell, corner, rgb.shape)
        high, wide = max(bottom - top, 0), max(right - left, 0)
        if high > crossed.shape[0] or wide >= crossed.shape[1]:
            crossed = np.zeros((high + 64, wide + 64), np.uint8)
            pixels = np.empty((2, crossed.size), np.uintp)
        end = min((bottom + _AHEAD) * step, len(flat))
        pixels[0, 0] = _fetch(flat[fetched:end])  # unused, it would not be compiled
        fetched = max(fetched, end)
        origin, window = (top + corner[0], left + corner[1]), crossed[:high, : wide + 1]
        first = top * step + 3 * left
        _cross(cell, origin, _IN_CELL, window)
        _cross(nucleus, origin, _IN_NUCLEUS, window)
        inner, outer = _take_pixels(window, first, step, pixels)
        for stain in range(0, stains, 2):  # two at once: a sum has to wait for the last one
            other = min(stain + 1, stains - 1)
            nuclear = _sums(flat, pixels[0, :inner], of_stains[stain], of_stains[other])
            around = _sums(flat, pixels[1, :outer], of_stains[stain], of_stains[other])
            _summarise_all(inner, nuclear[0], outer, around[0], found[k, :, stain])
            _summarise_all(inner, nuclear[1], outer, around[1], found[k, :, other])
    return found.transpose(1, 2, 3, 0)


@compiled
def _fetch(flat: NDArray[np.uint8]) -> int:
    """Read pixels (P,), so that a core has them in its cache; the result has no meaning."""
    total = 0
    for place in range(0, len(flat), _FETCHED):
        total += flat[place]
    return total


@compiled
def _take_pixels(
    crossed: NDArray[np.uint8], first: int, step: int, pixels: Places
) -> tuple[int, int]:
    """Write the places of a nucleus, and of its cell around it, to ``pixels`` (2, P).

    Returns how many these are. ``crossed`` (H, W + 1) is what ``_cross`` marked, which becomes 0;
    ``first`` is the place of its first pixel, the next row is a ``step`` further.
    """
    inner = outer = 0
    for row in range(crossed.shape[0]):
        within, line, place = np.uint8(0), crossed[row], first + row * step
        for col in range(len(line) - 1):
            within ^= line[col]
            line[col] = 0
            # All are written, those wanted stay: a branch would be guessed wrong at each border.
            pixels[0, inner] = pixels[1, outer] = place + 3 * col
            inner += within >= _IN_NUCLEUS
            outer += within == _IN_CELL
        line[-1] = 0
    return inner, outer


@compiled
def _sums(
    flat: NDArray[np.uint8],
    pixels: Places,
    ones: NDArray[np.float32],
    others: NDArray[np.float32],
) -> tuple[_Sums, _Sums]:
    """The sums of the densities of two stains, by tables (3, 256) of each, over ``pixels`` (P,)."""
    total1, squares1, least1, most1 = 0.0, 0.0, np.inf, -np.inf
    total2, squares2, least2, most2 = 0.0, 0.0, np.inf, -np.inf
    for place in pixels:
        red, green, blue = flat[place], flat[place + _GREEN], flat[place + _BLUE]
        one = np.float64(ones[0, red] + ones[1, green] + ones[2, blue])  # of float32 would round
        other = np.float64(others[0, red] + others[1, green] + others[2, blue])
        total1, total2 = total1 + one, total2 + other
        squares1, squares2 = squares1 + one * one, squares2 + other * other
        least1, most1 = one if one < least1 else least1, one if one > most1 else most1
        least2, most2 = other if other < least2 else least2, other if other > most2 else most2
    return (total1, squares1, least1, most1), (total2, squares2, least2, most2)


@compiled
def _summarise_all(
    inner: int, nuclear: _Sums, outer: int, around: _Sums, found: NDArray[np.float64]
) -> None:
    """Summarise the pixels in a nucleus, those of its cell around it, and all of them: (3, 4)."""
    total, squares = nuclear[0] + around[0], nuclear[1] + around[1]
    least, most = min(nuclear[2], around[2]), max(nuclear[3], around[3])
    _summarise(inner, nuclear, found[0])
    _summarise(outer, around, found[1])
    _summarise(inner + outer, (total, squares, least, most), found[2])


@compiled
def _summarise(pixels: int, sums: _Sums, found: NDArray[np.float64]) -> None:
    """Write mean, standard deviation, minimum and maximum (4,) of some pixels; NaN of none."""
    if pixels == 0:
        found[:] = np.nan
        return
    total, squares, least, most = sums
    mean = total / pixels
    spread = max(squares - pixels * mean * mean, 0.0)
    found[0], found[1] = mean, np.sqrt(spread / max(pixels - 1, 1))  # of a sample
    found[2], found[3] = least, most


@compiled
def _window(
    ring: NDArray[np.float64], corner: tuple[int, int], shape: tuple[int, int, int]
) -> tuple[int, int, int, int]:
    """First and last rows and columns (exclusive) of a ring in pixels from a ``corner`` on."""
    if not len(ring):
        return 0, 0, 0, 0
    x0 = x1 = ring[0, 0]
    y0 = y1 = ring[0, 1]
    for point in range(1, len(ring)):
        x, y = ring[point, 0], ring[point, 1]
        x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
    row0, col0 = corner
    top, bottom = max(int(np.floor(y0)) - row0, 0), min(int(np.ceil(y1)) - row0, shape[0])
    left, right = max(int(np.floor(x0)) - col0, 0), min(int(np.ceil(x1)) - col0, shape[1])
    return top, bottom, left, right


@compiled
def _cross(
    ring: NDArray[np.float64], origin: tuple[int, int], mark: int, crossed: NDArray[np.uint8]
) -> None:
    """Mark before which pixels (H, W + 1) a closed ring crosses their row an odd number of times.

    By the pixels' centres; ``origin`` (row, column) is that of the first, ``mark`` a bit.
    """
    rows, cols = crossed.shape
    for point in range(len(ring) - 1):
        x0, y0 = ring[point, 0] - origin[1] - 0.5, ring[point, 1] - origin[0] - 0.5
        x1, y1 = ring[point + 1, 0] - origin[1] - 0.5, ring[point + 1, 1] - origin[0] - 0.5
        if y0 > y1:  # the same result whichever way a ring goes
            x0, y0, x1, y1 = x1, y1, x0, y0
        for row in range(max(int(np.ceil(y0)), 0), min(int(np.ceil(y1)), rows)):
            x = x0 + (row - y0) / (y1 - y0) * (x1 - x0)
            crossed[row, min(max(int(np.ceil(x)), 0), cols - 1)] ^= mark


class NuclearStain(NamedTuple):
    """Mean optical densities (N,) of labels: of red light, and of hematoxylin by QuPath's default
    vectors, whatever is measured.
    """

    red: NDArray[np.floating]
    share_of_red: NDArray[np.floating]  # in the density of red, green and blue together
    hematoxylin: NDArray[np.floating]
    is_ink: NDArray[np.bool_]  # green, cyan or red, as no stain of nuclei is
    is_blurred: NDArray[np.bool_]  # as pieces of a smear are that is far out of focus
    on_glass: NDArray[np.bool_]  # as membranes of fat cells are; False where it does not matter

    @classmethod
    def of(
        cls, labels: NDArray[np.int32], rgb: NDArray[np.uint8], mpp: float, config: SegmentConfig
    ) -> NuclearStain:
        """That of labels 1..N (H, W) in pixels (H, W, 3) of ``mpp`` µm."""
        count, runs = int(labels.max(initial=0)), runs_of(labels)
        red, green, blue = _mean_densities(runs, count, rgb, COLOUR_DENSITIES)
        hematoxylin = hematoxylin_density(red, green, blue)
        low, high = sorted((config.min_hematoxylin, config.min_hematoxylin_on_glass))
        matters = (hematoxylin >= low) & (hematoxylin < high)
        inks = (is_green_ink, is_cyan_ink, is_red_ink)
        return cls(
            red=red,
            share_of_red=red / np.maximum(red + green + blue, NO_LIGHT),
            hematoxylin=hematoxylin,
            is_ink=np.any([is_ink(red, green, blue) for is_ink in inks], axis=0),
            is_blurred=steepness(runs, count, rgb, mpp) < _LEAST_STEEPNESS * red,
            on_glass=glass_around(runs, matters, rgb, mpp) > config.max_glass,
        )

    def is_enough(self, config: SegmentConfig, has_brown: bool) -> NDArray[np.bool_]:
        """(N,) which may be nuclei: those with hematoxylin, on glass more of it.

        On slides that have a brown chromogen, brown nuclei have none.
        """
        least = np.where(self.on_glass, config.min_hematoxylin_on_glass, config.min_hematoxylin)
        enough = has_brown | (self.hematoxylin >= least)
        return np.asarray(~self.is_ink & ~self.is_blurred & enough)


@compiled
def runs_of(labels: NDArray[np.int32]) -> Runs:
    """The runs of pixels of one label in the rows of labels (H, W), row by row."""
    rows, cols = labels.shape
    size = rows
    for row in range(rows):
        for col in range(1, cols):
            size += labels[row, col] != labels[row, col - 1]
    runs, ends, found = np.empty((size, 4), np.int32), np.empty(cols + 1, np.int32), 0
    for row in range(rows):
        count = 0
        for col in range(1, cols):
            ends[count] = col  # without a branch, which would be guessed wrong
            count += labels[row, col] != labels[row, col - 1]
        ends[count] = cols
        begin = 0
        for end in ends[: count + 1]:
            label = labels[row, begin]
            runs[found, 0], runs[found, 1], runs[found, 2], runs[found, 3] = label, row, begin, end
            found += label > 0
            begin = end
    return runs[:found]


def steepness(runs: Runs, n: int, rgb: NDArray[np.uint8], mpp: float) -> NDArray[np.float64]:
    """The mean gradient (n,) of the optical density of red light in labels 1..n, per µm.

    ``rgb`` (H, W, 3) has pixels of ``mpp`` µm. It is taken towards the next row and column, at the
    edge of a label from what is around it. Labels without pixels have 0.
    """
    return _mean_gradients(runs, n, rgb[..., 0], COLOUR_DENSITIES) / mpp


@compiled
def _mean_gradients(
    runs: Runs, n: int, levels: NDArray[np.uint8], density: NDArray[np.float32]
) -> NDArray[np.float64]:
    """The mean gradient (n,) in labels 1..n of the ``density`` (256,) of ``levels`` (H, W), per
    pixel."""
    rows, cols = levels.shape
    count, total = np.zeros(n + 1), np.zeros(n + 1)
    for label, row, begin, end in runs:
        below, of_label = min(row + 1, rows - 1), total[label]
        for col in range(begin, end):
            here = density[levels[row, col]]
            down = density[levels[below, col]] - here
            right = density[levels[row, min(col + 1, cols - 1)]] - here
            of_label += np.sqrt(down * down + right * right)
        total[label] = of_label
        count[label] += end - begin
    return total[1:] / np.maximum(count[1:], 1)


def glass_around(
    runs: Runs, wanted: NDArray[np.bool_], rgb: NDArray[np.uint8], mpp: float
) -> NDArray[np.float64]:
    """The mean fraction (N,) of glass in the squares of 8 µm around the pixels of labels 1..N.

    ``rgb`` (H, W, 3) is mirrored at the border. Labels that are not ``wanted`` (N,) have 0, as
    those without pixels.
    """
    half = round(_AROUND_UM / 2 / mpp)
    padded = np.pad(_is_glass(rgb), half, mode="symmetric")
    return _mean_squares(runs, np.append(False, wanted), padded, 2 * half + 1)


@compiled
def _is_glass(rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Whether pixels (H, W, 3) let nearly all light through: (H, W)."""
    glass = np.empty(rgb.shape[:2], np.bool_)
    for row in range(rgb.shape[0]):
        for col in range(rgb.shape[1]):
            light = np.int32(rgb[row, col, 0]) + rgb[row, col, 1] + rgb[row, col, 2]
            glass[row, col] = light > 3 * _GLASS
    return glass


@compiled
def _mean_squares(
    runs: Runs, wanted: NDArray[np.bool_], padded: NDArray[np.bool_], side: int
) -> NDArray[np.float64]:
    """The mean (N,) of a mask in the squares around the pixels of labels 1..N.

    Of those ``wanted`` (N + 1,); 0 of others. The mask is ``padded`` by half a square, less half a
    pixel, on each side.
    """
    count, total = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), np.int64)
    columns = np.zeros(padded.shape[1], np.int32)  # sums of those of the squares of a run
    for label, row, begin, end in runs:
        if not wanted[label]:
            continue
        pixels, wide = end - begin, end - begin + side - 1
        for across in range(row, row + side):
            for k in range(wide):
                columns[k] += padded[across, begin + k]
        for k in range(wide):
            total[label] += columns[k] * min(k + 1, wide - k, side, pixels)  # in so many squares
            columns[k] = 0
        count[label] += pixels
    mean: NDArray[np.float64] = total[1:] / np.maximum(count[1:] * side**2, 1)
    return mean


@compiled
def _mean_densities(
    runs: Runs, n: int, rgb: NDArray[np.uint8], density: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Mean optical density of red, green and blue (3, n) in labels 1..n; 0 without pixels.

    ``rgb`` (H, W, 3) are the pixels, ``density`` (256,) that of each level.
    """
    count, total = np.zeros(n + 1), np.zeros((3, n + 1))
    for label, row, begin, end in runs:
        red, green, blue = total[0, label], total[1, label], total[2, label]
        for col in range(begin, end):
            red += density[rgb[row, col, 0]]
            green += density[rgb[row, col, 1]]
            blue += density[rgb[row, col, 2]]
        total[0, label], total[1, label], total[2, label] = red, green, blue
        count[label] += end - begin
    return total[:, 1:] / np.maximum(count[1:], 1)


@compiled
def counts(runs: Runs, n: int) -> NDArray[np.int64]:
    """The number of pixels (n,) of labels 1..n."""
    count = np.zeros(n + 1, np.int64)
    for label, _, begin, end in runs:
        count[label] += end - begin
    return count[1:]


@compiled
def means(runs: Runs, n: int, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean (n,) of the values (H, W) in labels 1..n; 0 for a label without pixels."""
    total = np.zeros(n + 1)
    for label, row, begin, end in runs:
        of_label = total[label]
        for col in range(begin, end):
            of_label += values[row, col]
        total[label] = of_label
    return total[1:] / np.maximum(counts(runs, n), 1)


@compiled
def maxima(runs: Runs, n: int, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Largest (n,) of the values (H, W) in labels 1..n; 0 for a label without pixels."""
    largest = np.zeros(n + 1)
    for label, row, begin, end in runs:
        of_label = largest[label]
        for col in range(begin, end):
            of_label = values[row, col] if values[row, col] > of_label else of_label
        largest[label] = of_label
    return largest[1:]


@compiled
def _statistics(
    runs: Runs, n: int, rgb: NDArray[np.uint8], tables: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Mean, standard deviation, minimum and maximum of S stains in labels 1..n: (S, 4, n).

    ``rgb`` (H, W, 3) are pixels; ``tables`` (3, 256, S) those of ``density_tables``.
    """
    count, found = counts(runs, n), np.zeros((tables.shape[2], n, 4))
    found[:, :, 2], found[:, :, 3] = np.inf, -np.inf
    for stain in range(len(found)):
        of_stain = np.ascontiguousarray(tables[:, :, stain])
        for deviating in (False, True):
            for label, row, begin, end in runs:
                mean, squares, least, most = found[stain, label - 1]
                for col in range(begin, end):
                    red, green, blue = rgb[row, col]
                    value = of_stain[0, red] + of_stain[1, green] + of_stain[2, blue]
                    if deviating:
                        squares += (value - mean) ** 2
                    else:
                        mean += value
                        least = value if value < least else least
                        most = value if value > most else most
                of_label = found[stain, label - 1]
                of_label[0], of_label[1], of_label[2], of_label[3] = mean, squares, least, most
            for label in range(n):
                if deviating:  # of a sample, as in QuPath
                    spread = found[stain, label, 1] / max(count[label] - 1, 1)
                    found[stain, label, 1] = np.sqrt(spread)
                else:
                    found[stain, label, 0] /= max(count[label], 1)
    return found.transpose(0, 2, 1)


def shape_measurements(polygons_um: Polygons) -> dict[str, NDArray[np.float64]]:
    """Size and shape of polygons in µm, named and defined as in QuPath."""
    return _shapes(rings_of(polygons_um))


def _shapes(rings_um: Rings) -> dict[str, NDArray[np.float64]]:
    """As ``shape_measurements``, of contours; of an empty one, as a line of pixels hardly above the
    threshold has, circularity and solidity are 0."""
    area, length, hulls = areas_of(rings_um), lengths_of(rings_um), hulls_of(rings_um)
    return {
        "Area µm^2": area,
        "Length µm": length,
        "Circularity": _ratio(4 * np.pi * area, length**2),
        "Solidity": _ratio(area, areas_of(hulls)),
        "Max diameter µm": 2 * _bounding_radii(hulls.xy, hulls.first),
        "Min diameter µm": _min_widths(hulls.xy, hulls.first),
    }


def _ratio(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    """Parts (N,) of wholes (N,): 0 of nothing."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


@compiled
def _bounding_radii(xy: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Radius (N,) of the smallest enclosing circle of the points ``xy[first[i] : first[i + 1]]``.

    Points are added one by one: one that is outside the circle so far lies on the new one (E.
    Welzl, Smallest enclosing disks, 1991). QuPath's maximum diameter is twice that radius.
    """
    radii = np.empty(len(first) - 1)
    for i in range(len(radii)):
        points = xy[first[i] : first[i + 1]]
        x, y, square = 0.0, 0.0, -1.0  # no circle yet
        for a in range(len(points)):
            if _inside(points[a], x, y, square):
                continue
            x, y, square = points[a, 0], points[a, 1], 0.0
            for b in range(a):
                if _inside(points[b], x, y, square):
                    continue
                x, y, square = _through_two(points[a], points[b])
                for c in range(b):
                    if not _inside(points[c], x, y, square):
                        x, y, square = _through_three(points[a], points[b], points[c])
        radii[i] = np.sqrt(max(square, 0.0))
    return radii


@compiled
def _inside(point: NDArray[np.float64], x: float, y: float, square: float) -> bool:
    """Whether a point (2,) is in the circle around (x, y), up to rounding."""
    return bool((point[0] - x) ** 2 + (point[1] - y) ** 2 <= square * (1 + 1e-12))


@compiled
def _through_two(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float, float]:
    """Centre (x, y) and squared radius of the smallest circle through two points (2,)."""
    x, y = (a[0] + b[0]) / 2, (a[1] + b[1]) / 2
    return x, y, (a[0] - x) ** 2 + (a[1] - y) ** 2


@compiled
def _through_three(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64]
) -> tuple[float, float, float]:
    """Centre (x, y) and squared radius of the circle through three points (2,)."""
    bx, by, cx, cy = b[0] - a[0], b[1] - a[1], c[0] - a[0], c[1] - a[1]
    twice = 2 * (bx * cy - by * cx)
    if twice == 0:  # on a line, where two of them are enough
        return _through_two(a, b)
    b2, c2 = bx**2 + by**2, cx**2 + cy**2
    x, y = (cy * b2 - by * c2) / twice, (bx * c2 - cx * b2) / twice
    return a[0] + x, a[1] + y, x**2 + y**2


@compiled
def _min_widths(xy: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Minimum width (N,) of the closed convex rings ``xy[first[i] : first[i + 1]]``.

    The minimum over the edges of the distance to the farthest point: as JTS's ``MinimumDiameter``,
    which QuPath calls the minimum diameter. The farthest point goes around with the edge (M.
    Shamos, Computational geometry, 1978).
    """
    width = np.full(len(first) - 1, np.inf)
    for hull in range(len(width)):
        begin, size = first[hull], first[hull + 1] - first[hull] - 1
        far = 0
        for k in range(begin, begin + size):
            x0, y0 = xy[k, 0], xy[k, 1]
            x, y = xy[k + 1, 0] - x0, xy[k + 1, 1] - y0
            farthest = abs(x * (xy[begin + far, 1] - y0) - y * (xy[begin + far, 0] - x0))
            for _ in range(size):
                beyond = far + 1 if far + 1 < size else 0
                distance = abs(x * (xy[begin + beyond, 1] - y0) - y * (xy[begin + beyond, 0] - x0))
                if distance < farthest:
                    break
                far, farthest = beyond, distance
            width[hull] = min(width[hull], farthest / np.sqrt(x * x + y * y))
    return width
