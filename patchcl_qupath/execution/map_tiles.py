"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run goes on.

Workers hand their nuclei back as bytes, some 100 kB a tile, and the run alone writes: workers need
to see the slides, not the project, and a worker that dies leaves nothing half-written.

The only module that imports dask.distributed.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import shutil
import signal
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.config import CLUSTERS
from patchcl_qupath.datatypes import Nuclei, Polygons, Survey, Tile
from patchcl_qupath.errors import ConfigError, ImageError, StorageError
from patchcl_qupath.execution.jobs import Jobs
from patchcl_qupath.storage.files import (
    count_nuclei,
    digest,
    read_json,
    read_measurements,
    read_nuclei,
    read_polygons,
    read_tile_survey,
    to_parquet,
    write_bytes,
    write_json,
    writing,
)

Context = TypeVar("Context")
Seconds = dict[str, float]  # by stage
Measured = dict[str, NDArray[np.float32]]  # by name: (N,)
TileTask = Callable[[Context, Tile], tuple[Nuclei, Survey, Seconds]]

ATTEMPTS = 3  # at a tile, before it is left out
_GONE = (
    "the Dask scheduler went away: start it and its workers again, then run again; finished tiles "
    "are kept"
)
_FETCH_S = 30.0  # for what a tile's worker found to come here
_THREADS = 4  # in one process
# A terminal sends Ctrl-C to all processes, but it is the run that ends the others.
_NO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
_AHEAD = 3  # tiles for each worker thread: enough to keep it busy, few to keep memory flat


