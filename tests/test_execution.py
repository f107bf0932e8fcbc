"""Tiles on Dask: what is tried again, what is left out, what ends it; clusters that queue jobs."""

from __future__ import annotations

import errno
import getpass
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import distributed
import numpy as np
import psutil
import pytest
import shapely
import torch
from click.testing import CliRunner
from distributed import LocalCluster, get_worker

from patchcl_qupath import cli, logs, pipeline
from patchcl_qupath.config import CLUSTERS, Config
from patchcl_qupath.datatypes import Box, Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.doctor import findings
from patchcl_qupath.errors import ConfigError, ImageError, StorageError, TrainingError
from patchcl_qupath.execution import admission
from patchcl_qupath.execution import workers as execution_workers
from patchcl_qupath.execution.jobs import _output_of
from patchcl_qupath.execution.map_tiles import TileWork, map_tiles
from patchcl_qupath.execution.outcome import TileProgress
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.execution.workers import ATTEMPTS, check_workers, job_cluster, open_workers
from patchcl_qupath.progress import hide_progress
from patchcl_qupath.timing import Seconds

TILES = [
    Tile(row=0, col=col, read=Box(0, col, 9, col + 1), write=Box(0, col, 9, col + 1))
    for col in range(12)
]
UNCERTAINTY = UncertaintyGrid((128.0, 128.0), *np.zeros((5, 1), dtype=np.int64))
SAMPLE = Path(__file__).parent.parent / "sample_project"


def one_nucleus(tile: Tile) -> Nuclei:
    polygons = np.array([shapely.box(tile.col, 0, tile.col + 1, 1)], dtype=object)
    return Nuclei(polygons, {}, np.array([f"{tile.col:036d}"]))


