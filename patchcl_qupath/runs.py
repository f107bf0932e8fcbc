"""Tiles on workers: Dask schedules them, each finished one is a file, a killed run goes on.

The only module that imports dask.distributed.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from patchcl_qupath.datatypes import Nuclei, Tile
from patchcl_qupath.errors import ConfigError, StorageError
from patchcl_qupath.storage import (
    count_nuclei,
    digest,
    read_nuclei,
    sweep,
    write_json,
    write_nuclei,
    writing,
)

Context = TypeVar("Context")
Seconds = dict[str, float]  # by stage
TileTask = Callable[[Context, Tile], tuple[Nuclei, Seconds]]

_AHEAD = 3  # tiles waiting for each worker thread: enough to keep it busy, few to keep memory flat


@dataclass(frozen=True)
class TileStore:
    """The finished tiles of one image in one run: a folder of parquet files and its plan."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, plan: dict[str, Any]) -> TileStore:
        """Open for ``plan``, whatever decides what is in a tile's file; drop tiles of another."""
        plan_file = folder / "plan.json"
        if not _same(plan_file, plan):
            with writing(folder):
                shutil.rmtree(folder, ignore_errors=True)
                (folder / "tiles").mkdir(parents=True, exist_ok=True)
            write_json(plan_file, plan)
        sweep(folder / "tiles")
        return cls(folder)

    def path(self, tile: Tile) -> Path:
        """Where a finished tile's nuclei are."""
        return self.folder / "tiles" / f"{tile.name}.parquet"

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


def _same(plan_file: Path, plan: dict[str, Any]) -> bool:
    try:
        return digest(json.loads(plan_file.read_text(encoding="utf-8"))) == digest(plan)
    except (OSError, ValueError):
        return False


@contextmanager
def workers(count: int | None = None, scheduler: str | None = None) -> Iterator[Any]:
    """A Dask client: of the cluster at ``scheduler``, else of ``count`` threads of this process.

    ``count`` defaults to the number of cores. Raises ConfigError if the scheduler does not answer.
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
            yield client
        return
    settings = {
        "distributed.worker.memory.spill": False,
        "distributed.admin.low-level-log-length": 0,
    }
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=1,
            threads_per_worker=count or os.cpu_count() or 1,
            processes=False,
            dashboard_address="127.0.0.1:0",  # None takes port 8787 on all interfaces all the same
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


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
    packages = ("torch", "numpy", "scipy", "shapely", "tiffslide", "tifffile", "zarr", "dask")
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    with suppress(StorageError):  # whoever finds the disk full is the image, and says so
        write_json(
            folder / "run.json",
            {**about, "versions": versions, "training": training, "images": images},
        )


def map_tiles(
    client: Any,
    task: TileTask[Context],
    context: Context,
    tiles: Sequence[Tile],
    store: TileStore,
    on_done: Callable[[], None],
) -> Seconds:
    """Run ``task(context, tile)`` for each tile and store its nuclei; -> worker seconds by stage.

    ``context`` is sent to each worker once. ``on_done`` is called after each tile. An exception of
    a task ends the map; the tiles that were finished stay.
    """
    from distributed import as_completed

    shared = client.scatter(context, broadcast=True, hash=False)
    threads = sum(client.nthreads().values()) or 1
    waiting = iter(tiles)

    def submit(tile: Tile) -> Any:
        return client.submit(_do, task, shared, tile, store.path(tile), pure=False)

    first = [submit(tile) for _, tile in zip(range(_AHEAD * threads), waiting, strict=False)]
    running = as_completed(first)
    total: Seconds = {}
    try:
        for future in running:
            for stage, seconds in future.result().items():
                total[stage] = total.get(stage, 0.0) + seconds
            on_done()
            if (tile := next(waiting, None)) is not None:
                running.add(submit(tile))
    finally:
        client.cancel(list(running.futures))
    return total


def _do(task: TileTask[Context], context: Context, tile: Tile, path: Path) -> Seconds:
    nuclei, seconds = task(context, tile)
    with timed(seconds, "store"):
        write_nuclei(path, nuclei)
    return seconds
