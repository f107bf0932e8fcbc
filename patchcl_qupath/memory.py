"""How much memory there is; and what is freed and asked for again, at each step of a training and
for each tile."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
# Bytes of an array that is kept; before 2.35, glibc refuses more than the second.
_LARGEST = (2**30, 2**25)
_MOST = 2**31 - 1  # bytes that are kept

_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def memory_limit() -> int:
    """How many bytes this process may use: a container or a job may have less than the machine."""
    import psutil

    total: int = psutil.virtual_memory().total
    return min([total, *_limits_of_groups(), *_limits_of_process()])


def _limits_of_groups() -> Iterator[int]:
    """The limits of the control groups of Linux that this process is in, of either version.

    A container may see its own group as the root, under the name that it has outside.
    """
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if not controllers:
                root, name = _GROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                root, name = _GROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            inner = Path(group.strip("/"))
            for folder in (inner, *inner.parents):
                with suppress(OSError, ValueError):  # not there, or "max"
                    yield int((root / folder / name).read_text(encoding="ascii"))


def _limits_of_process() -> Iterator[int]:
    """The limits that a shell or a job queue sets, by ``ulimit``."""
    if sys.platform != "win32":
        import resource

        for kind in (resource.RLIMIT_AS, resource.RLIMIT_RSS):
            limit, _ = resource.getrlimit(kind)
            if limit != resource.RLIM_INFINITY:
                yield limit


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
