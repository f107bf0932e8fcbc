"""How long stages take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

Seconds = dict[str, float]  # by stage


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    """Note how long the block took."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
