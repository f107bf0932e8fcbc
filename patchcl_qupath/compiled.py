"""Compiled loops over pixels (numba), which run in as many threads as there are workers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba
import numpy as np
from numba.core.caching import FunctionCache
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

Loop = TypeVar("Loop", bound=Callable[..., object])


def compiled(loop: Loop) -> Loop:
    """Compile a function of arrays and numbers when it is first called; cached on disk.

    A cache that is damaged, or cannot be written to, costs time and nothing else.

    It releases Python's global lock. Floating point is that of the source, operation by operation,
    so that every machine and every tile has the same results. A loop must not call a loop of
    another file: its cache is renewed when its own file changes, and only then.
    """
    fast: Any = numba.njit(loop, nogil=True, error_model="numpy")
    # RuntimeError: there is no folder for the cache that may be written to.
    with suppress(RuntimeError, OSError):
        fast._cache = _Cache(loop)  # type: ignore[no-untyped-call]
    compiled_loop: Loop = fast
    return compiled_loop


class _Cache(FunctionCache):
    """numba's cache of one function, where no error of a file reaches the caller.

    numba's own raises from the call of the function if a file is damaged (EOFError,
    UnpicklingError), or the disk full (OSError).
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None; a damaged cache is emptied, and so written anew."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # pickle raises anything
            logger.debug("a damaged cache in %s: %r", self.cache_path, error)
            with suppress(Exception):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Write a compiled function, if that is possible."""
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except Exception as error:
            logger.debug("no cache in %s: %r", self.cache_path, error)


@compiled
def take(values: NDArray[Any], labels: NDArray[np.int32]) -> NDArray[Any]:
    """``values[labels]``, in half the time: values (N + 1,) of the labels (H, W) of pixels."""
    taken = np.empty(labels.shape, values.dtype)
    for row in range(labels.shape[0]):
        for col in range(labels.shape[1]):
            taken[row, col] = values[labels[row, col]]
    return taken
