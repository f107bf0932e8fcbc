"""Which workers may segment an image: each holds what all tiles share before it is given one.

Others may have started these workers, on other machines. One may have another version of the
program or none, and the slide may be missing there, or be another file. Such a worker would fail
tiles faster than the others finish theirs, or find other nuclei.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any
from uuid import uuid4

from patchcl_qupath import __version__
from patchcl_qupath.errors import ImageError, PatchCLError
from patchcl_qupath.execution.workers import FIRST, WORKERS_DIE, Workers, fetched

_GRACE_S = 10.0  # for a worker that can be used to join, where the others cannot
_MOST_LOSSES = 5  # of workers that were asked, in a row
_LOSS_S = 10.0  # in which there is one: where the network fails, all of them leave

# Evaluated on a worker by Python's own eval, as this package may not be there.
_NODE_AND_VERSION = (
    "(lambda get, name: (get('platform').node(),"
    " get(name).__version__ if get('importlib.util').util.find_spec(name) else None)"
    ")(__import__, 'patchcl_qupath')"
)


class NotHeldError(Exception):
    """A worker does not hold what all tiles share: it may be another process at the old address."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.address = address


class _Step(Enum):
    """What is asked of a worker, one after the other."""

    VERSION = auto()
    CHECK = auto()
    HOLD = auto()


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a worker was asked; its ``name`` is for people."""

    step: _Step
    answer: Any  # a future
    name: str


@dataclass(kw_only=True)
class Admission:
    """The workers that may segment an image, by address.

    ``check`` is called on each that is elsewhere, and raises PatchCLError where that one cannot be
    used; ``make`` on each, and returns what tiles find there by ``held``. Both are pickled. Workers
    need not reach each other.
    """

    workers: Workers
    check: Callable[[], None]
    make: Callable[[], Any]
    admitted: dict[str, int] = field(default_factory=dict)  # with how many threads
    refused: dict[str, str] = field(default_factory=dict)  # with the reason
    name: str = field(default_factory=lambda: uuid4().hex)
    _asked: dict[str, _Asked] = field(default_factory=dict)
    _held: dict[str, Any] = field(default_factory=dict)  # futures: what they hold stays
    _alone_since: float | None = None
    _losses: int = 0
    _last_loss: float = -math.inf

    @property
    def is_pending(self) -> bool:
        """Whether an answer is still to come."""
        return bool(self._asked)

    def update(self) -> None:
        """Ask those that joined, and forget those that left.

        Raises ImageError where there is none left that can be used.
        """
        present = self.workers.present()
        self._forget(present)
        for address in present.keys() - self.admitted.keys() - self.refused.keys():
            if address not in self._asked:
                self._begin(address)
        for address, asked in [*self._asked.items()]:
            if asked.answer.done():
                del self._asked[address]
                self._take(address, asked, present[address])
        self._check_hope()

    def ask_again(self) -> None:
        """Ask all once more: a tile failed, and that may be due to its worker."""
        if self.workers.are_elsewhere:
            for address in self.admitted.keys() - self._asked.keys():
                self._begin(address)

    def dismiss(self, address: str) -> None:
        """Have a worker begin anew, as if it had just joined."""
        self.admitted.pop(address, None)
        if held := self._held.pop(address, None):
            held.release()

    def _forget(self, present: dict[str, int]) -> None:
        if self._asked.keys() - present.keys():
            self._note_loss()
        tables: list[dict[str, Any]] = [self.admitted, self.refused, self._asked, self._held]
        for known in tables:
            for address in known.keys() - present.keys():
                del known[address]

    def _note_loss(self) -> None:
        """A worker left before it could be used: its memory may end as it imports torch."""
        now = time.monotonic()
        if now > self._last_loss + _LOSS_S:
            self._losses, self._last_loss = self._losses + 1, now

    def _begin(self, address: str) -> None:
        first = _Step.VERSION if self.workers.are_elsewhere else _Step.HOLD
        self._ask(address, first, f"worker {address}")

    def _ask(self, address: str, step: _Step, name: str) -> None:
        call: tuple[Any, ...] = {
            _Step.VERSION: (eval, _NODE_AND_VERSION),
            _Step.CHECK: (_problem, self.check),
            _Step.HOLD: (self.make,),
        }[step]
        answer = self.workers.client.submit(
            *call,
            key=_key(self.name, address) if step is _Step.HOLD else None,
            pure=False,
            workers=[address],
            priority=FIRST,
        )
        self._asked[address] = _Asked(step=step, answer=answer, name=name)

    def _take(self, address: str, asked: _Asked, threads: int) -> None:
        """Take in an answer, and ask the next. An answer that was lost is asked for anew."""
        if asked.step is _Step.HOLD and asked.answer.status == "finished":
            self._held[address] = asked.answer  # which is not to come here
            self.admitted[address] = threads
            self._losses = 0
            return
        from distributed import KilledWorker

        match asked.step, fetched(asked.answer):
            case _, None:
                pass
            case _, KilledWorker():
                self._note_loss()
            case _, Exception() as error:
                self._refuse(address, f"{asked.name} is not used: {type(error).__name__}: {error}")
            case _Step.VERSION, (str(node), version):
                name = f"{asked.name} on {node}"
                if version == __version__:
                    self._ask(address, _Step.CHECK, name)
                    return
                has = "no patchcl-qupath" if version is None else f"patchcl-qupath {version}"
                self._refuse(
                    address,
                    f"{name} is not used: it has {has}, this machine {__version__}: install that "
                    "version there, and start the worker anew",
                )
            case _Step.CHECK, str(problem) if problem:
                self._refuse(address, f"{asked.name} is not used: {problem}")
            case _ if address not in self.admitted:
                self._ask(address, _Step.HOLD, asked.name)

    def _refuse(self, address: str, reason: str) -> None:
        self.admitted.pop(address, None)
        self._held.pop(address, None)
        self.refused[address] = reason
        self.workers.warn_once(reason)

    def _check_hope(self) -> None:
        """Raise ImageError after a while in which no worker can be used."""
        if self._losses >= _MOST_LOSSES and not self.admitted:
            raise ImageError(WORKERS_DIE)
        if self.admitted or self._asked or not self.refused:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = time.monotonic()
        elif time.monotonic() > self._alone_since + _GRACE_S:
            first, *others = self.refused.values()
            more = f" (and {len(others)} more are not used)" if others else ""
            raise ImageError(f"no worker can be used: {first}{more}")


def held(name: str) -> Any:
    """What the Admission of that name made on the worker that calls this in a task.

    Raises NotHeldError.
    """
    from distributed import get_worker

    worker = get_worker()
    address = str(worker.contact_address)
    try:
        return worker.data[_key(name, address)]
    except KeyError:
        raise NotHeldError(address) from None


def _key(name: str, address: str) -> str:
    """Of what a worker holds, for Dask."""
    return f"patchcl-qupath-{name}-{address}"


def _problem(check: Callable[[], None]) -> str:
    """Why the machine that this is called on cannot be used; nothing if it can."""
    try:
        check()
    except PatchCLError as error:
        return str(error)
    return ""
