import platform
import subprocess
import sys

import pytest

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
    from patchcl_qupath import memory

    for system in ("win32", "darwin"):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(memory.ctypes, "CDLL", None)  # it is not called
        memory.keep_freed()
