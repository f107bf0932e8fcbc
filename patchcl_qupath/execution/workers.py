"""Who segments tiles: threads or processes of this machine, jobs of a queue, or a Dask cluster."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

from patchcl_qupath.config import CLUSTERS
from patchcl_qupath.errors import ConfigError
from patchcl_qupath.execution.jobs import Jobs

ATTEMPTS = 3  # at a tile, before it is left out


_THREADS = 4  # in one process


# A terminal sends Ctrl-C to all processes, but it is the run that ends the others.
_NO_CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"


@dataclass(frozen=True)
class Workers:
    """Who does tiles: a Dask client, and ``poll``, which looks after them while one waits."""

    client: Any
    poll: Callable[[], None] = lambda: None


@contextmanager
def open_workers(
    count: int | None = None,
    scheduler: str | None = None,
    cluster: str | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> Iterator[Workers]:
    """Those of the Dask cluster at ``scheduler``; or ``count`` jobs in the queue of a ``cluster``,
    one of CLUSTERS; else ``count`` threads, of this process or, where they are many, of others.

    ``count`` defaults to the number of cores, or to one job. Returns when there is a worker;
    ``notify`` is told what jobs wait for. Raises ConfigError if the scheduler does not answer, or
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
                jobs = Jobs(cluster, queue, count or 1, notify)
                try:  # jobs that a killed run could not cancel end by themselves
                    jobs.start()
                    yield Workers(client, jobs.poll)
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
