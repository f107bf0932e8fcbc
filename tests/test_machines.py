"""Runs on several machines: what a worker cannot see, links that are cut, two nodes of SLURM.

The machines are namespaces of this one, see machines.py. As root on Linux they are there; else,
where a user may have namespaces of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machines
import pytest
from click.testing import CliRunner
from machines import HUB, Machine, network, start_slurm
from slides import write_tiff
from survivor import left_by_run

from patchcl_qupath import __version__, pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Box
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.slides.slide import Slide

pytestmark = pytest.mark.machines

ROOT = Path(__file__).parent.parent
SCHEDULER = f"tcp://{HUB}:8786"
# A connection is given up sooner than Dask does by default, and so is waiting.
TIMEOUTS = {
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
}
COMMAND = """
from patchcl_qupath.execution import admission, workers
admission._GRACE_S = 1
workers._NO_WORKER_S = 6
from patchcl_qupath.cli import main
main()
"""
WITHOUT_PACKAGE = ["--preload", "import sys; sys.modules['patchcl_qupath'] = None"]


@pytest.fixture(scope="session", autouse=True)
def _namespaces() -> None:
    """Before a model is trained for nothing."""
    if problem := machines.problem():
        pytest.skip(f"no machines to be had: {problem}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A project with a model in ``project``, its slide in ``slides``, settings beside both."""

    folder: Path

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def slides(self) -> Path:
        return self.folder / "slides"

    def options(self, *more: Any) -> list[str]:
        settings = self.folder / "settings.toml"
        return ["run", *map(str, [self.project, "--config", settings, *more])]

    @property
    def left(self) -> dict[str, bytes]:
        """All that a run left."""
        return left_by_run(self.project / "patchcl")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, model: pipeline.Model) -> Place:
    place = Place(folder=tmp_path_factory.mktemp("machines"))
    (entry,) = open_project(ROOT / "sample_project", "files").images()
    pixels = Slide.open(entry).read(Box(1200, 900, 1900, 1600))
    place.slides.mkdir()
    slide = write_tiff(place.slides / "a.tif", pixels, (0.5, 0.5), factors=(1, 4))
    init_project(place.project, [NewImage(slide, [(700, 700)], None)])
    model.save(place.project / "patchcl" / "models", "patchcl")
    (place.folder / "settings.toml").write_text("[slide]\ntile_px = 100\n")
    return place


