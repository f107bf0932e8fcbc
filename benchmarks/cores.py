"""How busy many cores are kept: a simulation from measured times, and a check of it.

    python benchmarks/cores.py [RUN.json] [--cores N ...] [--slides N] [--check N ...]

RUN.json is what `patchcl-qp run --json` printed for one large slide; without it, times are those
of a slide of 100 mm² in docs/measured.md. The ideal is that all work is shared out evenly.

``--check N`` has the real scheduling (``overlapped``, ``map_tiles``, Dask) do the same with N
workers whose tasks only sleep, and compares: sleeping needs no core, so it may be more workers
than there are cores. ``--slower`` stretches their times, so that what Dask itself computes here
counts for less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from patchcl_qupath.datatypes import Box, Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.execution.map_tiles import TileWork, map_tiles
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import Workers, open_workers
from patchcl_qupath.overlap import Stop, Turn, overlapped, turns
from patchcl_qupath.timing import Seconds

TILES_SPREAD = 0.3  # standard deviation of a tile's time, of its mean
FEW = 4  # workers that are threads of the run's own process, which then prepares and writes itself


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds that an image takes on one core: to prepare, per tile, to store one, to finish.

    ``lock`` is the fraction of what the main process does in which Python's lock is held: of that,
    it does one thing at a time.
    """

    prepare: float = 1.5
    tiles: int = 196
    tile: float = 0.5
    store: float = 0.004
    finish: float = 5.3
    lock: float = 0.5

    @classmethod
    def of_run(cls, printed: dict[str, Any], lock: float) -> Times:
        """Those of the one image of a run."""
        (image,) = printed["images"]
        worker, main, tiles = image["worker_seconds"], image["main_seconds"], image["tiles"]
        stored = worker.get("store", 0.0)
        return cls(
            prepare=main["prepare"],
            tiles=tiles,
            tile=(sum(worker.values()) - stored) / tiles,
            store=stored / tiles,
            finish=main["write"],  # pictures are drawn meanwhile
            lock=lock,
        )

    @property
    def total(self) -> float:
        """Of an image, all in all."""
        return self.prepare + self.tiles * (self.tile + self.store) + self.finish


@dataclass(kw_only=True)
class Job:
    """Something that runs: what is left of it, in seconds of one core, and where it runs."""

    image: int
    kind: str
    left: float
    in_main: bool


@dataclass(kw_only=True)
class Machine:
    """A machine of ``cores``: its workers, and the threads of the main process, share them."""

    cores: int
    times: Times
    at_once: int
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    running: list[Job] = field(default_factory=list)
    now: float = 0.0

    def seconds(self, slides: int) -> float:
        """How long a project takes."""
        waiting: deque[int] = deque(range(slides))
        tiles: dict[int, int] = {}  # still to be given to a worker, by image
        undone: dict[int, int] = {}  # tiles that are not stored
        under_way = 0
        while waiting or under_way:
            while waiting and under_way < self.at_once:
                self._start(waiting.popleft(), "prepare", self.times.prepare)
                under_way += 1
            for image in sorted(tiles):
                while tiles[image] and self._workers_busy() < self.cores:
                    tiles[image] -= 1
                    spread = 1 + TILES_SPREAD * self.rng.standard_normal()
                    self._start(image, "tile", self.times.tile * max(0.1, spread))
            for job in self._advance():
                if job.kind == "prepare":
                    tiles[job.image] = undone[job.image] = self.times.tiles
                elif job.kind == "tile":
                    self._start(job.image, "store", self.times.store)
                elif job.kind == "store":
                    undone[job.image] -= 1
                    if not undone[job.image]:
                        del tiles[job.image]
                        self._start(job.image, "finish", self.times.finish)
                else:
                    under_way -= 1
        return self.now

    def _start(self, image: int, kind: str, seconds: float) -> None:
        in_main = kind == "store" or (kind != "tile" and self.cores <= FEW)
        self.running.append(Job(image=image, kind=kind, left=seconds, in_main=in_main))

    def _workers_busy(self) -> int:
        return sum(not job.in_main for job in self.running)

    def _advance(self) -> list[Job]:
        """Go on until something ends; what ended."""
        main = sum(job.in_main for job in self.running)
        share = min(1.0, self.cores / len(self.running))
        of_main = min(share, 1 / (main * self.times.lock)) if main and self.times.lock else share
        speed = {True: of_main, False: share}
        step = min(job.left / speed[job.in_main] for job in self.running)
        self.now += step
        ended = []
        for job in self.running:
            job.left -= step * speed[job.in_main]
            if job.left <= 1e-9:
                ended.append(job)
        self.running = [job for job in self.running if job.left > 1e-9]
        return ended


