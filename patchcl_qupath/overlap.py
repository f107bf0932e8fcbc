"""Calls for one item after the other, of which several are under way at once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from patchcl_qupath.errors import ConfigError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

_PATIENCE_S = 0.2  # between looks: on Windows, Ctrl-C waits for as long


@contextmanager
def reading_dask_settings() -> Iterator[None]:
    """Raise ConfigError where Dask, which reads its settings as it is imported, cannot do so."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:  # of the reader of YAML, or for a value of any kind
        raise ConfigError(
            f"Dask's settings cannot be read ({one_line(error)}): correct the file that is named, "
            "or those in ~/.config/dask"
        ) from error


def usable_cores() -> int:
    """How many cores this process may use: a job or a container has some of the machine's.

    Threads that share them would each need memory, of which a job has a share, too. Raises
    ConfigError for settings of Dask that cannot be read.
    """
    with reading_dask_settings():
        from dask.system import cpu_count

    return cpu_count() or 1


class StoppedError(Exception):
    """Nobody waits for the result of this call any more."""


class Stop:
    """Has calls that are under way end: those that look at it raise StoppedError once it is set."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def clear(self) -> None:
        """Begin anew."""
        self._event.clear()

    def set(self) -> None:
        """From now on, ``check`` raises."""
        self._event.set()

    def check(self) -> None:
        """Raise StoppedError if it is set."""
        if self._event.is_set():
            raise StoppedError


class Turn:
    """Something that overlapping calls do one after the other, in their order."""

    def __init__(self, before: Turn | None = None) -> None:
        self._before = before
        self._is_over = threading.Event()

    def wait(self, stop: Stop) -> None:
        """Wait for all turns before to be over. Raises StoppedError."""
        while self._before is not None:
            while not self._before._is_over.wait(_PATIENCE_S):
                stop.check()
            self._before = self._before._before  # that one may be over without having waited

    def pass_on(self) -> None:
        """It is over; the next one may begin once those before it are over, too."""
        self._is_over.set()


def turns(count: int) -> list[Turn]:
    """Turns in their order."""
    made = [Turn()]
    while len(made) < count:
        made.append(Turn(made[-1]))
    return made[:count]


def overlapped(
    call: Callable[[Item], Result], items: Sequence[Item], at_once: int, stop: Stop
) -> Iterator[Future[Result]]:
    """The finished futures of ``call(item)``, in the order of the items.

    Up to ``at_once`` calls are under way, each in a thread; a single one is made in this thread.
    Where the caller ends before the last one, by an error or Ctrl-C, ``stop`` is set, and calls
    that are under way are waited for.
    """
    if at_once == 1:
        for item in items:
            yield _finished(call, item)
        return
    waiting, running = deque(items), deque[Future[Result]]()
    with ThreadPoolExecutor(at_once, "overlapped") as threads:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append(threads.submit(call, waiting.popleft()))
                while not running[0].done():
                    wait([running[0]], timeout=_PATIENCE_S)
                yield running.popleft()
        finally:
            if waiting or running:
                stop.set()
            for future in running:
                future.cancel()


@contextmanager
def meanwhile(call: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """A call that is made in a thread while the block runs, and has ended when the block has.

    Raises the error of the block or, where it has none, that of the call.
    """
    with ThreadPoolExecutor(1, "meanwhile") as thread:
        made = thread.submit(call, *arguments)
        yield
        made.result()


def mapped(call: Callable[..., Result], *items: Sequence[Any]) -> Iterator[Result]:
    """``map``, in order, with as many calls under way as there are usable cores.

    That pays for calls that spend their time in compiled code, which releases Python's lock.
    """
    calls = [*zip(*items, strict=True)]
    at_once = max(1, min(len(calls), usable_cores()))
    for done in overlapped(lambda each: call(*each), calls, at_once, Stop()):
        yield done.result()


def _finished(call: Callable[[Item], Result], item: Item) -> Future[Result]:
    """The future of a call that is made here and now."""
    future: Future[Result] = Future()
    try:
        future.set_result(call(item))
    except Exception as error:
        future.set_exception(error)
    return future
