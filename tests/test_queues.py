"""Jobs of real queues: those whose only node is this machine, as .ci/queue starts one of SLURM."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import dask
import pytest
from conftest import QUICK

from patchcl_qupath import pipeline
from patchcl_qupath.errors import ConfigError
from patchcl_qupath.execution import jobs, workers
from patchcl_qupath.execution.workers import Workers, open_workers
from patchcl_qupath.progress import Progress, ShowProgress, Stage, hide_progress
from patchcl_qupath.project import open_project
from patchcl_qupath.storage.parquet import read_nuclei

pytestmark = pytest.mark.queue


@dataclass(frozen=True)
class Kind:
    """How a queue lists which nodes are up, and what is queued; names of the same thing in each."""

    nodes: str
    node: str  # a pattern: group 1 is a node that is up
    queued: str
    hold: str  # a job, when it is submitted
    held: str  # a pattern of its state
    job_id: str  # a variable in a job's environment


KINDS = {
    "slurm": Kind(
        *("sinfo --noheader --Node --responding --format %N", r"(\S+)"),
        *("squeue --noheader --format %j", "--hold", r"PENDING \(JobHeldUser\)", "SLURM_JOB_ID"),
    ),
    "sge": Kind("qhost", r"(?m)^(\S+) +lx", "qstat", "-h", "hqw", "JOB_ID"),
    "pbs": Kind(
        "pbsnodes -a", r"(?m)^(\S+)\n.*(?:\n .*)*state = free", "qstat", "-h", "H", "PBS_JOBID"
    ),
    "lsf": Kind("bhosts -w", r"(?m)^(\S+) +ok", "bjobs -w", "-H", "PSUSP", "LSB_JOBID"),
}


def printed(command: str) -> str:
    """By a command of a queue; nothing where there is none, or where it does not answer."""
    try:
        return subprocess.run(
            command.split(), capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


@cache
def nodes(kind: str) -> set[str]:
    """The names of a queue's nodes that are up."""
    up = re.findall(KINDS[kind].node, printed(KINDS[kind].nodes))
    return {name.partition(".")[0] for name in up}


@dataclass(frozen=True)
class Queue:
    """A queue that answers, and what its user has in jobqueue.yaml."""

    kind: str
    settings: Path

    def change(self, **job: Any) -> Any:
        """Other settings for a while."""
        return dask.config.set({f"jobqueue.{self.kind}.{name}": job[name] for name in job})

    @property
    def jobs(self) -> int:
        """How many of ours are queued."""
        return printed(KINDS[self.kind].queued).count(NAME)


NAME = f"q{os.getpid()}"  # short: it is cut in lists


@pytest.fixture(params=KINDS)
def queue(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Each in turn that answers."""
    kind = request.param
    if nodes(kind) != {socket.gethostname().partition(".")[0]}:
        pytest.skip(f"no {kind} whose node is this machine alone: .ci/queue starts one of slurm")
    pytest.importorskip("dask_jobqueue")  # which brings settings of its own
    monkeypatch.setattr(jobs, "_POLL_S", 1.0)
    monkeypatch.setattr(workers, "_FETCH_S", 2.0)
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    job = {
        "name": NAME,
        "cores": 1,
        "memory": "1GB",
        "walltime": "00:05:00",
        "interface": "lo",
        "log-directory": str(tmp_path),
        "job-script-prologue": [f"export PYTHONPATH='{paths}'"],
    }
    (tmp_path / "jobqueue.yaml").write_text(json.dumps({"jobqueue": {kind: job}}))
    found = Queue(kind, tmp_path)
    with found.change(**job):
        yield found
    until(lambda: found.jobs == 0)  # nothing is left behind


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def segment(
    folder: Path,
    model: pipeline.Model,
    workers: Workers,
    progress: ShowProgress = hide_progress,
) -> list[str]:
    """-> the ids of a project's nuclei."""
    project = open_project(folder, "files")
    config = replace(QUICK, slide=replace(QUICK.slide, tile_px=300))
    (result,) = pipeline.Run(
        project=project, model=model, config=config, workers=workers, progress=progress
    ).images(project.images())
    assert (result.problem, result.failed_tiles) == (None, ())
    assert result.tiles > 30
    return [*read_nuclei(Path(result.results) / "nuclei.parquet").uuids]


def test_a_job_that_is_cancelled_has_a_successor_and_all_equals_threads(
    queue: Queue, client: Workers, model: pipeline.Model, folder: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    expected = segment(copy, model, client)
    assert len(expected) > 1000
    cancel = {"slurm": "scancel", "lsf": "bkill"}.get(queue.kind, "qdel")
    seen: set[str] = set()

    with open_workers(1, cluster=queue.kind) as workers:

        def cancel_first(progress: Progress) -> None:
            segmenting = progress.stage is Stage.SEGMENTING
            if segmenting and progress.done in (3, progress.total):
                seen.update(workers.client.run(os.getenv, KINDS[queue.kind].job_id).values())
            if segmenting and progress.done == 3:
                time.sleep(1)  # until it has finished tiles that were not fetched
                subprocess.check_call([cancel, *seen])
                until(lambda: not workers.client.nthreads())

        assert segment(folder, model, workers, cancel_first) == expected
    assert len(seen) == 2


def test_ctrl_c_cancels_the_jobs(queue: Queue, model: pipeline.Model, folder: Path) -> None:
    model.save(folder / "patchcl" / "models", "patchcl")
    (queue.settings / "tiny.toml").write_text("[slide]\ntile_px = 100\n")
    command = [sys.executable, "-m", "patchcl_qupath.cli", "run", folder, "--progress", "json"]
    options = ["--cluster", queue.kind, "--workers", "2", "--config", queue.settings / "tiny.toml"]
    with subprocess.Popen(
        [*command, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"DASK_CONFIG": str(queue.settings)},
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "segmenting" in line and json.loads(line)["done"] > 2:
                break
        assert queue.jobs == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert "The same command resumes finished tiles" in process.stderr.read()
    until(lambda: queue.jobs == 0)  # which is not yet their time limit


def test_a_job_that_is_refused_says_why(queue: Queue) -> None:
    with (
        queue.change(queue="nosuch"),
        pytest.raises(ConfigError, match=f"{queue.kind} takes no job: .*See that what"),
        open_workers(2, cluster=queue.kind),
    ):
        pass


def test_jobs_that_end_before_their_workers_come_say_why(queue: Queue) -> None:
    notified: list[str] = []
    with (
        queue.change(python="/no/python"),
        pytest.raises(ConfigError, match=r"end before their workers come.* /no/python: No such"),
        open_workers(2, cluster=queue.kind, notify=notified.append),
    ):
        pass
    assert len([what for what in notified if "ended before its worker came" in what]) == 6


def test_what_a_job_waits_for_is_shown(queue: Queue) -> None:
    class Notified(Exception):  # noqa: N818  no error: it ends the waiting
        pass

    def hear(what: str) -> None:
        raise Notified(what)

    held = f"{queue.kind}: 2 {KINDS[queue.kind].held}"
    with (
        queue.change(**{"job-extra-directives": [KINDS[queue.kind].hold]}),
        pytest.raises(Notified, match=held),
        open_workers(2, cluster=queue.kind, notify=hear),
    ):
        pass
