"""Compiled loops: cached where that is possible, and equal to plain Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
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


USE = """
import numpy as np
from patchcl_qupath.compiled import take
print(take(np.arange(3) ** 2, np.array([[2, 1]], dtype=np.int32)).tolist())
print(*{type(take._cache).__name__: 0}, sum(take.stats.cache_hits.values()))
"""


def use_take(cache):
    """What a new process prints that uses a loop, with its cache in that folder."""
    return subprocess.check_output(
        [sys.executable, "-c", USE],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        text=True,
        stderr=subprocess.STDOUT,
    )


def damage(file, kind):
    content = file.read_bytes()
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2]}[kind])


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with one loop in it."""
    folder = tmp_path_factory.mktemp("cache")
    assert use_take(folder) == "[[4, 1]]\n_Cache 0\n"
    return folder


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".nbi", "empty"), (".nbi", "half"), (".nbc", "half")]
)
def test_a_damaged_cache_is_written_anew(tmp_path, filled, suffix, kind):
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (file,) = tmp_path.rglob(f"*take-*{suffix}")
    damage(file, kind)
    assert use_take(tmp_path) == "[[4, 1]]\n_Cache 0\n"  # compiled again
    assert use_take(tmp_path) == "[[4, 1]]\n_Cache 1\n"  # from the cache


def test_a_folder_instead_of_a_file_of_the_cache(tmp_path, filled):
    """As root, no permission is missing; so what cannot be written to is a folder."""
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    for file in [*tmp_path.rglob("*take-*.nb?")]:
        file.unlink()
        file.mkdir()
    assert use_take(tmp_path) == "[[4, 1]]\n_Cache 0\n"


def test_a_cache_that_is_a_file(tmp_path):
    (tmp_path / "cache").touch()
    assert use_take(tmp_path / "cache").startswith("[[4, 1]]\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_for_the_cache(tmp_path):
    """The file of the index and those of the code lead to a device that is always full."""
    full = "import builtins, errno\nbefore = builtins.open\n"
    full += "def full(path, mode='r', *more, **options):\n"
    full += "    if '.tmp.' in str(path): path = '/dev/full'\n"
    full += "    return before(path, mode, *more, **options)\nbuiltins.open = full\n"
    shown = subprocess.check_output(
        [sys.executable, "-c", full + USE],
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
        text=True,
        stderr=subprocess.STDOUT,
    )
    assert shown == "[[4, 1]]\n_Cache 0\n"
    assert not [*tmp_path.rglob("*.nb?")]
