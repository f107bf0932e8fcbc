"""What time it is, and how long stages take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

Seconds = dict[str, float]  # by stage


def utc_now() -> str:
    """The time, UTC in ISO 8601, to the second: later ones sort after earlier ones."""
    return datetime.now(UTC).isoformat(timespec="seconds")


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
