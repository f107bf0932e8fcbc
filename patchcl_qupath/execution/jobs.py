"""Jobs of a queue as workers of Dask: submitted, polled, replaced, cancelled.

dask-jobqueue writes, submits and cancels them by the user's settings. It does not notice jobs that
are refused, that wait, or that end before their worker has joined; so the queue is polled here.
"""

from __future__ import annotations

import getpass
import logging
import re
import shlex
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from patchcl_qupath.errors import ConfigError

logger = logging.getLogger(__name__)

_POLL_S = 10.0  # between polls of the queue: schedulers of large clusters ask for patience
_ANSWER_S = 20.0  # for a command of the queue to end
_ATTEMPTS = 3  # at a job whose worker does not join, in a row


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """How a queue lists the unfinished jobs of a user: a line for each, which begins with its id.

    ``state`` are the words of the line that have the job's state. ``reason_command`` prints why a
    job waits, where the list does not.
    """

    command: str
    state: slice
    reason_command: str = ""


_LISTINGS = {
    "slurm": _Listing(
        command="squeue --noheader --format '%i %T (%r)' --user", state=slice(1, None)
    ),
    "pbs": _Listing(command="qstat -u", state=slice(9, 10), reason_command="qstat -f"),
    "lsf": _Listing(command="bjobs -w -u", state=slice(2, 3), reason_command="bjobs -l"),
    "sge": _Listing(command="qstat -u", state=slice(4, 5), reason_command="qstat -j"),
}


class _Job(Protocol):
    """What is used of a job of dask-jobqueue."""

    name: str
    job_id: str
    cancel_command: str
    log_directory: str | None

    async def start(self) -> None: ...


@dataclass(kw_only=True)
class _Slot:
    """The place of one of the jobs that are wanted, and the job that has it now.

    ``joined``: a worker of the job was seen. ``failures`` counts the jobs in a row that were
    refused, or whose worker never joined.
    """

    job: _Job | None = None
    joined: bool = False
    failures: int = 0

    def has_worker(self, workers: Sequence[str]) -> bool:
        """Whether a worker of the job is among those of these names; a job may have several."""
        if self.job is None:
            return False
        name = self.job.name
        return any(worker == name or worker.startswith(f"{name}-") for worker in workers)


class Jobs:
    """``count`` jobs in the queue of a dask-jobqueue ``cluster``; each that ends is replaced.

    ``kind`` is one of CLUSTERS. ``notify`` is called with what the jobs wait for while there is no
    worker. Raises ConfigError.
    """

    def __init__(
        self, *, kind: str, cluster: Any, count: int, notify: Callable[[str], None]
    ) -> None:
        self.kind = kind
        self.cluster = cluster
        self.user = user_name()
        self.notify = notify
        self.slots = [_Slot() for _ in range(count)]
        self.submitted = 0
        self.polled = 0.0
        self.notified = ""
        self.problem = ""  # the last one, for an error message

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
        """Replace jobs that ended, notify of what the others wait for; to be called repeatedly.

        Raises ConfigError where no job is left, and none can be had.
        """
        if time.monotonic() < self.polled + _POLL_S:
            return
        workers = self._workers()
        missing = []
        for slot in self.slots:
            if slot.has_worker(workers):
                slot.joined, slot.failures = True, 0
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
            logger.info("cancelling %d jobs of %s", len(jobs), self.kind)
            _output_of([*shlex.split(jobs[0].cancel_command), *(job.job_id for job in jobs)])

    def _workers(self) -> list[str]:
        """The names of the workers that have joined."""
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
            slot.job, slot.joined = job, False
            logger.info("submitted job %s to %s", job.job_id, self.kind)

    def _note_end(self, slot: _Slot) -> None:
        job, slot.job = slot.job, None
        assert job is not None
        logger.info("job %s of %s ended", job.job_id, self.kind)
        if slot.joined:
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
        command = _LISTINGS[self.kind].reason_command
        more = [f"see {command} {job}" for job in ids if command and job in states][:1]
        self._notify(", ".join([*(f"{n} {state}" for state, n in counts.items()), *more]))

    def _notify(self, what: str) -> None:
        """Notify of what is new."""
        if what != self.notified:
            self.notified = what
            logger.info("%s: %s", self.kind, what)
            self.notify(f"{self.kind}: {what}")

    def _states(self) -> dict[str, str] | None:
        """By id, the states of the user's unfinished jobs; None if the queue does not answer."""
        listing = _LISTINGS[self.kind]
        output = _output_of([*shlex.split(listing.command), self.user])
        if output is None:
            self._notify(f"{listing.command.split()[0]} does not answer")
            return None
        states = {}
        for line in output.splitlines():
            if number := re.match(r"\s*(\d+)", line):
                state = " ".join(line.split()[listing.state])
                states[number[1]] = state.removesuffix(" (None)")
        logger.debug("%s: %s", self.kind, states)
        return states


def user_name() -> str:
    """The user whose jobs are listed. Raises ConfigError for one without a name, as of a container.

    That of another would be taken for a list without our jobs, which seem to have ended.
    """
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError) as error:  # by version of Python and system
        raise ConfigError(
            "the user of this process has no name: set LOGNAME to the name that the queue knows"
        ) from error


def _output_of(command: list[str]) -> str | None:
    """What a command of the queue prints; None if it fails."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",  # lists cut the names of jobs, in the middle of a character, too
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and "No unfinished job" not in done.stderr:  # how LSF reports none
        return None
    return done.stdout


def _output(job: _Job) -> str:
    """Where a job's output is, and the line of it that most likely has the cause."""
    number = re.compile(rf"(?<!\d){job.job_id}(?!\d)")
    with suppress(OSError):
        files = [f for f in Path(job.log_directory or ".").iterdir() if number.search(f.name)]
        if files:
            file = max(files, key=lambda file: file.stat().st_size)
            lines = file.read_text("utf-8", errors="replace").split("\n")
            lines = [line.strip() for line in lines if line.strip()] or ["(nothing)"]
            errors = [line for line in lines if "rror" in line] or lines
            return f"said in {file}: {errors[-1][:300]}"
    return "left no output that is seen from here"
