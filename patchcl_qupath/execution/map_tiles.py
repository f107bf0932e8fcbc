"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run goes on.

Workers hand their nuclei back as bytes, some 100 kB a tile, and the run alone writes: workers need
to see the slides, not the project, and a worker that dies leaves nothing half-written.

The only module that imports dask.distributed.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from patchcl_qupath.datatypes import Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.errors import ImageError
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import ATTEMPTS, Workers
from patchcl_qupath.timing import Seconds, timed

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
    """Run ``task(context, tile)`` for each tile, store what it found; -> worker seconds by stage.

    ``on_done`` is called after each tile; ``on_failed`` in its place for one that failed
    ``ATTEMPTS`` times, with the last error. What they raise ends the map; finished tiles stay.
    Raises ImageError if the scheduler goes away, ConfigError where no jobs can be had any more.
    """
    from distributed import as_completed
    from distributed.client import ClosedClientError

    # Made by a task and not scattered: should all workers die that hold it, it is made again.
    client = workers.client
    make = partial(_unpack, zlib.compress(pickle.dumps(context), level=1))
    waiting = iter(tiles)
    submitted: dict[Any, Tile] = {}
    running = as_completed(loop=client.loop)
    total: Seconds = {}

    def submit_more(shared: Any) -> None:
        threads = sum(client.nthreads().values()) or 1  # workers come and go
        for tile in islice(waiting, max(0, _AHEAD * threads - len(submitted))):
            future = client.submit(_do, task, shared, tile, pure=False, retries=ATTEMPTS - 1)
            submitted[future] = tile
            running.add(future)

    try:
        submit_more(shared := client.submit(make, pure=False))
        while not running.is_empty():
            workers.poll()
            if not running.has_ready():
                with running.thread_condition:
                    running.thread_condition.wait(timeout=0.1)  # as dask does
            for future in running.next_batch(block=False):
                tile = submitted.pop(future)
                try:
                    content, seconds = future.result(timeout=_FETCH_S)
                except Exception as error:
                    if isinstance(error, TimeoutError) and future.status != "error":
                        submitted[future] = tile  # lost with its worker: another makes it again
                        running.add(future)
                        continue
                    on_failed(tile, _of_tile(error, future))
                    continue
                with timed(seconds, "store"):
                    store.write(tile, content)
                for stage in seconds:
                    total[stage] = total.get(stage, 0.0) + seconds[stage]
                on_done()
            submit_more(shared)
    except (OSError, ClosedClientError) as error:  # of Dask: those of writing have become ours
        raise ImageError(_GONE) from error
    finally:
        client.cancel([*submitted])
    return total


def _unpack(context: bytes) -> Any:
    return pickle.loads(zlib.decompress(context))


def _do(task: TileTask[Context], context: Context, tile: Tile) -> tuple[bytes, Seconds]:
    nuclei, uncertainty, seconds = task(context, tile)
    with timed(seconds, "encode"):
        return TileStore.encode(nuclei, uncertainty), seconds


def _of_tile(error: Exception, future: Any) -> Exception:
    """What is wrong with a tile. Raises ImageError where it is the scheduler, and not the tile."""
    from distributed import KilledWorker

    if future.status != "error":
        raise ImageError(_GONE) from error
    if isinstance(error, KilledWorker):
        return ImageError("its worker died each time: give workers more memory, or fewer threads")
    return error
