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


def add_seconds(total: Seconds, more: Seconds) -> None:
    """Add ``more`` to ``total``, stage by stage."""
    for stage in more:
        total[stage] = total.get(stage, 0.0) + more[stage]