def third_time_lucky(attempts: Path, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Fails twice for tile 3 and always for tile 5; notes each attempt in a file."""
    before = len([*attempts.glob(f"{tile.name}-*")])
    (attempts / f"{tile.name}-{before}").touch()
    if tile.col == 5 or (tile.col == 3 and before < 2):
        raise ValueError(f"attempt {before + 1}")
    return one_nucleus(tile), UNCERTAINTY, {"think": 1.0}


def deadly(_: None, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """The worker that looks at tile 5 dies."""
    if tile.col == 5:
        os._exit(1)
    return one_nucleus(tile), UNCERTAINTY, {}


def slow(_: None, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    time.sleep(0.2)
    return one_nucleus(tile), UNCERTAINTY, {}


def is_first(place: Path) -> bool:
    """Whether this process was the first to ask."""
    own = place / str(os.getpid())
    if not own.exists():
        own.write_text(own.name)
    with suppress(FileExistsError):
        os.link(own, place / "first")
    return (place / "first").read_text() == own.name


def refuse_others(place: Path) -> None:
    """A check that one process passes."""
    if not is_first(place):
        raise ConfigError("it came late")


def refuse_broken(place: Path) -> None:
    """A check that all processes pass until one is broken, and then one."""
    if not is_first(place) and (place / "broken").exists():
        raise ConfigError("its disk is gone")


def die_elsewhere(home: int) -> None:
    """A check that no worker survives, as where its memory ends when it imports torch."""
    if os.getpid() != home:
        os._exit(1)


def break_others(place: Path, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Fails in all processes but one, from the first tile on; that one waits for another."""
    if not is_first(place):
        (place / "broken").touch()
        raise OSError("no such file")
    deadline = time.monotonic() + 60  # on a busy machine another process may begin late
    while not (place / "broken").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return one_nucleus(tile), UNCERTAINTY, {}


def forgetful(place: Path, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Once, a worker loses what all tiles share."""
    with suppress(FileExistsError):
        (place / "forgot").touch(exist_ok=False)
        data = get_worker().data
        del data[next(key for key in data if str(key).startswith("patchcl-qupath-"))]
    time.sleep(0.1)
    return one_nucleus(tile), UNCERTAINTY, {}


def leave_mark(place: Path) -> None:
    """Return nothing, and leave a line for each time."""
    with (place / "marks").open("a") as marks:
        marks.write(f"{os.getpid()}\n")


def environment() -> str:
    """What a process is set up with."""
    names = ("OMP_WAIT_POLICY", "ARROW_DEFAULT_MEMORY_POOL")
    return f"{', '.join(str(os.environ.get(name)) for name in names)}, level {logs.level_shown()}"


class WhenUnpacked:
    """A context that is, on a worker, the environment that it was unpacked in."""

    def __reduce__(self) -> Any:
        return environment, ()


def report_context(context: str, tile: Tile) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Hands the context back as a stage."""
    return one_nucleus(tile), UNCERTAINTY, {context: 1.0}


def segment(
    client: Any,
    task: Callable[..., Any],
    context: Any,
    folder: Path,
    on_done: Callable[[Tile], None] = lambda tile: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[TileStore, dict[int, str], Seconds]:
    """-> the finished tiles, why the others failed, and the seconds."""
    store = TileStore.open(folder / "store", {})
    failed: dict[int, str] = {}

    def note(tile: Tile, error: Exception) -> None:
        failed[tile.col] = str(error)

    work = TileWork(
        task=task,
        context=context,
        tiles=store.missing(TILES),
        store=store,
        on_done=on_done,
        on_failed=note,
    )
    return store, failed, map_tiles(work, workers=client, check=check)


@contextmanager
def processes(**options: Any) -> Iterator[Any]:
    quiet = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=2, threads_per_worker=1, **quiet, **options) as cluster:
        yield cluster


def test_tile_is_tried_three_times_and_the_others_go_on(client: Any, tmp_path: Path) -> None:
    (attempts := tmp_path / "attempts").mkdir()
    store, failed, seconds = segment(client, third_time_lucky, attempts, tmp_path)
    assert failed == {5: "attempt 3"}
    assert len([*attempts.iterdir()]) == len(TILES) + 2 + 2
    assert store.missing(TILES) == [TILES[5]]
    assert seconds["think"] == len(TILES) - 1
    done = [tile for tile in TILES if tile.col != 5]
    assert store.count(done) == len(done)
    assert [part.uuids[0] for part in store.nuclei(done)] == [f"{t.col:036d}" for t in done]

    _, failed, _ = segment(client, third_time_lucky, attempts, tmp_path)
    assert failed == {5: "attempt 6"}  # it alone is tried again
    assert len([*attempts.iterdir()]) == len(TILES) + 2 + 5


def test_what_ends_the_map_keeps_finished_tiles(client: Any, tmp_path: Path) -> None:
    (attempts := tmp_path / "attempts").mkdir()

    def stop(tile: Tile) -> None:
        raise StorageError("enough")

    with pytest.raises(StorageError, match="enough"):
        segment(client, third_time_lucky, attempts, tmp_path, on_done=stop)
    store = TileStore.open(tmp_path / "store", {})
    assert len(store.missing(TILES)) == len(TILES) - 1


def test_an_error_of_what_shows_progress_is_none_of_the_scheduler(
    client: Any, tmp_path: Path
) -> None:
    """As where nobody reads the lines any more."""

    def fail(_: Tile) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        segment(client, slow, None, tmp_path, on_done=fail)


def test_a_work_goes_on_with_the_tiles_that_the_one_before_names(
    client: Any, tmp_path: Path
) -> None:
    (attempts := tmp_path / "attempts").mkdir()
    stores = [TileStore.open(tmp_path / name, {}) for name in "ab"]
    order: list[tuple[str, int]] = []
    first = TileWork(
        task=third_time_lucky,
        context=attempts,
        tiles=TILES,
        store=stores[0],
        on_done=lambda tile: order.append(("a", tile.col)),
        on_failed=lambda tile, error: order.append(("a failed", tile.col)),
        then=lambda tile: [tile] if tile.col % 2 else [],
    )
    second = replace(
        first,
        task=slow,
        context=None,
        tiles=[TILES[0]],
        store=stores[1],
        on_done=lambda tile: order.append(("b", tile.col)),
        prepared=lambda tile: replace(tile, col=tile.col + 100),
        then=lambda tile: [],
    )
    seconds = map_tiles(first, second, workers=client)
    assert seconds["think"] == len(TILES) - 1
    assert stores[0].missing(TILES) == [TILES[5]]
    done = [TILES[0], *TILES[1::2]]  # that which failed is named, too
    assert set(stores[1].finished(TILES)) == set(done)
    assert stores[1].missing(TILES) == [tile for tile in TILES if tile not in done]
    assert [part.uuids[0] for part in stores[1].nuclei(TILES[1:2])] == [f"{101:036d}"]
    for tile in done[1:]:
        before = ("a failed" if tile.col == 5 else "a", tile.col)
        assert order.index(before) < order.index(("b", tile.col))


def progress_of(
    total: int, shown: list[tuple[int, int]], after: TileProgress | None = None
) -> TileProgress:
    """The progress of tiles of a slide that can still be opened."""
    image: Any = SimpleNamespace(slide=SimpleNamespace(name="a.svs", downsample=(1.0, 1.0)))
    return TileProgress(
        image=image,
        total=total,
        done=0,
        show=lambda done, of: shown.append((done, of)),
        reopen=lambda: None,
        after=after,
    )


def test_cells_are_shown_to_the_end_where_the_nuclei_of_the_last_tile_fail() -> None:
    shown: list[tuple[int, int]] = []
    finding = progress_of(2, [])
    growing = progress_of(2, shown, finding)
    finding.one_more(TILES[0])
    growing.one_more(TILES[0])
    assert not shown
    finding.one_failed(TILES[1], ImageError("damaged"))
    growing.one_less()
    assert shown == [(1, 1)]


def test_failed_tiles_side_by_side_leave_no_gap() -> None:
    progress = progress_of(9, [])
    progress.image.slide.downsample = (1.2, 1.7)
    for col in range(4):
        box = Box(8, 8 + 2 * col, 10, 10 + 2 * col)
        progress.one_failed(Tile(row=0, col=col, read=box, write=box), ImageError("damaged"))
    first, *others = progress.failed
    assert (first.x, first.y, first.width, first.height) == (10, 14, 2, 3)
    assert [tile.x for tile in others] == [tile.x + tile.width for tile in progress.failed[:-1]]


def test_an_image_none_of_whose_cells_grow_fails_in_any_order() -> None:
    """Its old results would be replaced by none."""
    growing = progress_of(2, [])
    growing.one_failed(TILES[0], ImageError("torn"))
    with pytest.raises(ImageError, match=r"a\.svs: no tile can be segmented: torn"):
        growing.one_less()
    growing = progress_of(2, [])
    growing.one_less()
    with pytest.raises(ImageError, match="no tile can be segmented: torn"):
        growing.one_failed(TILES[0], ImageError("torn"))


def test_tile_that_kills_its_workers_is_left_out(tmp_path: Path) -> None:
    once = {"distributed.scheduler.allowed-failures": 0}  # a worker takes long to start
    with (
        dask.config.set(once),
        processes() as cluster,
        open_workers(scheduler=cluster.scheduler_address) as client,
    ):
        store, failed, _ = segment(client, deadly, None, tmp_path)
    assert "its worker died each time: give workers more memory" in failed[5]
    # Those that waited at that worker may be suspected, too; no other.
    assert {tile.col for tile in store.missing(TILES)} == set(failed)
    assert len(failed) < len(TILES)


def test_processes_are_set_up_before_the_context_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster were started by others, with another environment."""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delenv("ARROW_DEFAULT_MEMORY_POOL", raising=False)
    logs.show_logs(logging.INFO)
    try:
        with (
            processes() as cluster,
            open_workers(scheduler=cluster.scheduler_address) as workers,
        ):
            _, failed, seconds = segment(workers, report_context, WhenUnpacked(), tmp_path)
    finally:
        logs.hide_logs()
    assert failed == {}
    assert f"PASSIVE, system, level {logging.INFO}" in seconds
    assert not any("None" in stage for stage in seconds)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are not given to jobs here")
def test_a_job_has_as_many_threads_as_it_has_cores() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from patchcl_qupath import doctor
from patchcl_qupath.execution.workers import open_workers
with open_workers() as workers:
    print(workers.present())
print([finding.found for finding in doctor.findings() if finding.part == "machine"])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    threads, machine = printed.stdout.splitlines()
    assert threads.endswith(": 1}")
    assert " 1 cores, " in machine or f" 1 of {os.cpu_count()} cores, " in machine


def test_a_training_has_as_many_threads_as_a_container_has_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch sees all cores of the machine, however little of their time there is."""
    monkeypatch.setattr("dask.system.cpu_count", lambda: 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(TrainingError):
            pipeline.train([], Config(), hide_progress)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_processes_keep_the_memory_of_large_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's own setting would let glibc give it back each time."""
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)  # of processes of other tests
    with open_workers(6) as workers:
        assert workers.are_processes
        variables = workers.client.submit(lambda: dict(os.environ)).result()
    assert "MALLOC_TRIM_THRESHOLD_" not in variables
    assert variables["OMP_NUM_THREADS"] == "1"


@pytest.mark.skipif(os.name == "nt", reason="nothing stops a process there")
@pytest.mark.parametrize("count", [2, 6])
def test_workers_are_there_after_the_computer_slept(count: int) -> None:
    """Longer than Dask waits for a worker that is silent, in a thread or a process."""
    code = f"""
import sys, time
from patchcl_qupath.execution.workers import open_workers

if __name__ == "__main__":
    with open_workers({count}) as workers:
        print(sum(workers.present().values()), flush=True)
        sys.stdin.readline()
        time.sleep(3)  # Dask looks for silent ones once a second
        print(sum(workers.present().values()), workers.client.submit(int).result(timeout=20))
"""
    patience = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "1s"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | patience,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == f"{count}\n"
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(8)  # at least ten heartbeats are waited for
            os.killpg(process.pid, signal.SIGCONT)
            process.stdin.write("\n")
            process.stdin.close()
            assert process.stdout.readline() == f"{count} 0\n"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_call_that_returns_nothing_is_made_once_beside_this_process(tmp_path: Path) -> None:
    with open_workers(6) as workers:
        assert workers.are_processes
        workers.call(leave_mark, tmp_path)
        assert workers.call(len, "abc") == 3
        with pytest.raises(FileNotFoundError):
            workers.call(leave_mark, tmp_path / "absent")
    (maker,) = (tmp_path / "marks").read_text().split()
    assert int(maker) != os.getpid()


def test_worker_that_fails_the_check_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check = partial(refuse_others, tmp_path)
    with processes() as cluster, open_workers(scheduler=cluster.scheduler_address) as workers:
        for image in ("one", "two"):
            store, failed, _ = segment(workers, slow, None, tmp_path / image, check=check)
            assert failed == {}
            assert store.missing(TILES) == []
    assert caplog.text.count("is not used: it came late") == 1


def test_worker_that_can_no_longer_do_its_tiles_loses_them_to_others(tmp_path: Path) -> None:
    check = partial(refuse_broken, tmp_path)
    with processes() as cluster, open_workers(scheduler=cluster.scheduler_address) as workers:
        store, failed, _ = segment(workers, break_others, tmp_path, tmp_path, check=check)
    assert (tmp_path / "broken").exists()
    assert failed == {}
    assert store.missing(TILES) == []


def test_worker_that_lost_what_tiles_share_is_given_it_again(tmp_path: Path) -> None:
    with processes() as cluster, open_workers(scheduler=cluster.scheduler_address) as workers:
        store, failed, _ = segment(workers, forgetful, tmp_path, tmp_path)
    assert (tmp_path / "forgot").exists()
    assert failed == {}
    assert store.missing(TILES) == []


def test_workers_that_die_as_they_begin_are_not_waited_for_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask starts each of them anew, again and again."""
    monkeypatch.setattr(admission, "_LOSS_S", 0.0)
    monkeypatch.setattr(admission, "_MOST_LOSSES", 2)
    with (
        processes() as cluster,
        open_workers(scheduler=cluster.scheduler_address) as workers,
        pytest.raises(ImageError, match=r"workers end as they begin.* give them more memory"),
    ):
        segment(workers, slow, None, tmp_path, check=partial(die_elsewhere, os.getpid()))


def test_workers_without_memory_are_not_waited_for_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask pauses them, as what they take is not its own to free."""
    monkeypatch.setattr("patchcl_qupath.execution.map_tiles._STILL_S", 1.0)
    with (
        dask.config.set({"distributed.worker.memory.terminate": False}),
        processes(memory_limit="50 MB") as cluster,
        open_workers(scheduler=cluster.scheduler_address) as workers,
        pytest.raises(ImageError, match="no more tasks, as their memory is nearly full: give them"),
    ):
        segment(workers, slow, None, tmp_path)


def pause(dask_worker: Any) -> None:
    """Have Dask find that the memory of a worker is nearly full."""
    dask_worker.memory_manager.memory_pause_fraction = 1e-9


def be_at(address: str) -> None:
    """A check that one worker passes."""
    if get_worker().address != address:
        raise ConfigError("it has no such slide")


@pytest.mark.parametrize("other", ["idle", "refused"])
def test_a_worker_without_memory_is_not_waited_for_beside_others(
    other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the tile that it was given last, or never answers whether it can be used."""
    monkeypatch.setattr("patchcl_qupath.execution.map_tiles._STILL_S", 2.0)
    with (
        dask.config.set({"distributed.worker.memory.terminate": False}),
        processes(memory_limit="8 GB") as cluster,
        open_workers(scheduler=cluster.scheduler_address) as workers,
    ):
        first, *_ = workers.client.nthreads()
        paused = partial(workers.client.run, pause, workers=[first])
        check = partial(be_at, first) if other == "refused" else lambda: None
        if other == "refused":
            paused()
        with pytest.raises(ImageError, match="no more tasks, as their memory is nearly full: give"):
            segment(workers, slow, None, tmp_path, on_done=lambda _: paused(), check=check)


@pytest.mark.parametrize("count", [2, 6])
def test_workers_of_this_machine_that_ended_are_not_waited_for_for_good(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads of this process, which nothing starts anew, or processes that cannot be started."""
    monkeypatch.setattr(execution_workers, "_NO_WORKER_S", 1.0)
    monkeypatch.setattr(execution_workers, "_FETCH_S", 0.5)
    message = r"all workers on this machine ended.* run again.*finished tiles are kept"
    with open_workers(count) as workers:
        cluster = workers.client.cluster
        with pytest.raises(ImageError, match=message):
            segment(workers, slow, None, tmp_path, on_done=lambda _: cluster.scale(0))
        if workers.are_processes:
            with pytest.raises(ImageError, match=message):
                workers.call(len, "abc")


def test_a_run_does_not_begin_with_a_scheduler_that_is_suspended() -> None:
    """Its connection is there, but nobody answers."""

    def nthreads(**_: Any) -> Any:
        raise TimeoutError

    workers = execution_workers.Workers(client=SimpleNamespace(nthreads=nthreads))
    with pytest.raises(ImageError, match="the Dask scheduler went away"):
        workers.images_at_once()


def test_a_large_crowd_that_leaves_at_once_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the network of all workers fails for a moment."""
    workers: Any = SimpleNamespace(are_elsewhere=True, present=dict)
    found = admission.Admission(workers=workers, check=lambda: None, make=lambda: None)
    monkeypatch.setattr(admission, "_MOST_LOSSES", 2)
    for leaving in range(9):
        asked: Any = {f"tcp://{leaving}": None}
        found._asked.update(asked)
        found.update()
    monkeypatch.setattr(admission, "_LOSS_S", 0.0)
    found._asked.update(asked)
    with pytest.raises(ImageError, match="workers end as they begin"):
        found.update()


def test_workers_of_another_version_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = admission.__version__
    monkeypatch.setattr(admission, "__version__", "9.9.9")
    monkeypatch.setattr(admission, "_GRACE_S", 0.0)
    one = f"worker tcp://.* is not used: it has patchcl-qupath {ours}, this machine 9.9.9: install"
    with (
        processes() as cluster,
        open_workers(scheduler=cluster.scheduler_address) as workers,
        pytest.raises(ImageError, match=f"no worker can be used: {one}"),
    ):
        segment(workers, slow, None, tmp_path)


def test_scheduler_without_workers_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with processes() as cluster, open_workers(scheduler=cluster.scheduler_address) as workers:
        monkeypatch.setattr(execution_workers, "_NO_WORKER_S", 1.0)
        for folder in (tmp_path, tmp_path / "next image"):
            with pytest.raises(ImageError, match=r"there was no worker at .*finished tiles are"):
                segment(workers, slow, None, folder, on_done=lambda _: cluster.scale(0))
        with (
            pytest.raises(ConfigError, match=r"there was no worker at .* start one with 'dask w"),
            open_workers(scheduler=cluster.scheduler_address),
        ):
            pass
    assert caplog.text.count("no worker is left at") == 1


def test_scheduler_whose_first_answer_has_news_of_a_worker_is_asked_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dask asserts that it has none, although workers may come and go just then."""
    connect, failed = distributed.Client._ensure_connected, []

    async def once_with_news(client: distributed.Client, timeout: float | None = None) -> None:
        if not failed:
            failed.append(client)
            raise AssertionError
        await connect(client, timeout)

    monkeypatch.setattr(distributed.Client, "_ensure_connected", once_with_news)
    with processes() as cluster, open_workers(scheduler=cluster.scheduler_address) as workers:
        assert workers.call(abs, -3) == 3
    assert len(failed) == 1


@pytest.mark.parametrize("count", [2, 6])  # threads of this process, and processes
def test_workers_leave_a_process_as_it_was(count: int) -> None:
    """A notebook: its variables, and what it computes with Dask meanwhile and later."""
    before = dict(os.environ), dask.config.get("scheduler", None)
    with open_workers(count) as workers:
        assert workers.call(abs, -3) == 3
        assert dask.config.get("scheduler", None) == before[1]
    assert (dict(os.environ), dask.config.get("scheduler", None)) == before


@pytest.mark.parametrize("address", ["nonsense://x", "tcp://host:port"])
def test_client_that_cannot_connect_is_closed(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As garbage it would be closed within whatever comes next: for good, in a lock of Dask's."""
    start, made = distributed.Client.start, []

    def noted(client: distributed.Client, **options: Any) -> None:
        made.append(client)
        start(client, **options)

    monkeypatch.setattr(distributed.Client, "start", noted)
    with pytest.raises(ConfigError, match=f"no Dask scheduler answers at {address}"):
        check_workers(address)
    assert [client.status for client in made] == ["closed"]


def test_workers_and_failed_tiles_are_logged(
    client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (attempts := tmp_path / "attempts").mkdir()
    with caplog.at_level(logging.INFO, logger="patchcl_qupath"):
        segment(replace(client, _threads={}), third_time_lucky, attempts, tmp_path)
    text = caplog.text
    assert "joined, with 2 threads" in text
    assert text.count("an attempt at tile 00000-00003 failed") == 2
    assert f"tile 00000-00005 failed {ATTEMPTS} times: attempt 3" in text


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_scheduler_that_dies_or_is_suspended_is_named(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-Z in its terminal, after which its connections stay."""
    if sys.platform == "win32":
        pytest.skip("there are no such signals")
    monkeypatch.setattr(execution_workers, "_FETCH_S", 2.0)
    where = tmp_path / "scheduler.json"
    shared = ["--scheduler-file", str(where), "--no-dashboard"]
    commands = [["dask_scheduler", "--port", "0"], ["dask_worker", "--no-nanny"]]
    here = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # the tasks are in this file
    started = []
    for name, *options in commands:
        command = [sys.executable, "-m", f"distributed.cli.{name}", *options, *shared]
        started.append(subprocess.Popen(command, env=here))
    try:
        while not (where.exists() and where.read_text("utf-8").endswith("}")):  # written whole
            time.sleep(0.01)
        address = json.loads(where.read_text("utf-8"))["address"]
        with (
            dask.config.set({"distributed.comm.timeouts.connect": "2s"}),  # looked for that long
            open_workers(scheduler=address) as client,
        ):
            end = partial(started[0].send_signal, getattr(signal, how))
            for folder in (tmp_path, tmp_path / "next image"):
                with pytest.raises(ImageError, match="the Dask scheduler went away: start it"):
                    segment(client, slow, None, folder, on_done=lambda _: end())
    finally:
        for process in started:
            process.kill()
            process.wait()


# ---------------------------------------------------------------- jobs of a queue


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for the commands that queue a job and cancel it: they run it here, and kill it."""
    if sys.platform == "win32":
        pytest.skip("the stand-ins are scripts of a shell")
    folder = tmp_path / "bin"
    folder.mkdir()
    run = f'bash -c "$(cat "$1")" > {tmp_path}/job.log 2>&1'
    submit = f'#!/bin/sh\n{run} &\necho "Submitted batch job $!"\n'
    for name in CLUSTERS.values():
        (folder / name).write_text(submit)
    (folder / "scancel").write_text('#!/bin/sh\nfor job; do pkill -P "$job"; kill "$job"; done\n')
    for command in folder.iterdir():
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the tasks are in this file
    return folder


def jobs(**settings: Any) -> Any:
    """As in ~/.config/dask/jobqueue.yaml."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    job = {"cores": 1, "memory": "2GB", "interface": loopback, **settings}
    pytest.importorskip("dask_jobqueue")  # which brings settings of its own
    return dask.config.set({f"jobqueue.{kind}.{k}": v for kind in CLUSTERS for k, v in job.items()})


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("slurm", "#SBATCH --cpus-per-task=1"),
        ("pbs", "#PBS -l select=1:ncpus=1:mem=1908MB"),
        ("lsf", "#BSUB -n 1"),
        ("sge", "#$ -N dask-worker"),
    ],
)
def test_each_queue_has_its_kind_of_job(queue: Path, kind: str, line: str) -> None:
    with jobs(), job_cluster(kind) as cluster:
        assert line in cluster.job_script().splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is of Linux")
def test_jobs_of_a_queue_segment(queue: Path, tmp_path: Path) -> None:
    with jobs(), open_workers(2, cluster="slurm") as client:
        store, failed, _ = segment(client, third_time_lucky, tmp_path, tmp_path)
    assert list(failed) == [5]
    assert store.missing(TILES) == [TILES[5]]


def test_job_that_is_not_described_is_asked_for(queue: Path) -> None:
    with (
        jobs(cores=None),
        pytest.raises(ConfigError, match=r"write into .*jobqueue.yaml .*slurm: \{cores"),
    ):
        job_cluster("slurm")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"cores": 0}, "(integer )?division (or modulo )?by zero"),  # by version of Python
        ({"processes": 0}, "division by zero"),
        ({"log-directory": os.devnull + "/logs"}, r"\[Errno \d+\] .*logs"),
        ({"job-script-prologue": 5}, "'int' object is not iterable"),
        ({"scheduler-options": [1]}, "'list' object is not a mapping"),
    ],
)
def test_a_job_that_cannot_be_is_told_of_by_doctor_too(
    queue: Path, settings: dict[str, Any], reason: str
) -> None:
    with (
        jobs(**settings),
        pytest.raises(ConfigError, match=rf"^write into .*yaml .*\({reason}.*\)$") as told,
    ):
        check_workers(cluster="slurm")
    message = f"slurm: {told.value}"
    with jobs(**settings):
        notes = {found.part: found.note for found in findings()}
    assert message in notes["job queue"]


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 1234"), OSError("No name")])
def test_jobs_of_a_user_without_a_name(
    queue: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """As Python 3.11 and Python 3.13 report a user that is in no list of the system."""

    def fail() -> str:
        raise error

    monkeypatch.setattr(getpass, "getuser", fail)
    message = "has no name: set LOGNAME to the name that the queue knows"
    with jobs(), pytest.raises(ConfigError, match=message):
        check_workers(cluster="slurm")
    with jobs(), pytest.raises(ConfigError, match=message), open_workers(1, cluster="slurm"):
        pass


@pytest.mark.parametrize("count", [1, 6])
def test_workers_of_this_machine_listen_to_it_alone(count: int) -> None:
    """Else a firewall asks, and other machines may read of a run."""
    with open_workers(count):
        own = psutil.Process()
        sockets = [
            each
            for process in (own, *own.children(recursive=True))
            for each in process.net_connections("inet")
            if each.status == psutil.CONN_LISTEN
        ]
        assert {each.laddr.ip for each in sockets} <= {"127.0.0.1", "::1"}
        assert sockets


@pytest.mark.parametrize("options", [["--cluster", "lsf"], ["--scheduler", "tcp://127.0.0.1:1"]])
def test_workers_that_cannot_be_had_are_told_of_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(pipeline, "train_as", lambda *_: pytest.fail("it trains"))
    monkeypatch.setenv("PATH", "")
    found = CliRunner().invoke(cli.main, ["run", str(folder), *options])
    assert found.exit_code == 2, found.output
    assert found.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("jobqueue:\n\tslurm: {}\n", "Dask's settings cannot be read (A dask config file at '{}'"),
        ("distributed: {logging: 5}\n", "Dask's settings cannot be read (argument of type 'int'"),
        ("distributed: {scheduler: 5}\n", "Dask's settings cannot be read ('int' object has no"),
        ("temporary-directory: 5\n", "no worker can be started here (expected str, bytes or os."),
    ],
)
def test_a_slip_in_the_settings_of_dask_is_named_before_training(
    folder: Path, yaml: str, message: str
) -> None:
    file = folder / "dask" / "slip.yaml"
    file.parent.mkdir()
    file.write_text(yaml)
    command = [sys.executable, "-m", "patchcl_qupath.cli", "run", folder, "--workers", "1"]
    own = os.environ | {"DASK_CONFIG": str(file.parent)}
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith(f"Error: {message.replace('{}', str(file))}")
    assert last.endswith("in ~/.config/dask")
    assert not [*folder.glob("patchcl/models/*")]
    doctor = [*command[:3], "doctor", "--json"]
    parts = json.loads(subprocess.check_output(doctor, env=own, text=True))
    notes = {part["part"]: part["note"] for part in parts if part["found"] is None}
    assert last.removeprefix("Error: ") in notes["workers"]


def test_a_machine_without_temporary_files_is_told_of_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> str:  # root may write everywhere
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", fail)
    monkeypatch.setattr(pipeline, "train_as", lambda *_: pytest.fail("it trains"))
    found = CliRunner().invoke(cli.main, ["run", str(folder)])
    assert found.exit_code == 2, found.output
    message = (
        f"no temporary file can be written ([Errno {errno.ENOENT}] No usable temporary directory "
        "found in ['/tmp']): set TMPDIR to a folder that you can write to"
    )
    assert found.stderr.splitlines()[-1] == f"Error: {message}"
    with pytest.raises(ConfigError, match="set TMPDIR"), open_workers(1):
        pass
    notes = {found.part: found.note for found in findings()}
    assert message in notes["workers"]
    with dask.config.set({"temporary-directory": str(folder)}):
        check_workers()


OFFLINE = """
import warnings
from distributed.comm import inproc
from patchcl_qupath.execution.workers import open_workers

def offline():
    text = "Couldn't detect a suitable IP address for reaching '8.8.8.8', defaulting to hostname"
    warnings.warn(text, RuntimeWarning, stacklevel=1)
    return "127.0.0.1"

inproc.get_ip = offline
with open_workers(1) as workers:
    print(workers.call(len, "abc"))
"""


def test_a_machine_without_a_network_is_not_warned_of() -> None:
    """In a process of its own: under another address, workers that are open here would close."""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", OFFLINE]
    assert subprocess.check_output(command, text=True) == "3\n"


def test_threads_do_all_where_no_process_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a container without shared memory."""

    async def fail(_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(distributed.Nanny, "start_unsafe", fail)
    with open_workers(6) as workers:
        assert sum(workers.client.nthreads().values()) == 6
        _, failed, _ = segment(workers, third_time_lucky, tmp_path, tmp_path)
    assert list(failed) == [5]
    assert "no processes can be started (PermissionError(13, 'Permission denied'))" in caplog.text


def test_a_list_of_jobs_with_a_character_cut_in_two() -> None:
    code = "import sys; sys.stdout.buffer.write('12 R Größe'.encode()[:-2])"
    assert _output_of([sys.executable, "-c", code]) == "12 R Grö\ufffd"


def test_cluster_without_its_queue_or_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match=r"pip install 'patchcl-qupath\[cluster\]'"):
        job_cluster("slurm")
    monkeypatch.undo()
    pytest.importorskip("dask_jobqueue")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="there is no bsub here: run this where you submit lsf"):
        job_cluster("lsf")


def test_scheduler_and_cluster_are_two_ways() -> None:
    command = ["run", str(SAMPLE), "--scheduler", "tcp://127.0.0.1:1", "--cluster", "slurm"]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 2
    assert "pass --scheduler or --cluster, not both" in result.stderr


def test_workers_can_be_opened_again_in_a_process() -> None:
    """Also where nothing else has imported distributed, whose settings are loaded once."""
    code = "from patchcl_qupath.execution.workers import open_workers\n"
    code += (
        "for _ in range(2):\n    with open_workers(1) as workers:\n        print(workers.client)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def die(_: str) -> None:
    """What a decoder does that a damaged slide breaks, or a system that is out of memory."""
    os._exit(1)


def test_a_call_that_kills_its_worker_does_not_kill_this_process() -> None:
    with open_workers(6) as workers:
        assert workers.are_processes
        with pytest.raises(ImageError, match="its worker died each time"):
            workers.call(die, "a")
        assert workers.call(len, "abc") == 3  # others take its place
