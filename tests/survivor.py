"""Kills runs at random moments; test_survival.py starts it.

    python survivor.py KILLS PROJECT OPTION...

Each run is the command line in a fork of this process, which has imported all that is slow and has
no thread. A run that comes to its end must leave what one leaves that nobody killed; then, and
after ten kills, all is thrown away but the model, and the next begins anew. Prints what the killed
ones were doing.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported

import distributed  # noqa: F401  these are imported here, and not in each fork
from numba.extending import is_jitted

from patchcl_qupath import pipeline  # noqa: F401
from patchcl_qupath.cli import main
from patchcl_qupath.project import results  # noqa: F401


def start(command: list[str], log: Path) -> int:
    """A run, and what it prints in a file; -> its process id."""
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = 1
        try:
            main(command)
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            os._exit(status)
    return child


def timed(file: Path) -> bool:
    """Whether a file has times in it, and what was resumed."""
    return file.name in ("run.json", "index.html") or file.parent.name == "outcomes"


def left_by_run(output: Path) -> dict[str, bytes]:
    """All files, those included that should not be there; without the time when one was made."""
    found = {}
    for file in output.rglob("*"):
        if file.is_file() and not timed(file):
            content = file.read_bytes()
            if file.name == "result.json":
                content = json.dumps(json.loads(content) | {"made": None}).encode()
            found[str(file.relative_to(output))] = content
    return found


def last_stages(log: Path, project: Path, since: float) -> list[str]:
    """What a run that began at ``since`` was doing with images that it had not finished."""
    lines = [line for line in log.read_text("utf-8").splitlines() if line.startswith("{")]
    doing = {}
    for line in lines:
        image, _, stage = json.loads(line)["stage"].rpartition(": ")
        doing[image] = stage.split()[0]
    images = json.loads((project / "project.qpproj").read_text("utf-8"))["images"]
    for image in images:
        result = project / "patchcl" / "results" / str(image["entryID"]) / "result.json"
        if result.exists() and result.stat().st_mtime >= since:
            doing.pop(image["imageName"], None)
    return sorted({*doing.values()}) or ["starting"]


def begin_anew(output: Path) -> None:
    """Throw away all but the model."""
    for folder in ("runs", "results", "previews"):
        shutil.rmtree(output / folder, ignore_errors=True)


def load_compiled() -> None:
    """Load all loops that Numba compiled and keeps on disk: a sixth of what such a run takes."""
    modules = [module for name, module in sys.modules.items() if name.startswith("patchcl_qupath")]
    loops = {value for module in modules for value in vars(module).values() if is_jitted(value)}
    for loop in loops:
        for signature, *_ in loop._cache._cache_file._load_index():
            loop.compile(signature)


def kill_runs(kills: int, project: Path, options: list[str]) -> list[list[str]]:
    """-> what each of the killed runs was doing with its images."""
    output, log = project / "patchcl", project / "output.log"
    command = ["run", str(project), "--progress", "json", *options]
    assert threading.active_count() == 1, "a fork has one thread only"
    began = time.monotonic()
    assert os.waitpid(start(command, log), 0)[1] == 0, log.read_text("utf-8")
    whole = time.monotonic() - began
    load_compiled()  # by this run, at the latest
    expected = left_by_run(output)
    assert any(name.startswith("results") for name in expected)

    rng, stages = random.Random(0), []
    while True:
        since = time.time()
        child, ended = start(command, log), 0
        deadline = time.monotonic() + rng.uniform(0, 0.8) * whole
        while not ended and (time.monotonic() < deadline or len(stages) == kills):
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, log.read_text("utf-8")
            assert left_by_run(output) == expected
            if len(stages) == kills:
                return stages
            begin_anew(output)
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            stages.append(last_stages(log, project, since))
            if len(stages) % 10 == 0 and len(stages) < kills:
                begin_anew(output)  # or no tile is left to be killed at


if __name__ == "__main__":
    print(json.dumps(kill_runs(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
