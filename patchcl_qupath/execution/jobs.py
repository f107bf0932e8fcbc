"""Jobs of a queue as workers of Dask: submitted, looked after, cancelled.

dask-jobqueue writes, submits and cancels them, as the user's settings say. It does not notice jobs
that are refused, that wait, or that end before their worker comes; so the queue is asked here.
"""

from __future__ import annotations

import getpass
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchcl_qupath.errors import ConfigError

_POLL_S = 10.0  # between looks at the jobs: schedulers of large clusters ask for patience
_ANSWER_S = 20.0  # for the queue to say something
_ATTEMPTS = 3  # at a job whose worker does not come, in a row


@dataclass(frozen=True)
class _Listing:
    """What lists a user's unfinished jobs: lines that begin with a number, and have its state."""

    command: str
    state: slice  # of the line's words
    why: str = ""  # what says why a job waits, where the list does not


_LISTINGS = {
    "slurm": _Listing("squeue --noheader --format '%i %T (%r)' --user", slice(1, None)),
    "pbs": _Listing("qstat -u", slice(9, 10), "qstat -f"),
    "lsf": _Listing("bjobs -w -u", slice(2, 3), "bjobs -l"),
    "sge": _Listing("qstat -u", slice(4, 5), "qstat -j"),
}


@dataclass
class _Slot:
    """One of the jobs that there are to be."""

    job: Any = None  # of dask-jobqueue
    came: bool = False  # whether its worker was seen
    failures: int = 0  # jobs in a row that were refused, or whose worker never came

    def at_work(self, workers: list[str]) -> bool:
        """Whether a worker of the job is among those of these names; a job may have several."""
        name = self.job and self.job.name
        return any(worker == name or worker.startswith(f"{name}-") for worker in workers)


class Jobs:
    """``count`` jobs in the queue of a dask-jobqueue ``cluster``; each that ends has a successor.

    ``kind`` is one of CLUSTERS. ``notify`` is told what is waited for while there is no worker.
    """

    def __init__(self, kind: str, cluster: Any, count: int, notify: Callable[[str], None]) -> None:
        self.kind = kind
        self.cluster = cluster
        self.notify = notify
        self.slots = [_Slot() for _ in range(count)]
        self.submitted = 0
        self.polled = 0.0
        self.notified = ""
        self.problem = ""  # the last

    def start(self) -> None:
        """Submit them, and return when there is a worker. Raises ConfigError if none can come."""
        for slot in self.slots:
            self._submit(slot)
        if not any(slot.job for slot in self.slots):
            raise ConfigError(self.problem)
        self.polled = time.monotonic()
        while not self._workers():
            self.poll()
            time.sleep(0.1)

    def poll(self) -> None:
        """Replace jobs that ended, say what the others wait for; to be called again and again.

        Raises ConfigError where no job is left, and none can be had.
        """
        if time.monotonic() < self.polled + _POLL_S:
            return
        workers = self._workers()
        missing = []
        for slot in self.slots:
            if slot.at_work(workers):
                slot.came, slot.failures = True, 0
            else:
                missing.append(slot)
        states = self._states() if missing else {}
        self.polled = time.monotonic()
        if states is None:
            return
        for slot in missing:
            if slot.job and slot.job.job_id not in states:
                self._note_end(slot)
            if slot.job is None and slot.failures < _ATTEMPTS:
                self._submit(slot)
        if not any(slot.job or slot.failures < _ATTEMPTS for slot in self.slots):
            raise ConfigError(self.problem)
        if not workers and any(slot.job for slot in missing):
            self._notify_waiting([slot.job.job_id for slot in missing if slot.job], states)

    def cancel(self) -> None:
        """Cancel them, all with one command: after Ctrl-C there is a second for it."""
        jobs = [slot.job for slot in self.slots if slot.job]
        if jobs:
            _output_of([*shlex.split(jobs[0].cancel_command), *(job.job_id for job in jobs)])

    def _workers(self) -> list[str]:
        """The names of the workers that are there."""
        return [worker.name for worker in [*self.cluster.scheduler.workers.values()]]

    def _submit(self, slot: _Slot) -> None:
        spec, scheduler = self.cluster.new_spec, self.cluster.scheduler
        address = getattr(scheduler, "contact_address", None) or scheduler.address
        job = spec["cls"](address, name=f"{self.cluster.name}-{self.submitted}", **spec["options"])
        self.submitted += 1
        try:
            self.cluster.sync(job.start)
        except (OSError, RuntimeError, ValueError) as error:
            slot.failures += 1
            output = str(error).partition("stdout:")[2].replace("stderr:", "") or str(error)
            self.problem = (
                f"{self.kind} takes no job: {' '.join(output.split()).rstrip('.')}. See that what "
                "~/.config/dask/jobqueue.yaml asks for can be had there"
            )
            self._notify("takes no job")
        else:
            slot.job, slot.came = job, False

    def _note_end(self, slot: _Slot) -> None:
        job, slot.job = slot.job, None
        if slot.came:
            return
        slot.failures += 1
        self.problem = (
            f"jobs of {self.kind} end before their workers come; the last was {job.job_id}, and "
            f"{_output(job)}. See that nodes have this program under the same path, and reach "
            "this machine, or say otherwise in ~/.config/dask/jobqueue.yaml"
        )
        self._notify(f"job {job.job_id} ended before its worker came")

    def _notify_waiting(self, ids: list[str], states: dict[str, str]) -> None:
        counts = Counter(states.get(job, "submitted anew") for job in ids)
        why = _LISTINGS[self.kind].why
        more = [f"see {why} {job}" for job in ids if why and job in states][:1]
        self._notify(", ".join([*(f"{n} {state}" for state, n in counts.items()), *more]))

    def _notify(self, what: str) -> None:
        if what != self.notified:
            self.notified = what
            self.notify(f"{self.kind}: {what}")

    def _states(self) -> dict[str, str] | None:
        """By number, all of the user's jobs that are not over; None where nobody answers."""
        listing = _LISTINGS[self.kind]
        output = _output_of([*shlex.split(listing.command), getpass.getuser()])
        if output is None:
            self._notify(f"{listing.command.split()[0]} does not answer")
            return None
        states = {}
        for line in output.splitlines():
            if number := re.match(r"\s*(\d+)", line):
                state = " ".join(line.split()[listing.state])
                states[number[1]] = state.removesuffix(" (None)")
        return states


def _output_of(command: list[str]) -> str | None:
    """What a command of the queue prints; None if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "No unfinished job" not in done.stderr:  # LSF's way to say: none
        return None
    return done.stdout


def _output(job: Any) -> str:
    """Where a job's output is, and the line of it that may say most."""
    number = re.compile(rf"(?<!\d){job.job_id}(?!\d)")
    with suppress(OSError):
        files = [f for f in Path(job.log_directory or ".").iterdir() if number.search(f.name)]
        if files:
            file = max(files, key=lambda file: file.stat().st_size)
            lines = file.read_text("utf-8", errors="replace").split("\n")
            lines = [line.strip() for line in lines if line.strip()] or ["(nothing)"]
            telling = [line for line in lines if "rror" in line] or lines
            return f"said in {file}: {telling[-1][:300]}"
    return "left no output that is seen from here"
