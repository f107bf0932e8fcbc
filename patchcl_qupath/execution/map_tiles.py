"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run resumes.

Workers hand their nuclei back as bytes, some 100 kB a tile, and the run alone writes: workers need
to see the slides, not the project, and a worker that dies leaves nothing half-written.
"""

from __future__ import annotations

import logging
import pickle
import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from patchcl_qupath import logs
from patchcl_qupath.datatypes import Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.errors import ImageError
from patchcl_qupath.execution.admission import Admission, NotHeldError, held
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import (
    ATTEMPTS,
    WORKER_DIED,
    Workers,
    fetched,
    scheduler_gone,
    set_environment,
)
from patchcl_qupath.storage.parquet import Table
from patchcl_qupath.timing import Seconds, add_seconds, timed

logger = logging.getLogger(__name__)

Context = TypeVar("Context")
TileTask = Callable[[Context, Any], tuple[Nuclei | Table, UncertaintyGrid, Seconds]]

_AHEAD = 3  # tiles for each worker thread: enough to keep it busy, few to keep memory flat


def map_tiles(
    *,
    workers: Workers,
    task: TileTask[Context],
    context: Context,
    tiles: Sequence[Tile],
    store: TileStore,
    on_done: Callable[[], None],
    on_failed: Callable[[Tile, Exception], None],
    on_few: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
    prepared: Callable[[Tile], Any] = lambda tile: tile,
) -> Seconds:
    """Run ``task(context, prepared(tile))`` for each tile, and store the nuclei that it returns.

    What is ``prepared`` goes to the workers; it has the ``name`` of the tile.
    Returns the seconds of all workers, by stage. ``on_done`` is called after each tile;
    ``on_failed`` in its place for one that failed ``ATTEMPTS`` times, with the last error. What
    they raise ends the map; finished tiles stay. ``on_few`` is called, again and again, once there
    is no more than one tile for each thread: tiles of another map can follow. ``check`` is called
    on each worker of another machine, and raises PatchCLError where that one cannot segment the
    tiles.

    Raises ImageError if the scheduler goes away, or where no worker is left that can segment them;
    ConfigError where no jobs can be had any more.
    """
    from distributed.client import ClosedClientError

    packed = zlib.compress(pickle.dumps((task, context)), level=1)
    make = partial(_Shared, packed, logs.level_shown())
    total: Seconds = {}
    queue = _TileQueue(
        admission=Admission(workers=workers, check=check, make=make),
        waiting=deque(tiles),
        prepared=prepared,
        priority=workers.next_turn(),
    )
    try:
        while not queue.is_empty:
            workers.poll()
            for tile, result in queue.advance():
                match result:
                    case Exception() as error:
                        logger.info("tile %s failed %d times: %s", tile.name, ATTEMPTS, error)
                        on_failed(tile, error)
                    case content, seconds:
                        with timed(seconds, "store"):
                            store.write(tile, content)
                        add_seconds(total, seconds)
                        on_done()
            if queue.are_few:
                on_few()
    except (OSError, ClosedClientError) as error:  # of Dask: those of writing have become ours
        raise scheduler_gone() from error
    finally:
        queue.cancel()
    return total


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A tile that was given to a ``crew`` of workers, by address."""

    tile: Tile
    crew: frozenset[str]


