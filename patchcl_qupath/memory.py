"""Memory that is freed and asked for again, as a training does at each step."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST = 2**30  # bytes of an array that is kept


def keep_freed() -> None:
    """Let this process keep the memory of arrays that it frees, rather than give it back.

    glibc gives back arrays of more than 32 MB, and what is free at the end of its heap. Asked for
    again, each page is cleared first: a tenth of the time of a training. Elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, 2 * _LARGEST - 1)