@dataclass(frozen=True)
class TileStore:
    """The finished tiles of one image in one run: a folder of parquet files and its plan."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> TileStore:
        """Open for ``plan``, whatever decides what is in a tile's file; drop tiles of another."""
        plan_file = folder / "plan.json"
        if digest(read_json(plan_file)) != digest(plan):
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "tiles").mkdir(parents=True, exist_ok=True)
            write_json(plan_file, plan)
        return cls(folder)

    def path(self, tile: Tile) -> Path:
        """Where a finished tile's nuclei are."""
        return self.folder / "tiles" / f"{tile.name}.parquet"

    def write(self, tile: Tile, content: bytes) -> None:
        """Keep what ``to_parquet`` made of a tile; from now on it is finished."""
        write_bytes(self.path(tile), content)

    def missing(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles that are still to do."""
        finished = {path.name for path in (self.folder / "tiles").glob("*.parquet")}
        return [tile for tile in tiles if self.path(tile).name not in finished]

    def count(self, tiles: Sequence[Tile]) -> int:
        """How many nuclei finished tiles hold together."""
        return sum(count_nuclei(self.path(tile)) for tile in tiles)

    def nuclei(self, tiles: Sequence[Tile]) -> Iterator[Nuclei]:
        """The nuclei of finished tiles, one tile after the other, in the tiles' order."""
        return (read_nuclei(self.path(tile)) for tile in tiles)

    def polygons(self, tiles: Sequence[Tile]) -> Iterator[Polygons]:
        """Their outlines alone."""
        return (read_polygons(self.path(tile)) for tile in tiles)

    def measurements(self, tiles: Sequence[Tile], names: Sequence[str]) -> Iterator[Measured]:
        """Some of their measurements alone."""
        return (read_measurements(self.path(tile), names) for tile in tiles)

    def surveys(self, tiles: Sequence[Tile]) -> Iterator[Survey]:
        """What was seen where, of each."""
        return (read_tile_survey(self.path(tile)) for tile in tiles)


@dataclass(frozen=True)
class Workers:
    """Who does tiles: a Dask client, and ``look``, which looks after them while one waits."""

    client: Any
    look: Callable[[], None] = lambda: None


@contextmanager
def workers(
    count: int | None = None,
    scheduler: str | None = None,
    cluster: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Iterator[Workers]:
    """Those of the Dask cluster at ``scheduler``; or ``count`` jobs in the queue of a ``cluster``,
    one of CLUSTERS; else ``count`` threads, of this process or, where they are many, of others.

    ``count`` defaults to the number of cores, or to one job. Returns when there is a worker;
    ``tell`` is told what jobs wait for. Raises ConfigError if the scheduler does not answer, or
    where no jobs can be had.
    """
    import dask
    from distributed import Client, LocalCluster

    if scheduler:
        try:
            client = Client(scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"no Dask scheduler answers at {scheduler}: start one with 'dask scheduler', "
                f"or leave out --scheduler to work on this machine ({error})"
            ) from error
        with client:
            client.wait_for_workers(1)
            yield Workers(client)
        return
    settings = {
        "distributed.worker.memory.spill": False,
        "distributed.admin.low-level-log-length": 0,
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,  # workers that die over a tile
    }
    with dask.config.set(settings):
        if cluster:
            with job_cluster(cluster) as queue, Client(queue) as client:
                jobs = Jobs(cluster, queue, count or 1, tell)
                try:  # jobs that a killed run could not cancel end by themselves
                    jobs.start()
                    yield Workers(client, jobs.look)
                finally:
                    jobs.cancel()
            return
        processes, threads = _shared_out(count or os.cpu_count() or 1)
        ours: dict[str, Any] = {"processes": False}
        if processes > 1:
            ours = {"preload": _NO_CTRL_C}
            # What processes shared is cleaned up after Ctrl-C; that is no news.
            os.environ.setdefault(
                "PYTHONWARNINGS", "ignore::UserWarning:" + resource_tracker.__name__
            )
        with (
            LocalCluster(
                n_workers=processes,
                threads_per_worker=threads,
                **ours,
                dashboard_address="127.0.0.1:0",  # None takes port 8787 on all interfaces
                memory_limit=0,
                silence_logs=logging.CRITICAL,
            ) as local,
            Client(local) as client,
        ):
            yield Workers(client)


def _shared_out(count: int) -> tuple[int, int]:
    """How many processes, and how many threads in each, make ``count`` threads.

    Some of each tile's work holds Python's lock, so that more than a few threads of one process
    wait for each other. A process more takes half a GB.
    """
    from distributed.deploy.utils import nprocesses_nthreads

    return (1, count) if count <= _THREADS else nprocesses_nthreads(count)


def job_cluster(kind: str) -> Any:
    """A dask-jobqueue cluster of one of CLUSTERS, without a job as yet. Raises ConfigError.

    What a job is, its cores, memory, time and queue, say the user's settings of dask-jobqueue.
    """
    command = CLUSTERS[kind]
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        import dask_jobqueue  # takes Ctrl-C for itself, and would end with status 0

        signal.signal(signal.SIGINT, on_ctrl_c)
    except ImportError as error:
        raise ConfigError(
            "dask-jobqueue is not installed: pip install 'patchcl-qupath[cluster]'"
        ) from error
    if shutil.which(command) is None:
        raise ConfigError(
            f"there is no {command} here: run this where you submit {kind} jobs, or leave out "
            "--cluster to work on this machine"
        )
    import dask

    own = dask.config.get(f"jobqueue.{kind}.scheduler-options", None) or {}
    options = {"dashboard_address": "127.0.0.1:0", **own}  # its default may be another run's port
    try:
        return getattr(dask_jobqueue, f"{kind.upper()}Cluster")(
            scheduler_options=options, silence_logs=logging.CRITICAL
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"write into ~/.config/dask/jobqueue.yaml what a job is, at least 'jobqueue: {{{kind}: "
            f"{{cores: 8, memory: 16GB, walltime: '04:00:00'}}}}' ({error})"
        ) from error


@contextmanager
def timed(seconds: Seconds, stage: str) -> Iterator[None]:
    """Note how long the block took."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def write_run(
    folder: Path, about: dict[str, Any], training: dict[str, Any], images: list[dict[str, Any]]
) -> None:
    """``run.json``: what was run, with what, and what became of each image so far."""
    packages = (
        "torch",
        "numpy",
        "numba",
        "scipy",
        "shapely",
        "tiffslide",
        "tifffile",
        "zarr",
        "dask",
    )
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    with suppress(StorageError):  # whoever finds the disk full is the image, and says so
        write_json(
            folder / "run.json",
            {**about, "versions": versions, "training": training, "images": images},
        )


def write_outcome(output: Path, image: str, result: dict[str, Any]) -> None:
    """What became of one image, the last time that it was in a run."""
    with suppress(StorageError):
        write_json(output / "report" / "outcomes" / f"{image}.json", result)


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
            workers.look()
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
    nuclei, survey, seconds = task(context, tile)
    with timed(seconds, "encode"):
        return to_parquet(nuclei, survey), seconds


def _of_tile(error: Exception, future: Any) -> Exception:
    """What is wrong with a tile. Raises ImageError where it is the scheduler, and not the tile."""
    from distributed import KilledWorker

    if future.status != "error":
        raise ImageError(_GONE) from error
    if isinstance(error, KilledWorker):
        return ImageError("its worker died each time: give workers more memory, or fewer threads")
    return error
