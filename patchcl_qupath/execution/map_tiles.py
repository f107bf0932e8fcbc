"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run resumes.

Workers hand their nuclei back as bytes, some 100 kB a tile, and the run alone writes: workers need
to see the slides, not the project, and a worker that dies leaves nothing half-written.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

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

_STILL_S = 120.0  # without an answer of a worker, after which it is seen whether they work at all
_AHEAD = 3  # tiles for each worker thread: enough to keep it busy, few to keep memory flat


@dataclass(frozen=True, kw_only=True)
class TileWork(Generic[Context]):
    """A task for tiles of an image: ``task(context, prepared(tile))``, whose nuclei are stored.

    ``tiles`` are those that can begin at once. What is ``prepared`` goes to the workers; it has the
    ``name`` of the tile. ``on_done`` is called after each tile; ``on_failed`` in its place for one
    that failed ``ATTEMPTS`` times, with the last error. What they raise ends the map; finished
    tiles stay. After that, ``then`` names the tiles with which the next work can begin.
    """

    task: TileTask[Context]
    context: Context
    tiles: Sequence[Tile]
    store: TileStore
    on_done: Callable[[Tile], None]
    on_failed: Callable[[Tile, Exception], None]
    prepared: Callable[[Tile], Any] = lambda tile: tile
    then: Callable[[Tile], Sequence[Tile]] = lambda tile: ()


def map_tiles(
    *works: TileWork[Any],
    workers: Workers,
    on_few: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
    before_storing: Callable[[], None] = lambda: None,
) -> Seconds:
    """Do each work, the later ones for tiles that those before them name.

    Returns the seconds of all workers, by stage. ``on_few`` is called, again and again, once there
    is no more than one tile for each thread: tiles of another map can follow. ``check`` is called
    on each worker of another machine, and raises PatchCLError where that one cannot work on the
    tiles. ``before_storing`` is called before each tile is stored; what it raises ends the map.

    Raises ImageError if the scheduler goes away, or where no worker can work on them any more;
    ConfigError where no jobs can be had any more.
    """
    shared = [(work.task, work.context) for work in works]
    packed = zlib.compress(pickle.dumps(shared), level=1)
    make = partial(_Shared, packed, logs.level_shown())
    total: Seconds = {}
    queue = _TileQueue(
        admission=Admission(workers=workers, check=check, make=make),
        works=works,
        waiting=[deque(work.tiles) for work in works],
        priority=workers.next_turn(),
    )
    try:
        while not queue.is_empty:
            workers.poll()
            for n, tile, result in queue.advance():
                match result:
                    case Exception() as error:
                        logger.info("tile %s failed %d times: %s", tile.name, ATTEMPTS, error)
                        works[n].on_failed(tile, error)
                    case content, seconds:
                        before_storing()
                        with timed(seconds, "store"):
                            works[n].store.write(tile, content)
                        add_seconds(total, seconds)
                        works[n].on_done(tile)
                if following := works[n].then(tile):
                    queue.waiting[n + 1].extend(following)
            if queue.are_few:
                on_few()
    finally:
        queue.cancel()
    return total


@dataclass(frozen=True, kw_only=True)
class _Given:
    """A tile that was given to a ``crew`` of workers, by address, for the n-th ``work``."""

    work: int
    tile: Tile
    crew: frozenset[str]


