"""Who segments tiles: threads or processes of this machine, jobs of a queue, or a Dask cluster."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import count as count_from
from multiprocessing import resource_tracker
from typing import Any, TypeVar

from patchcl_qupath import memory
from patchcl_qupath.config import CLUSTERS
from patchcl_qupath.errors import ConfigError, ImageError, one_line
from patchcl_qupath.execution.jobs import Jobs, user_name
from patchcl_qupath.overlap import reading_dask_settings, usable_cores

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # at a tile, before it is left out
WORKER_DIED = "its worker died each time: give workers more memory, or fewer threads"
WORKERS_DIE = (
    "workers end as they begin, one after the other: give them more memory (2 GB and more), or see "
    "what they print; finished tiles are kept"
)
WORKERS_PAUSE = (
    "Dask gives its workers no more tasks, as their memory is nearly full: give them more (2 GB "
    "and more), or fewer threads; finished tiles are kept"
)

FIRST = 10  # priority of what tiles wait for
_MAX_IMAGES = 8  # under way at once; each takes some memory
_CALL_S = 0.02  # between looks at a call
_PRESENT_S = 1.0  # between looks at who is there to make it

Result = TypeVar("Result")

_THREADS = 4  # in one process
_NEW_OBJECTS = 50_000  # of Python, after which it looks for unused ones
_ANSWER = "10s"  # for a scheduler to answer
_FETCH_S = 30.0  # for what a task found, or who is there, to come here
_NO_WORKER_S = 300.0  # for a worker to come, where this program asks for none

_GONE = (
    "the Dask scheduler went away: start it and its workers again, or mend the network, then run "
    "again; finished tiles are kept"
)

# A terminal sends Ctrl-C to all processes, but it is the run that ends the others.
_NO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

_DASK_LOGS = ("distributed", "distributed.client", "tornado.application")

# This process hears at once of workers that die. Dask would also remove what was silent for five
# minutes: all, and for good, where the computer slept for so long, or a person stopped the command.
_ON_THIS_MACHINE = {"distributed.scheduler.worker-ttl": None}

_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Variables that are set in this process for those of workers: by Dask, by its settings, by us.
_FOR_PROCESSES = (*_ONE_THREAD, "PYTHONHASHSEED", "__DASK_PARENT_PID", "PYTHONWARNINGS")

_SETTINGS = {
    "distributed.worker.memory.spill": False,
    "distributed.admin.low-level-log-length": 0,
    "distributed.scheduler.allowed-failures": ATTEMPTS - 1,  # workers that die over a tile
    # Looking at the stack of each thread 100 times a second, for Dask's dashboard, and 50 times at
    # its own delay, took 4 % of a core.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    # Dask's own, without MALLOC_TRIM_THRESHOLD_: with it, glibc gives each large array back, and
    # separation and measurements take 1.6 times as long.
    "distributed.nanny.pre-spawn-environ": dict.fromkeys(_ONE_THREAD, 1),
}


@dataclass(frozen=True, kw_only=True)
class Workers:
    """What segments tiles: a Dask ``client``, and ``poll``, to be called while one waits.

    ``are_processes``: they are other processes of this machine. ``are_elsewhere``: they are not
    part of this program, but may be on machines with another version of it, and other files.
    ``scheduler`` is the address of a Dask cluster that others run.
    """

    client: Any
    poll: Callable[[], None] = lambda: None
    are_processes: bool = False
    are_elsewhere: bool = False
    scheduler: str | None = None
    _threads: dict[str, int] = field(default_factory=dict)  # by address, when last asked
    _warned: set[str] = field(default_factory=set)
    _last_left: list[float] = field(default_factory=list)  # when the last one was found to be gone
    _turns: Iterator[int] = field(default_factory=count_from)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def until(self, check: Callable[[], None]) -> Workers:
        """The same workers, for one that stops waiting for them when ``check`` raises."""

        def poll() -> None:
            check()
            with self._lock:
                self.poll()

        return replace(self, poll=poll)

    def images_at_once(self) -> int:
        """How many images should be under way, so that no worker is without a tile.

        While the tiles of one image are worked on, the next is prepared, and the last one written.
        With many workers that takes longer than the tiles do. Raises ImageError where the scheduler
        does not answer.
        """
        threads = sum(self._asked_for().values())
        return 1 if threads == 1 else min(_MAX_IMAGES, 2 + threads // 8)

    def next_turn(self) -> int:
        """The priority of an image's tiles: those of images that began earlier go first."""
        return -next(self._turns)

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What a function returns or raises, on a process beside this one if there are some."""
        if not self.are_processes:
            return function(*arguments)
        from distributed import KilledWorker

        future = self.client.submit(_boxed, function, *arguments, pure=False, priority=FIRST)
        looked = time.monotonic()
        while not future.done():
            self.poll()
            if time.monotonic() > looked + _PRESENT_S:
                self.present()
                looked = time.monotonic()
            time.sleep(_CALL_S)
        found = fetched(future)
        if found is None:
            logger.info("a call was lost with its worker, and is made here")
            return function(*arguments)
        if isinstance(found, KilledWorker):  # as this process may, if it were made here
            raise ImageError(WORKER_DIED)
        if isinstance(found, Exception):
            raise found
        result: Result = found[0]
        return result

    def present(self) -> dict[str, int]:
        """By address, how many threads the workers have that are there now; they come and go.

        Raises ImageError where there was none for minutes, and no queue is asked for one; or where
        the scheduler does not answer.
        """
        now = self._asked_for()
        with self._lock:
            self._note(now)
        return now

    def _asked_for(self) -> dict[str, int]:
        """What the scheduler says of workers: one that is suspended keeps its connection."""
        for _ in range(2):  # in one of them, it may be this process that was suspended
            with suppress(TimeoutError):
                found: dict[str, int] = self.client.nthreads(callback_timeout=_FETCH_S)
                return found
        raise scheduler_gone()

    def check_memory(self) -> None:
        """Raise ImageError where some are paused, which begin no task, and none is at work."""
        there = self.client.scheduler_info(n_workers=-1)["workers"]
        paused = {address for address, worker in there.items() if worker["status"] == "paused"}
        busy = {address for address, tasks in self.client.processing().items() if tasks}
        if paused and busy <= paused:
            raise ImageError(WORKERS_PAUSE)

    def _note(self, now: dict[str, int]) -> None:
        """Log which workers came and went."""
        for address in now.keys() - self._threads.keys():
            logger.info("worker %s joined, with %d threads", address, now[address])
        for address in self._threads.keys() - now.keys():
            logger.info("worker %s left", address)
        in_queue = self.are_elsewhere and not self.scheduler  # where a job may wait for hours
        if not now and not in_queue:
            self._check_patience()
        self._threads.clear()
        self._threads.update(now)

    def warn_once(self, warning: str) -> None:
        """Log a warning, however many images it is true of."""
        if warning not in self._warned:
            self._warned.add(warning)
            logger.warning(warning)

    def _check_patience(self) -> None:
        """Raise ImageError where there was no worker for too long."""
        where = f"at {self.scheduler}" if self.scheduler else "on this machine"
        minutes = _NO_WORKER_S / 60
        if self._threads or not self._last_left:
            self._last_left[:] = [time.monotonic()]
            logger.warning("no worker is left %s: waiting %.0f minutes for one", where, minutes)
        if time.monotonic() > self._last_left[0] + _NO_WORKER_S:
            found = no_worker(self.scheduler) if self.scheduler else _workers_ended()
            raise ImageError(f"{found}; finished tiles are kept")


def no_worker(scheduler: str) -> str:
    """What to do where a Dask cluster has no worker."""
    return (
        f"there was no worker at {scheduler} for {_NO_WORKER_S / 60:.0f} minutes: start one with "
        f"'dask worker {scheduler}', or mend the network, then run again"
    )


def _workers_ended() -> str:
    """What to do where those of this machine ended, and Dask starts no others."""
    return (
        f"all workers on this machine ended, and none came for {_NO_WORKER_S / 60:.0f} minutes: "
        "run again, with fewer of them (--workers 1) where that happens again"
    )


def _boxed(function: Callable[..., Result], *arguments: Any) -> tuple[Result]:
    """What a function returns, in a tuple: None is no lost call."""
    return (function(*arguments),)


def fetched(future: Any) -> Any:
    """The result of a task that is done, or its error; None if it was lost with its worker.

    Raises ImageError where the scheduler is gone.
    """
    try:
        return future.result(timeout=_FETCH_S)
    except Exception as error:
        if future.status == "error":
            return error
        if isinstance(error, TimeoutError):
            return None
        raise scheduler_gone() from error


def scheduler_gone() -> ImageError:
    """The error where the connection to the scheduler is lost."""
    return ImageError(_GONE)


def set_environment() -> None:
    """Set up a process: variables that torch and Arrow read as they are imported, Python's
    collector, and memory that arrays of a tile leave to those of the next.

    Variables that are set already stay.
    The command calls it first of all, and each process that segments tiles before it unpacks any.
    """
    # Threads of torch that wait by spinning starve whatever else the machine does, and themselves:
    # a training beside one busy process took three times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Arrow then uses memory that tiles have left, and takes no other for itself.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    # Looking for unused cycles among the 400,000 objects of libraries, each time that some ten
    # thousand are new, took a twentieth of a run.
    gc.set_threshold(_NEW_OBJECTS)
    memory.keep_freed()


@contextmanager
def open_workers(
    count: int | None = None,
    scheduler: str | None = None,
    cluster: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[Workers]:
    """Those of the Dask cluster at ``scheduler``; or ``count`` jobs in the queue of a ``cluster``,
    one of CLUSTERS; else ``count`` threads, of this process or, where they are many, of others.

    ``count`` defaults to the number of usable cores, or to one job. Returns when there is a worker;
    ``notify`` is called with what jobs wait for. Raises ConfigError if the scheduler does not
    answer or has no worker for minutes, or where no jobs can be had.
    """
    dask = _dask()
    if scheduler:
        with _at_scheduler(scheduler) as workers:
            yield workers
        return
    _check_for_processes(dask)
    with dask.config.set(_SETTINGS):
        if cluster:
            with _in_queue(cluster, count or 1, notify) as workers:
                yield workers
        else:
            with _on_this_machine(count or usable_cores()) as workers:
                yield workers


def check_workers(scheduler: str | None = None, cluster: str | None = None) -> None:
    """Raise ConfigError for workers that ``open_workers`` could not have: a training takes minutes.

    Of a ``cluster``, no job is submitted.
    """
    dask = _dask()
    if scheduler:
        _client_of(scheduler).close()
        return
    _check_for_processes(dask)
    if cluster:
        with job_cluster(cluster):
            user_name()
    else:
        with _on_this_machine(1):
            pass


def _dask() -> Any:
    """Dask, with its settings. Raises ConfigError for some that cannot be read."""
    with reading_dask_settings():
        import dask
        import distributed  # noqa: F401  # its defaults first: config.set would remove them on exit
    return dask


def _check_for_processes(dask: Any) -> None:
    """Raise ConfigError for settings that processes of workers cannot read, and where there is no
    folder for what they and jobs write for a time."""
    with reading_dask_settings():
        # Each reads them again, by what distributed knows of earlier names: where that fails, it is
        # a traceback of each, and all threads would be of this process.
        dask.config.collect()
    try:
        if dask.config.get("temporary-directory", None) is None:
            with tempfile.TemporaryFile():
                pass
    except OSError as error:
        raise ConfigError(
            f"no temporary file can be written ({one_line(error)}): set TMPDIR to a folder that "
            "you can write to"
        ) from error


@contextmanager
def _at_scheduler(address: str) -> Iterator[Workers]:
    from distributed.utils import silence_logging_cmgr

    client = _client_of(address)
    with ExitStack() as stack:
        for name in _DASK_LOGS:  # what matters is in our own errors
            stack.enter_context(silence_logging_cmgr(logging.CRITICAL, name))
        stack.enter_context(client)
        logger.info("connected to the Dask scheduler at %s", address)
        try:
            client.wait_for_workers(1, timeout=_NO_WORKER_S)
        except TimeoutError as error:
            raise ConfigError(no_worker(address)) from error
        yield Workers(client=client, are_elsewhere=True, scheduler=address)


def _client_of(address: str) -> Any:
    """A client of the scheduler at an address. Raises ConfigError where none answers."""
    try:
        return _connected(address, timeout=_ANSWER)
    except (LookupError, OSError, TypeError, ValueError) as error:  # of the network, or a setting
        raise ConfigError(
            f"no Dask scheduler answers at {address}: start one with 'dask scheduler', "
            f"or leave out --scheduler to work on this machine ({error})"
        ) from error


def _connected(scheduler: Any, **options: Any) -> Any:
    """A client of a cluster, or of a scheduler's address; it raises what Dask's own does."""
    import distributed

    kind: Any = distributed.Client

    class ClosedOnFailure(kind):  # type: ignore[misc]
        """Dask closes one that cannot connect for some errors alone. Others would be closed as
        garbage, by whatever thread is at work: for good, where that begins the loop of another.
        """

        def start(self, **options: Any) -> None:
            try:
                super().start(**options)
            except BaseException:
                self.close()
                raise

    options["set_as_default"] = False  # what a notebook computes with Dask is not for our workers
    try:
        return ClosedOnFailure(scheduler, **options)
    except AssertionError:  # Dask does not expect news of a worker with the first answer
        return ClosedOnFailure(scheduler, **options)


@contextmanager
def _in_queue(kind: str, count: int, notify: Callable[[str], None]) -> Iterator[Workers]:
    with job_cluster(kind) as cluster, _connected(cluster) as client:
        logger.info("%d jobs of %s for the scheduler at %s", count, kind, client.scheduler.address)
        jobs = Jobs(kind=kind, cluster=cluster, count=count, notify=notify)
        try:  # jobs that a killed run could not cancel end by themselves
            jobs.start()
            yield Workers(client=client, poll=jobs.poll, are_elsewhere=True)
        finally:
            jobs.cancel()


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Afterwards, variables that are set for processes of workers are as they were before: what a
    notebook starts later would have one thread, too."""
    before = {name: os.environ.get(name) for name in _FOR_PROCESSES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _on_this_machine(count: int) -> Iterator[Workers]:
    import dask

    with dask.config.set(_ON_THIS_MACHINE), _environment_restored(), ExitStack() as stack:
        try:
            cluster = stack.enter_context(_local_cluster(count))
            client = stack.enter_context(_connected(cluster))
        except Exception as error:  # of the system, or for a setting of any kind
            raise ConfigError(
                f"no worker can be started here ({one_line(error)}): mend that, "
                "or correct Dask's settings in ~/.config/dask"
            ) from error
        try:
            yield Workers(client=client, are_processes=len(client.nthreads()) > 1)
        except KeyboardInterrupt:
            _kill(cluster)
            raise


def _kill(cluster: Any) -> None:
    """End the processes of a cluster at once, so that what they write can be removed."""
    for nanny in cluster.workers.values():
        if pid := getattr(nanny, "pid", None):
            with suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _local_cluster(count: int) -> Any:
    """A cluster of ``count`` threads; all in this process where no others can be started."""
    processes, threads = _shared_out(count)
    if processes > 1:
        # What processes shared is cleaned up after Ctrl-C, without a warning.
        os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:" + resource_tracker.__name__)
        try:
            return _started(processes, threads, preload=_NO_CTRL_C)
        except (OSError, RuntimeError) as error:  # of Dask
            cause = error.__cause__ or error
            logger.warning("no processes can be started (%r): all threads are of this one", cause)
    return _started(1, count, processes=False)


def _started(count: int, threads: int, **options: Any) -> Any:
    from distributed import LocalCluster

    logger.info("%d processes of %d threads on this machine", count, threads)
    with warnings.catch_warnings():  # where there is no network, which nothing here needs
        warnings.filterwarnings("ignore", "Couldn't detect a suitable IP address", RuntimeWarning)
        return LocalCluster(
            n_workers=count,
            threads_per_worker=threads,
            # None takes port 8787 on all interfaces; workers of this process would listen on all.
            dashboard_address="127.0.0.1:0",
            worker_dashboard_address="127.0.0.1:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,
            **options,
        )


def _shared_out(count: int) -> tuple[int, int]:
    """How many processes, and how many threads in each, make ``count`` threads.

    Some of each tile's work holds Python's lock, so that more than a few threads of one process
    wait for each other. A process more takes half a GB.
    """
    from distributed.deploy.utils import nprocesses_nthreads

    return (1, count) if count <= _THREADS else nprocesses_nthreads(count)


def job_cluster(kind: str) -> Any:
    """A dask-jobqueue cluster of one of CLUSTERS, without a job as yet. Raises ConfigError.

    The cores, memory, time and queue of a job are the user's settings of dask-jobqueue.
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

    try:
        kind_of_cluster = getattr(dask_jobqueue, f"{kind.upper()}Cluster")
        # A job alone first: it tells of more, and a cluster that fails is not closed.
        kind_of_cluster.job_cls("tcp://scheduler:8786", name="job").job_script()
        own = dask.config.get(f"jobqueue.{kind}.scheduler-options", None) or {}
        options = {"dashboard_address": "127.0.0.1:0", **own}  # its default may be another's port
        return kind_of_cluster(scheduler_options=options, silence_logs=logging.CRITICAL)
    except Exception as error:  # for a setting of any kind
        raise ConfigError(
            f"write into ~/.config/dask/jobqueue.yaml what a job is, at least 'jobqueue: {{{kind}: "
            f"{{cores: 8, memory: 16GB, walltime: '04:00:00'}}}}' ({one_line(error)})"
        ) from error
