"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run resumes.

Workers hand their nuclei back as bytes, some 100 kB a tile, and the run alone writes: workers need
to see the slides, not the project, and a worker that dies leaves nothing half-written.
"""

from __future__ import annotations

import logging
import pickle
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from patchcl_qupath import logs
from patchcl_qupath.datatypes import Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.errors import ImageError
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import ATTEMPTS, Workers, set_environment
from patchcl_qupath.timing import Seconds, add_seconds, timed

logger = logging.getLogger(__name__)

Context = TypeVar("Context")
TileTask = Callable[[Context, Tile], tuple[Nuclei, UncertaintyGrid, Seconds]]

_GONE = (
    "the Dask scheduler went away: start it and its workers again, then run again; finished tiles "
    "are kept"
)
_FETCH_S = 30.0  # for what a tile's worker found to come here
_AHEAD = 3  # tiles for each worker thread: enough to keep it busy, few to keep memory flat


def map_tiles(
    workers: Workers,
    task: TileTask[Context],
    context: Context,
    tiles: Sequence[Tile],
    store: TileStore,
    on_done: Callable[[], None],
    on_failed: Callable[[Tile, Exception], None],
) -> Seconds:
    """Run ``task(context, tile)`` for each tile, and store the nuclei that it returns.

    Returns the seconds of all workers, by stage. ``on_done`` is called after each tile;
    ``on_failed`` in its place for one that failed ``ATTEMPTS`` times, with the last error. What
    they raise ends the map; finished tiles stay. Raises ImageError if the scheduler goes away,
    ConfigError where no jobs can be had any more.
    """
    from distributed import as_completed
    from distributed.client import ClosedClientError

    client = workers.client
    # Made by a task and not scattered: should all workers die that hold it, it is made again.
    packed = zlib.compress(pickle.dumps((task, context)), level=1)
    make = partial(_Shared, packed, logs.level_shown())
    waiting = iter(tiles)
    submitted: dict[Any, Tile] = {}
    running = as_completed(loop=client.loop)
    total: Seconds = {}

    def submit_more(shared: Any) -> None:
        wanted = _AHEAD * max(1, workers.threads()) - len(submitted)
        for tile in islice(waiting, max(0, wanted)):
            future = client.submit(_do, shared, tile, pure=False, retries=ATTEMPTS - 1)
            submitted[future] = tile
            running.add(future)

    try:
        submit_more(shared := client.submit(make, pure=False))
        while not running.is_empty():
            workers.poll()
            for future in _ready(running):
                tile = submitted.pop(future)
                match _outcome(future):
                    case None:
                        logger.info("tile %s was lost with its worker", tile.name)
                        submitted[future] = tile  # another worker makes it again
                        running.add(future)
                    case Exception() as error:
                        logger.info("tile %s failed %d times: %s", tile.name, ATTEMPTS, error)
                        on_failed(tile, error)
                    case content, seconds:
                        with timed(seconds, "store"):
                            store.write(tile, content)
                        add_seconds(total, seconds)
                        on_done()
            submit_more(shared)
    except (OSError, ClosedClientError) as error:  # of Dask: those of writing have become ours
        raise ImageError(_GONE) from error
    finally:
        client.cancel([*submitted])
    return total


def _ready(running: Any) -> Any:
    """The futures that ended by now; waits for a moment if there are none."""
    if not running.has_ready():
        with running.thread_condition:
            running.thread_condition.wait(timeout=0.1)  # as dask does
    return running.next_batch(block=False)


def _outcome(future: Any) -> tuple[bytes, Seconds] | Exception | None:
    """What ``_do`` returned, or why the tile failed; None if it was lost with its worker.

    Raises ImageError where the scheduler is gone.
    """
    from distributed import KilledWorker

    try:
        content, seconds = future.result(timeout=_FETCH_S)
    except Exception as error:
        if isinstance(error, TimeoutError) and future.status != "error":
            return None
        if future.status != "error":
            raise ImageError(_GONE) from error
        if isinstance(error, KilledWorker):
            return ImageError(
                "its worker died each time: give workers more memory, or fewer threads"
            )
        return error
    return content, seconds


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


def _do(shared: _Shared, tile: Tile) -> tuple[bytes, Seconds]:
    """Segment a tile, on a worker."""
    try:
        task, context = shared.unpack()
        nuclei, uncertainty, seconds = task(context, tile)
        with timed(seconds, "encode"):
            content = TileStore.encode(nuclei, uncertainty)
    except Exception:
        logger.info("an attempt at tile %s failed", tile.name, exc_info=True)
        raise
    logger.debug("tile %s: %d nuclei", tile.name, len(nuclei))
    return content, seconds
