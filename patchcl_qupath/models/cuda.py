"""Networks on a CUDA device: threads share it, and the CPU takes over where it fails."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.models.network import SegmentationNetwork, folded

logger = logging.getLogger(__name__)

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_AT_ONCE = 3  # threads: one copies pixels there, one computes, one copies probabilities back
# Largest error of a probability that rounding explains. What is above is a fault, or an overflow.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
_PROBE_PX = 32


def cuda_engine(
    network: SegmentationNetwork,
    *,
    fallback: Run,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """An engine for a network on a CUDA device, in the precision of ``dtype``.

    It is checked against ``fallback`` on the CPU: in float32 where the precision is too low for the
    network, and the fallback itself where the device cannot be used, with a line in the log.
    """
    for precision in dict.fromkeys([dtype, torch.float32]):
        name = str(precision).removeprefix("torch.")
        try:
            engine = CudaEngine(network, fallback=fallback, dtype=precision, device=device)
            error = _largest_error(engine.compute, fallback)
        except RuntimeError as failure:
            logger.warning("the GPU cannot be used, the CPU is: %s", _first_line(failure))
            return fallback
        if error <= _TOLERANCE[precision]:  # never for NaN
            return engine
        logger.warning("the GPU in %s is off by %.3f: not used", name, error)
    return fallback


class CudaEngine:
    """One network on a CUDA device, for the threads of one process.

    Where the device has no memory for a tile beside those of other threads, fewer threads use it at
    once. Where it has none for one tile alone, or on any other error, ``fallback`` replaces it for
    the rest of the process, with a line in the log. ``device`` may be the CPU, for tests.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        fallback: Run,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if dtype == torch.float32:
            torch.backends.cudnn.allow_tf32 = False  # by default it multiplies with 10 bits
        self._network = folded(network).to(device, dtype)
        self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # streams do not wait for the copy of the weights
        self._fallback, self._dtype, self._device = fallback, dtype, device
        self._changed = threading.Condition()
        self._limit = _AT_ONCE  # threads at once; 0: the fallback has replaced the device
        self._busy = 0
        self._idle: list[_Staging] = []

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Network input (H, W, 3) to probabilities (C, H, W)."""
        while limit := self._limit:
            try:
                return self.compute(pixels)
            except torch.cuda.OutOfMemoryError as error:
                self._lower(limit, error)
            except RuntimeError as error:
                self._lower(1, error)
        return self._fallback(pixels)

    def compute(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same, without fallback. Raises RuntimeError where the device fails."""
        with self._turn() as staging, torch.cuda.stream(staging.stream), torch.inference_mode():
            planes = torch.from_numpy(pixels).permute(2, 0, 1)  # (3, H, W)
            x = staging.pixels(planes.shape).copy_(planes)
            x = x.to(self._device, non_blocking=True)[None]  # (1, 3, H, W)
            x = x.to(self._dtype, memory_format=torch.channels_last)
            y = self._network.probabilities(x)[0]  # (C, H, W)
            found = staging.probabilities(y.shape).copy_(y, non_blocking=True)
            staging.wait()
            return found.numpy().copy()

    @contextmanager
    def _turn(self) -> Iterator[_Staging]:
        """Wait until few enough threads use the device."""
        with self._changed:
            self._changed.wait_for(lambda: self._busy < max(1, self._limit))
            self._busy += 1
            staging = self._idle.pop() if self._idle else None
        try:
            staging = staging or _Staging(self._device)
            yield staging
        finally:
            with self._changed:
                self._busy -= 1
                if staging:
                    self._idle.append(staging)
                self._changed.notify_all()

    def _lower(self, limit: int, error: RuntimeError) -> None:
        """Let fewer than ``limit`` threads use the device from now on."""
        with self._changed:
            before, self._limit = self._limit, min(self._limit, limit - 1)
            self._changed.notify_all()
        if before and not self._limit:
            logger.warning("the GPU failed, the CPU goes on: %s", _first_line(error))


class _Staging:
    """A stream of the device, and pinned memory for the pixels and the probabilities of one tile.

    Copies from and to pinned memory run beside the kernels of other streams.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self._pinned else None  # type: ignore[no-untyped-call]
        self._pixels = self._probabilities = torch.empty(0)

    def pixels(self, shape: torch.Size) -> torch.Tensor:
        """Memory for network input (3, H, W)."""
        self._pixels = self._grown(self._pixels, shape)
        return self._pixels[: shape.numel()].view(shape)

    def probabilities(self, shape: torch.Size) -> torch.Tensor:
        """Memory for probabilities (C, H, W)."""
        self._probabilities = self._grown(self._probabilities, shape)
        return self._probabilities[: shape.numel()].view(shape)

    def wait(self) -> None:
        """Wait until the stream is done."""
        if self.stream is not None:
            self.stream.synchronize()

    def _grown(self, memory: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        if memory.numel() >= shape.numel():
            return memory
        return torch.empty(shape.numel(), pin_memory=self._pinned)


def _largest_error(found: Run, expected: Run) -> float:
    """The largest difference between two engines, on noise over the range of normalised stains."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-0.2, 1.3, (_PROBE_PX, _PROBE_PX, 3)).astype(np.float32)
    pixels[: _PROBE_PX // 2] = pixels[0, 0]  # an even half: there, activations are the largest
    return float(np.abs(found(pixels) - expected(pixels)).max())


def _first_line(error: Exception) -> str:
    """What an error of CUDA says, without its advice for programmers."""
    return (str(error).splitlines() or [type(error).__name__])[0]
