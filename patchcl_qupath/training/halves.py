"""A network in training, with each half of a batch in a thread of its own.

Threads that share each operation wait for one another at each of them, a thousand times a step: on
two cores that took a sixth of the time. Batch norm is by halves, as where several devices share a
batch: PatchCL, which sees columns by themselves as well, does not mind; the U-Net would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from patchcl_qupath.models.network import device

Network = TypeVar("Network", bound=nn.Module)
Result = TypeVar("Result")


class Halves(Generic[Network]):
    """Has ``network`` learn from both halves of a batch at once; on a GPU, or if it is to see the
    ``whole``, from all of it.

    The gradients are the same for any number of threads, as far as those of torch are.
    """

    def __init__(self, network: Network, whole: bool = False) -> None:
        self._networks = [network]
        if device().type == "cpu" and not whole:
            self._networks.append(_twin(network))
        at_once = min(len(self._networks), torch.get_num_threads())
        self._threads = ThreadPoolExecutor(at_once, "halves")

    def __enter__(self) -> Halves[Network]:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def each(self, call: Callable[..., Result], *batch: Tensor | Sequence[Tensor]) -> list[Result]:
        """``call(network, ...)`` with its half of each of ``batch``, which share the cores.

        A tensor (B, ...) is divided; a sequence has been. Of a single item there is one half.
        """
        parts = [
            each.chunk(len(self._networks)) if isinstance(each, Tensor) else each for each in batch
        ]
        threads = torch.get_num_threads()
        share = max(1, threads // len(self._networks))

        def with_its_share(*each: Any) -> Result:
            torch.set_num_threads(share)  # of this thread, and of those that begin from now on
            return call(*each)

        try:
            return [*self._threads.map(with_its_share, self._networks, *parts)]
        finally:
            torch.set_num_threads(threads)

    def join(self) -> None:
        """Add up the gradients of the halves; batch statistics are the mean of both."""
        network, *twins = self._networks
        for twin in twins:
            for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
                if theirs.grad is None:  # it had no half
                    return
                assert mine.grad is not None
                mine.grad += theirs.grad
                theirs.grad = None
            for statistics, others in zip(network.buffers(), twin.buffers(), strict=True):
                if statistics.is_floating_point():
                    statistics.lerp_(others, 0.5)
                    others.copy_(statistics)


def _twin(network: Network) -> Network:
    """A copy with the same weights in memory, but its own gradients and batch statistics."""
    twin = deepcopy(network)
    for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        theirs.data = mine.data
    return twin
