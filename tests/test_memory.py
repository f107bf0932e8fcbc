import platform
import subprocess
import sys

import psutil
import pytest

from patchcl_qupath import memory

# What it prints: the pages that the system cleared, of eight times four arrays of 16 MB.
PAGES = """
import resource
import numpy as np
from patchcl_qupath import memory
from patchcl_qupath.execution.workers import set_environment
{keep}
pages = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.empty(2**24, np.uint8) for _ in range(4)]
    for array in arrays:
        array[::4096] = 1
    del array, arrays
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*pages)
"""


def pages(code):
    return [int(n) for n in subprocess.check_output([sys.executable, "-c", code]).split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so")
@pytest.mark.parametrize("keep", ["memory.keep_freed()", "set_environment()"])
def test_memory_that_is_freed_is_used_again(keep):
    """numpy asks for huge pages, of 512 each, where the system has them."""
    first, *others = pages(PAGES.format(keep=keep))
    assert first >= 32
    assert max(others) < 8
    assert min(pages(PAGES.format(keep=""))) >= 32


def test_nothing_happens_on_other_systems(monkeypatch):
    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(memory.ctypes, "CDLL", None)  # it is not called
        memory.keep_freed()


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/", {"memory.max": "2000"}, 2000),  # in a container
        ("0::/", {"memory.max": "max"}, None),
        ("0::/job/step", {"job/memory.max": "3000", "job/step/memory.max": "max"}, 3000),  # SLURM
        ("3:cpu:/a\n2:memory:/", {"memory/memory.limit_in_bytes": "4000"}, 4000),
        ("2:memory:/docker/12", {"memory/memory.limit_in_bytes": "5000"}, 5000),  # its name outside
        ("2:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("", {}, None),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="no such groups")
def test_memory_of_a_container_or_a_job(tmp_path, monkeypatch, own, files, limit):
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_limits_of_process", list)
    assert memory.memory_limit() == (limit or psutil.virtual_memory().total)


@pytest.mark.skipif(sys.platform == "win32", reason="no ulimit")
def test_memory_that_a_shell_allows():
    code = "from patchcl_qupath.memory import memory_limit; print(memory_limit())"
    limited = ["sh", "-c", 'ulimit -v 1000000 && exec "$0" -c "$1"', sys.executable, code]
    assert int(subprocess.check_output(limited)) == 1_024_000_000
