"""Compiled loops: cached where that is possible, and equal to plain Python."""

import numpy as np
from numba.core import caching

from patchcl_qupath.compiled import compiled, take


def total(values):
    result = 0.0
    for value in values:
        result += value
    return result


def test_loops_are_compiled_where_no_cache_can_be_written(monkeypatch):
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    assert compiled(total)(np.array([1.0, 2.5])) == 3.5


def test_floating_point_is_that_of_the_source():
    values = np.random.default_rng(0).standard_normal(1000)
    assert compiled(total)(values) == total(values)  # to the bit: sums are in the same order


def test_take_is_indexing():
    labels = np.random.default_rng(0).integers(0, 9, (40, 50)).astype(np.int32)
    for values in (np.arange(9) ** 2, np.arange(9) % 2 == 0):
        assert np.array_equal(take(values, labels), values[labels])
        assert take(values, labels).dtype == values.dtype
