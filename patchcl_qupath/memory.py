"""Memory that is freed and asked for again, at each step of a training and for each tile."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Bytes of an array that is kept; before 2.35, glibc refuses more than the second.
_LARGEST = (2**30, 2**25)
_MOST = 2**31 - 1  # bytes that are kept


def keep_freed() -> None:
    """Let this process keep the memory of arrays that it frees, rather than give it back.

    glibc gives back arrays of more than 32 MB, and what is free at the end of its heap. Asked for
    again, each page is cleared first: a tenth of the time of a training, and up to half a second of
    a core for 25 mm² whose cells grow. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return
    if any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST):
        mallopt(_TRIM_THRESHOLD, _MOST)