@dataclass(kw_only=True)
class _TileQueue:
    """The tiles that are not finished: those ``waiting`` for each work, and those workers have."""

    admission: Admission
    works: Sequence[TileWork[Any]]
    waiting: list[deque[Tile]]
    priority: int
    _given: dict[Any, _Given] = field(default_factory=dict)  # by future
    _running: Any = None  # as_completed of the futures
    _failed: list[tuple[_Given, Exception]] = field(default_factory=list)
    _losses: Counter[tuple[int, str]] = field(default_factory=Counter)  # of whole crews
    _last_answer: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        from distributed import as_completed

        self._running = as_completed(loop=self._client.loop)

    @property
    def is_empty(self) -> bool:
        """Whether all is done."""
        return not (any(self.waiting) or self._given or self._failed)

    @property
    def are_few(self) -> bool:
        """Whether a worker would have nothing to do once it has done its tile."""
        return not any(self.waiting) and len(self._given) <= self._threads

    @property
    def _threads(self) -> int:
        return sum(self.admission.admitted.values())

    @property
    def _client(self) -> Any:
        return self.admission.workers.client

    def advance(self) -> Iterator[tuple[int, Tile, Any]]:
        """Give tiles to workers, wait for a moment, and yield tiles that are done or given up.

        Each comes with the number of its work, and with what ``_do`` returned, or an error. Raises
        ImageError if the scheduler goes away.
        """
        from distributed.client import ClosedClientError

        try:
            yield from self._advance()
        except (OSError, ClosedClientError) as error:
            raise scheduler_gone() from error

    def _advance(self) -> Iterator[tuple[int, Tile, Any]]:
        self.admission.update()
        crew = frozenset(self.admission.admitted)
        yield from self._judge_failed()
        yield from self._recover(crew)
        if crew:
            self._give(crew)
        yield from self._take()
        if time.monotonic() > self._last_answer + _STILL_S:
            self.admission.workers.check_memory()
            self._last_answer = time.monotonic()

    def cancel(self) -> None:
        """Have workers forget what they were given."""
        self._client.cancel([*self._given])

    def _recover(self, crew: frozenset[str]) -> Iterator[tuple[int, Tile, Any]]:
        """Take back tiles none of whose workers is left. Yields those that were lost too often."""
        lost = [future for future, given in self._given.items() if not given.crew & crew]
        if lost and crew:
            self._client.cancel(lost)
            for future in lost:
                yield from self._take_back(self._given.pop(future))

    def _take_back(self, given: _Given) -> Iterator[tuple[int, Tile, Any]]:
        """Have a tile wait again. Yields it where that has happened too often."""
        work, tile = given.work, given.tile
        logger.info("tile %s was lost, and is given to others", tile.name)
        self._losses[work, tile.name] += 1
        if self._losses[work, tile.name] == ATTEMPTS:
            yield work, tile, ImageError(WORKER_DIED)
        else:
            self.waiting[work].appendleft(tile)

    def _give(self, crew: frozenset[str]) -> None:
        """Give workers as many of the waiting tiles as keep them busy."""
        ahead = _AHEAD * self._threads
        while len(self._given) < ahead and (work := self._next(ahead)) is not None:
            tile = self.waiting[work].popleft()
            future = self._client.submit(
                _do,
                self.admission.name,
                work,
                self.works[work].prepared(tile),
                pure=False,
                priority=self.priority,
                retries=ATTEMPTS - 1,
                workers=[*crew],
            )
            self._await(future, _Given(work=work, tile=tile, crew=crew))

    def _next(self, spare: int) -> int | None:
        """Which work to go on with: the last, while more tiles wait for it than are ``spare``.

        What one work leaves for the next is used while it is at hand. Spare tiles keep all workers
        busy in the end, when a few have the last tiles of the first work, which may take long.
        """
        for work in reversed(range(1, len(self.works))):
            if len(self.waiting[work]) > spare:
                return work
        return next((work for work, tiles in enumerate(self.waiting) if tiles), None)

    def _await(self, future: Any, given: _Given) -> None:
        self._given[future] = given
        self._running.add(future)

    def _take(self) -> Iterator[tuple[int, Tile, Any]]:
        """Take what workers have done."""
        for future in _ready(self._running, 0.01 if self.admission.is_pending else 0.1):
            if future not in self._given:  # it was taken back
                continue
            given = self._given.pop(future)
            self._last_answer = time.monotonic()
            match _outcome(future):
                case None:
                    logger.info("tile %s was lost with its worker", given.tile.name)
                    self._await(future, given)  # another worker makes it again
                case NotHeldError() as error:
                    self.admission.dismiss(error.address)
                    yield from self._take_back(given)
                case Exception() as error:
                    self.admission.ask_again()
                    self._failed.append((given, error))
                case result:
                    yield given.work, given.tile, result

    def _judge_failed(self) -> Iterator[tuple[int, Tile, Any]]:
        """Give up tiles that failed, once it is known that this was not due to their workers."""
        if self._failed and not self.admission.is_pending:
            failed, self._failed = self._failed, []
            for given, error in failed:
                if given.crew & self.admission.refused.keys():
                    self.waiting[given.work].appendleft(given.tile)
                else:
                    yield given.work, given.tile, error


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
    """The tasks and contexts of all tiles, unpacked once in each process that works on some.

    To unpack them imports torch. The process is set up before that, whoever started it.
    """

    def __init__(self, packed: bytes, log_level: int | None) -> None:
        self._packed = packed
        self._log_level = log_level
        self._lock = threading.Lock()
        self._unpacked: list[tuple[Any, Any]] | None = None

    def __reduce__(self) -> Any:
        return _Shared, (self._packed, self._log_level)

    def unpack(self) -> list[tuple[Any, Any]]:
        """(task, context) of each work."""
        with self._lock:
            if self._unpacked is None:
                set_environment()
                if self._log_level not in (None, logs.level_shown()):
                    logs.show_logs(self._log_level)
                self._unpacked = pickle.loads(zlib.decompress(self._packed))
            return self._unpacked


def _do(name: str, work: int, tile: Any) -> tuple[bytes, Seconds]:
    """Do the n-th work on a tile, on a worker that an Admission of that ``name`` admitted."""
    try:
        shared: _Shared = held(name)
        task, context = shared.unpack()[work]
        nuclei, uncertainty, seconds = task(context, tile)
        with timed(seconds, "encode"):
            content = TileStore.encode(nuclei, uncertainty)
    except Exception:
        logger.info("an attempt at tile %s failed", tile.name, exc_info=True)
        raise
    logger.debug("tile %s: %d nuclei", tile.name, len(nuclei))
    return content, seconds