def at_once(cores: int) -> int:
    """How many images are under way with so many workers, as the program has it."""

    class Client:
        def nthreads(self) -> dict[str, int]:
            return {"": cores}

    return Workers(client=Client()).images_at_once()


def simulated(cores: int, slides: int, times: Times, images: int | None = None) -> float:
    """The fraction of the ideal speed, with ``images`` under way at once."""
    machine = Machine(cores=cores, times=times, at_once=images or at_once(cores))
    return slides * times.total / cores / machine.seconds(slides)


def sleep_tile(seconds: float, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """In place of segmenting a tile."""
    rng = np.random.default_rng(tile.col)
    time.sleep(seconds * max(0.1, 1 + TILES_SPREAD * rng.standard_normal()))
    return (
        Nuclei(np.empty(0, dtype=object)),
        UncertaintyGrid((64.0, 64.0), *np.zeros((5, 1), np.int64)),
        {},
    )


def slept(count: int, slides: int, times: Times) -> float:
    """The fraction of the ideal speed that the real scheduling reaches with sleeping workers."""
    tiles = [
        Tile(row=0, col=col, read=Box(0, col, 1, col + 1), write=Box(0, col, 1, col + 1))
        for col in range(times.tiles)
    ]
    stop = Stop()
    with tempfile.TemporaryDirectory() as folder, open_workers(count) as workers:

        def one(item: tuple[int, Turn]) -> None:
            image, turn = item
            workers.call(time.sleep, times.prepare)
            turn.wait(stop)
            sleep = TileWork(
                task=sleep_tile,
                context=times.tile,
                tiles=tiles,
                store=TileStore.open(Path(folder) / str(image), {}),
                on_done=lambda _: None,
                on_failed=lambda *_: None,
            )
            map_tiles(sleep, workers=workers, on_few=turn.pass_on)
            workers.call(time.sleep, times.finish)

        workers.client.run(bool, 1)  # processes have started
        one((-1, Turn()))  # and imported what they need
        began, items = time.perf_counter(), [*enumerate(turns(slides))]
        for done in overlapped(one, items, workers.images_at_once(), stop):
            done.result()
        took = time.perf_counter() - began
    return slides * times.total / count / took


def check(counts: Sequence[int], slides: int, times: Times, slower: float) -> None:
    """Compare the simulation with sleeping workers."""
    few = replace(times, tiles=max(1, times.tiles // 8))  # the same shape in less time
    shrunk = replace(few, prepare=few.prepare / 8, finish=few.finish / 8)
    for count in counts:
        stretched = replace(
            shrunk,
            prepare=shrunk.prepare * slower,
            tile=shrunk.tile * slower,
            finish=shrunk.finish * slower,
            store=0.0,
            lock=0.0,
        )
        found, expected = slept(count, slides, stretched), simulated(count, slides, stretched)
        print(
            f"{count} sleeping workers: {found:.0%} of the ideal, simulated {expected:.0%}",
            flush=True,
        )


def main() -> None:
    """Print the fractions, and what limits them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="what `patchcl-qp run --json` printed")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2, 4, 16, 64])
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--lock", type=float, default=Times.lock, help="see Times.lock")
    parser.add_argument("--check", nargs="+", type=int, default=[])
    parser.add_argument("--slower", type=float, default=1.0)
    options = parser.parse_args()
    times = replace(Times(), lock=options.lock)
    if options.run is not None:
        times = Times.of_run(json.loads(options.run.read_text("utf-8")), options.lock)
    print(times)
    for cores in options.cores:
        found, alone = (simulated(cores, options.slides, times, images) for images in (None, 1))
        free = simulated(cores, options.slides, replace(times, lock=0.0))
        print(
            f"{cores} cores: {found:.0%} of the ideal with {at_once(cores)} images at once; "
            f"{alone:.0%} one after the other; {free:.0%} without Python's lock"
        )
    check(options.check, options.slides, times, options.slower)


if __name__ == "__main__":
    main()