@dataclass(kw_only=True)
class _TileQueue:
    """The tiles that are not finished: those that are waiting, and those that workers have."""

    admission: Admission
    waiting: deque[Tile]
    prepared: Callable[[Tile], Any]
    priority: int
    _given: dict[Any, _Given] = field(default_factory=dict)  # by future
    _running: Any = None  # as_completed of the futures
    _failed: list[tuple[_Given, Exception]] = field(default_factory=list)
    _losses: Counter[str] = field(default_factory=Counter)  # by tile, of whole crews

    def __post_init__(self) -> None:
        from distributed import as_completed

        self._running = as_completed(loop=self._client.loop)

    @property
    def is_empty(self) -> bool:
        """Whether all is done."""
        return not (self.waiting or self._given or self._failed)

    @property
    def are_few(self) -> bool:
        """Whether a worker would have nothing to do once it has done its tile."""
        return not self.waiting and len(self._given) <= sum(self.admission.admitted.values())

    @property
    def _client(self) -> Any:
        return self.admission.workers.client

    def advance(self) -> Iterator[tuple[Tile, Any]]:
        """Give tiles to workers, wait for a moment, and yield tiles that are done or given up.

        Each comes with what ``_do`` returned for it, or with an error.
        """
        self.admission.update()
        crew = frozenset(self.admission.admitted)
        yield from self._judge_failed()
        yield from self._recover(crew)
        if crew:
            self._give(crew)
        yield from self._take()

    def cancel(self) -> None:
        """Have workers forget what they were given."""
        self._client.cancel([*self._given])

    def _recover(self, crew: frozenset[str]) -> Iterator[tuple[Tile, Any]]:
        """Take back tiles none of whose workers is left. Yields those that were lost too often."""
        lost = [future for future, given in self._given.items() if not given.crew & crew]
        if lost and crew:
            self._client.cancel(lost)
            for future in lost:
                yield from self._take_back(self._given.pop(future).tile)

    def _take_back(self, tile: Tile) -> Iterator[tuple[Tile, Any]]:
        """Have a tile wait again. Yields it where that has happened too often."""
        logger.info("tile %s was lost, and is given to others", tile.name)
        self._losses[tile.name] += 1
        if self._losses[tile.name] == ATTEMPTS:
            yield tile, ImageError(WORKER_DIED)
        else:
            self.waiting.appendleft(tile)

    def _give(self, crew: frozenset[str]) -> None:
        """Give workers as many of the waiting tiles as keep them busy."""
        wanted = _AHEAD * sum(self.admission.admitted.values()) - len(self._given)
        for _ in range(min(wanted, len(self.waiting))):
            tile = self.waiting.popleft()
            future = self._client.submit(
                _do,
                self.admission.name,
                self.prepared(tile),
                pure=False,
                priority=self.priority,
                retries=ATTEMPTS - 1,
                workers=[*crew],
            )
            self._await(future, _Given(tile=tile, crew=crew))

    def _await(self, future: Any, given: _Given) -> None:
        self._given[future] = given
        self._running.add(future)

    def _take(self) -> Iterator[tuple[Tile, Any]]:
        """Take what workers have done."""
        for future in _ready(self._running, 0.01 if self.admission.is_pending else 0.1):
            if future not in self._given:  # it was taken back
                continue
            given = self._given.pop(future)
            match _outcome(future):
                case None:
                    logger.info("tile %s was lost with its worker", given.tile.name)
                    self._await(future, given)  # another worker makes it again
                case NotHeldError() as error:
                    self.admission.dismiss(error.address)
                    yield from self._take_back(given.tile)
                case Exception() as error:
                    self.admission.ask_again()
                    self._failed.append((given, error))
                case result:
                    yield given.tile, result

    def _judge_failed(self) -> Iterator[tuple[Tile, Any]]:
        """Give up tiles that failed, once it is known that this was not due to their workers."""
        if self._failed and not self.admission.is_pending:
            failed, self._failed = self._failed, []
            for given, error in failed:
                if given.crew & self.admission.refused.keys():
                    self.waiting.appendleft(given.tile)
                else:
                    yield given.tile, error


def _ready(running: Any, patience_s: float) -> Any:
    """The futures that ended by now; waits for a moment if there are none."""
    if not running.has_ready():
        with running.thread_condition:
            running.thread_condition.wait(timeout=patience_s)  # as dask does
    return running.next_batch(block=False)


def _outcome(future: Any) -> tuple[bytes, Seconds] | Exception | None:
    """What ``_do`` returned, or why the tile failed; None if it was lost with its worker.

    Raises ImageError where the scheduler is gone.
    """
    from distributed import KilledWorker

    found: tuple[bytes, Seconds] | Exception | None = fetched(future)
    return ImageError(WORKER_DIED) if isinstance(found, KilledWorker) else found


class _Shared:
    """The task and the context of all tiles, unpacked once in each process that works on some.

    To unpack them imports torch. The process is set up before that, whoever started it.
    """

    def __init__(self, packed: bytes, log_level: int | None) -> None:
        self._packed = packed
        self._log_level = log_level
        self._lock = threading.Lock()
        self._unpacked: tuple[Any, Any] | None = None

    def __reduce__(self) -> Any:
        return _Shared, (self._packed, self._log_level)

    def unpack(self) -> tuple[Any, Any]:
        """(task, context)."""
        with self._lock:
            if self._unpacked is None:
                set_environment()
                if self._log_level not in (None, logs.level_shown()):
                    logs.show_logs(self._log_level)
                self._unpacked = pickle.loads(zlib.decompress(self._packed))
            return self._unpacked


def _do(name: str, tile: Any) -> tuple[bytes, Seconds]:
    """Work on a tile, on a worker that an Admission of that ``name`` admitted."""
    try:
        shared: _Shared = held(name)
        task, context = shared.unpack()
        nuclei, uncertainty, seconds = task(context, tile)
        with timed(seconds, "encode"):
            content = TileStore.encode(nuclei, uncertainty)
    except Exception:
        logger.info("an attempt at tile %s failed", tile.name, exc_info=True)
        raise
    logger.debug("tile %s: %d nuclei", tile.name, len(nuclei))
    return content, seconds