@pytest.fixture(scope="module")
def expected(original: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run on one worker of this machine leaves."""
    place = copy_of(original, tmp_path_factory.mktemp("expected"))
    result = CliRunner().invoke(main, place.options("--workers", 1))
    assert result.exit_code == 0, result.output
    return place.left


@pytest.fixture
def place(original: Place, tmp_path: Path) -> Place:
    return copy_of(original, tmp_path)


def copy_of(original: Place, folder: Path) -> Place:
    """A copy, with the slide where it was: it is a part of what a run leaves."""
    shutil.copytree(original.project, folder / "project")
    shutil.copy(original.folder / "settings.toml", folder)
    return Place(folder=folder)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    return {**os.environ, **TIMEOUTS, "PYTHONPATH": paths, **more}


def start_scheduler(machine: Machine) -> None:
    """A Dask scheduler of which any machine can have workers."""
    module = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    machine.start(*module, "--host", HUB, "--port", 8786, stderr=DEVNULL, env=environment())


def start_worker(machine: Machine, place: Place, *options: str, **more: str) -> None:
    module = [sys.executable, "-m", "distributed.cli.dask_worker", SCHEDULER, "--no-dashboard"]
    own = ["--nthreads", 1, "--no-nanny", "--local-directory", place.folder / machine.name]
    machine.start(*module, *own, *options, stderr=DEVNULL, env=environment(**more), cwd="/")


DEVNULL = subprocess.DEVNULL


@dataclass(frozen=True)
class Ended:
    """A run that has ended."""

    status: int
    lines: list[str]  # of standard error, without those of progress

    @property
    def joined(self) -> set[str]:
        """The addresses of the machines whose workers joined."""
        return set(re.findall(r"worker tcp://([\d.]+):\d+ joined", "\n".join(self.lines)))

    def having(self, what: str) -> list[str]:
        """The lines that have a text."""
        return [line for line in self.lines if what in line]


def run(
    machine: Machine,
    place: Place,
    *options: Any,
    at_tile: int = 3,
    act: Callable[[], None] | None = None,
    **more: str,
) -> Ended:
    """A run on a machine; ``act`` is called when some tiles are done."""
    command = place.options("--progress", "json", *(options or ["--scheduler", SCHEDULER, "-v"]))
    process = machine.start(
        *[sys.executable, "-c", COMMAND, *command],
        stdout=DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(**more),
        cwd="/",
    )
    lines = []
    for line in process.stderr or []:
        if not line.startswith("{"):
            lines.append(line.rstrip())
        elif act and ": segmenting" in line and json.loads(line)["done"] >= at_tile:
            act()
            act = None
    status = process.wait(timeout=10)
    printed = "\n".join(lines)
    assert act is None, printed
    assert "Traceback" not in printed, printed
    return Ended(status, lines)


def wait_for_workers(machine: Machine, count: int) -> None:
    code = f"from distributed import Client; Client({SCHEDULER!r}).wait_for_workers({count}, 60)"
    machine.do(sys.executable, "-c", code)


def tiles_done(place: Place) -> int:
    return len([*place.project.glob("patchcl/runs/*/1/tiles/*.parquet")])


def test_workers_need_neither_the_project_nor_each_other_nor_to_write_slides(
    place: Place, original: Place, expected: dict[str, bytes]
) -> None:
    with network("head", "first", "second") as net:
        head, first, second = net.machines
        first.hide(place.project)
        second.make_read_only(original.slides)
        net.isolate_workers()
        start_scheduler(head)
        for machine in (first, second):
            start_worker(machine, place)
        wait_for_workers(head, 2)
        assert first.can_reach(HUB)
        assert not first.can_reach(second.address)
        ended = run(head, place)
    assert ended.status == 0, ended.lines
    assert ended.joined == {first.address, second.address}
    assert place.left == expected


def test_workers_that_cannot_be_used_are_named_and_left_out(
    place: Place, original: Place, expected: dict[str, bytes], tmp_path: Path
) -> None:
    older, other = tmp_path / "older", tmp_path / "other.tif"
    shutil.copytree(ROOT / "patchcl_qupath", older / "patchcl_qupath")
    init = older / "patchcl_qupath" / "__init__.py"
    init.write_text(init.read_text("utf-8").replace(__version__, "0.0.1"), "utf-8")
    slide = original.slides / "a.tif"
    shutil.copy(slide, other)
    with other.open("ab") as file:
        file.write(b"more")

    with network("head", "old", "bare", "far", "wrong", "good") as net:
        head, old, bare, far, wrong, good = net.machines
        far.hide(original.slides)
        wrong.show_as(slide, other)
        start_scheduler(head)
        paths = environment()["PYTHONPATH"]
        start_worker(old, place, PYTHONPATH=os.pathsep.join([str(older), paths]))
        start_worker(bare, place, *WITHOUT_PACKAGE)
        for machine in (far, wrong):
            start_worker(machine, place)
        wait_for_workers(head, 4)
        without = run(head, place)
        start_worker(good, place)
        wait_for_workers(head, 5)
        ended = run(head, place)

    for each in (without, ended):
        refused = sorted(
            re.sub(r"tcp\S+", "…", line.partition("WARNING ")[2].partition(": ")[2])
            for line in each.having("is not used")
            if " WARNING " in line
        )
        advice = "install that version there, and start the worker anew"
        assert refused == [
            f"worker … on bare is not used: it has no patchcl-qupath, this machine {__version__}: "
            + advice,
            f"worker … on far is not used: a.tif is not at {slide}, as seen from far: bring it "
            "back, or share its folder with that machine, and run again",
            "worker … on old is not used: it has patchcl-qupath 0.0.1, this machine "
            f"{__version__}: {advice}",
            f"worker … on wrong is not used: a.tif: the file at {slide}, as seen from wrong, has "
            f"{other.stat().st_size} bytes, not {slide.stat().st_size}: copy it there again, and "
            "run again",
        ]
    assert without.status == 1
    (failed,) = without.having("Failed: ")
    reason = r"no worker can be used: worker .*\(and 3 more are not used\)"
    assert re.match(rf"Failed: a.tif: {reason}", failed)
    assert ended.status == 0, ended.lines
    assert place.left == expected


@pytest.mark.parametrize("seconds", [3, None], ids=["for a moment", "for good"])
def test_link_of_a_worker_that_is_cut_costs_nothing(
    place: Place, expected: dict[str, bytes], seconds: float | None
) -> None:
    with network("head", "first", "second") as net:
        head, first, second = net.machines
        start_scheduler(head)
        for machine in (first, second):
            start_worker(machine, place)
        wait_for_workers(head, 2)

        def cut() -> None:
            net.set_link(first, "down")
            if seconds is not None:
                time.sleep(seconds)
                net.set_link(first, "up")

        ended = run(head, place, act=cut)
    assert ended.status == 0, ended.lines
    assert ended.joined == {first.address, second.address}
    assert place.left == expected


def test_links_that_are_cut_for_good_end_the_run_in_a_line_and_it_resumes(
    place: Place, expected: dict[str, bytes]
) -> None:
    """First that of the only worker, then that of the machine with the run."""
    with network("head", "worker", "desk") as net:
        head, worker, desk = net.machines
        start_scheduler(head)
        start_worker(worker, place)
        wait_for_workers(head, 1)
        ended = run(desk, place, act=lambda: net.set_link(worker, "down"))
        assert ended.status == 1
        (line,) = ended.having("Failed: ")
        assert f"there was no worker at {SCHEDULER} for" in line
        assert f"start one with 'dask worker {SCHEDULER}', or mend the network" in line
        done = tiles_done(place)
        assert done >= 3

        net.set_link(worker, "up")
        start_worker(worker, place)
        wait_for_workers(head, 1)
        began = time.monotonic()
        cut = done + 3
        ended = run(desk, place, at_tile=cut, act=lambda: net.set_link(desk, "down"))
        assert time.monotonic() - began < 60
        assert ended.status == 1
        (line,) = ended.having("Failed: ")
        assert "the Dask scheduler went away: start it and its workers again" in line
        assert tiles_done(place) >= cut

        net.set_link(desk, "up")
        ended = run(desk, place)
    assert ended.status == 0, ended.lines
    assert re.search(r"tiles, (\d+) resumed", "\n".join(ended.lines))[1] != "0"
    assert place.left == expected


def test_two_nodes_of_slurm(
    place: Place, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = [
        name for name in ("slurmctld", "slurmd", "sbatch", "munged") if not shutil.which(name)
    ]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root, and SLURM: {', '.join(missing) or 'it'} is not here")
    pytest.importorskip("dask_jobqueue")
    job = {
        "cores": 1,
        "memory": "2GB",
        "walltime": "00:05:00",
        "interface": "eth0",
        "log-directory": str(tmp_path / "slurm"),
        "job-script-prologue": [f"export PYTHONPATH='{environment()['PYTHONPATH']}'"],
    }
    (tmp_path / "jobqueue.yaml").write_text(json.dumps({"jobqueue": {"slurm": job}}))
    (tmp_path / "slurm").mkdir()
    with network("head", "node1", "node2") as net:
        head, _, second = net.machines
        second.hide(place.project)
        more = {**start_slurm(net, tmp_path / "slurm"), "DASK_CONFIG": str(tmp_path)}
        monkeypatch.setenv("SLURM_CONF", more["SLURM_CONF"])
        deadline = time.monotonic() + 60
        while head.do("sinfo", "--noheader", "--Node", "--states=idle").count("node") != 2:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        ended = run(head, place, "--cluster", "slurm", "--workers", 2, "-v", **more)
        assert not head.do("squeue", "--noheader").strip() or time.sleep(5) is None
    assert ended.status == 0, ended.lines
    assert ended.joined == {machine.address for machine in net.machines[1:]}
    assert place.left == expected
