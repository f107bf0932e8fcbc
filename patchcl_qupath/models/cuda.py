"""Networks on a CUDA device: equal to the bit wherever a pixel lies, and the CPU where it fails.

A threshold may turn the last bit of a probability into another nucleus, so a pixel must have the
same probability in each tile that contains it. On a GPU, how a convolution sums depends on more
than the pixels: libraries choose a kernel by the shape of the input, by what is fastest at that
moment (``cudnn.benchmark``), and by the memory that is free; some kernels add in random order; and
some, such as Winograd's, compute blocks of pixels, where it matters at which place of its block a
pixel lies. Here

- each call has one shape, the window. Larger input is computed by windows that overlap; smaller
  input is filled up, and what lies outside is set to 0 after each layer, as a convolution pads;
- the kernels are chosen once, as a graph is captured, and are the same in each replay, whatever
  memory is free later. ``deterministic`` is on, ``benchmark`` and TensorFloat-32 are off;
- before an engine is used, it must compute the same from shifted input, to the bit. Where cuDNN's
  kernels do not, convolutions are matrix products, which add in one order at each pixel.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from queue import Queue
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.models.network import ConvBlock, SegmentationNetwork, folded, to_channels_last

logger = logging.getLogger(__name__)

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_AT_ONCE = 2  # threads: one computes, one copies
_WINDOW = (448, 1728)  # rows and columns: four make a tile of the default size, with its halo
# Largest error of a probability that rounding explains. What is above is a fault, or an overflow.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
_PROBE_PX = 32


class _Method(NamedTuple):
    """How a network is computed."""

    dtype: torch.dtype
    by_products: bool  # convolutions are matrix products, not kernels of cuDNN

    @property
    def name(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return f"{precision} by matrix products" if self.by_products else precision


def cuda_engine(
    network: SegmentationNetwork,
    *,
    fallback: Run,
    dtype: torch.dtype,
    device: torch.device,
) -> Run:
    """An engine for a network on a CUDA device, in the precision of ``dtype``.

    It is compared with ``fallback`` on the CPU, and with itself on shifted input: float32 is used
    where the precision is too low for the network, and the fallback itself where the device cannot
    be used, with a line in the log.
    """
    for precision in dict.fromkeys([dtype, torch.float32]):
        for by_products in (False, True):
            method = _Method(precision, by_products)
            try:
                engine = CudaEngine(network, fallback=fallback, method=method, device=device)
                error = _largest_error(engine.compute, fallback)
                if not error <= _TOLERANCE[precision]:  # NaN, too
                    logger.warning("the GPU in %s is off by %.3f: not used", method.name, error)
                    break
                if engine.is_the_same_anywhere():
                    return engine
            except RuntimeError as failure:
                logger.warning("the GPU cannot be used, the CPU is: %s", _first_line(failure))
                return fallback
            logger.info("the GPU in %s depends on the place of a pixel: not used", method.name)
    logger.warning("the GPU cannot be used, the CPU is: no precision passed the checks")
    return fallback


class CudaEngine:
    """One network on a CUDA device, for the threads of one process.

    Where the device has no memory for two threads at once, one uses it. On an error of the device,
    ``fallback`` replaces it for the rest of the process, with a line in the log. ``device`` may be
    the CPU, for tests. Raises RuntimeError where the device cannot be used.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        *,
        fallback: Run,
        method: _Method,
        device: torch.device,
    ) -> None:
        self.method = method
        self._fallback = fallback
        self._divisor = network.divisor
        self._halo = network.divisor * -(-network.receptive_radius_px // network.divisor)
        rows, cols = (max(side, 4 * self._halo) for side in _WINDOW)
        self.window = rows, cols
        self._failed = False
        self._failing = threading.Lock()
        self._slots: Queue[_Slot] = Queue()  # in turn, so that checks use each
        network = _prepared(network, method)
        for number in range(_AT_ONCE):
            try:
                self._slots.put(_Slot(network, self.window, method.dtype, device))
            except RuntimeError:  # no memory: one thread at a time
                if number == 0:
                    raise

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Network input (H, W, 3) to probabilities (C, H, W)."""
        if not self._failed:
            try:
                return self.compute(pixels)
            except RuntimeError as error:
                with self._failing:
                    if not self._failed:
                        logger.warning("the GPU failed, the CPU goes on: %s", _first_line(error))
                    self._failed = True
        return self._fallback(pixels)

    def compute(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same, without fallback. Raises RuntimeError where the device fails."""
        height, width = pixels.shape[:2]
        found = None
        for rows in spans(height, self.window[0], self._halo):
            for cols in spans(width, self.window[1], self._halo):
                part = self._compute_window(pixels[rows.begin : rows.end, cols.begin : cols.end])
                if found is None:
                    found = np.empty((len(part), height, width), np.float32)
                found[:, rows.first : rows.last, cols.first : cols.last] = part[
                    :, rows.first - rows.begin : rows.last - rows.begin
                ][:, :, cols.first - cols.begin : cols.last - cols.begin]
        assert found is not None
        return found

    def is_the_same_anywhere(self) -> bool:
        """Whether shifted input has the same probabilities, to the bit, up to its border."""
        rows, cols = self.window
        pixels = _noise(rows, cols)
        whole = self.compute(pixels)
        for row, col in ((0, 0), (1, 1), (2, 7), (13, 30), (22, 35)):
            row, col = row * self._divisor, col * self._divisor
            found = self.compute(pixels[row:, col:])
            inner = np.s_[:, row and self._halo :, col and self._halo :]
            if not np.array_equal(found[inner], whole[:, row:, col:][inner]):
                return False
        return True

    def _compute_window(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        slot = self._slots.get()
        try:
            return slot.run(pixels)
        finally:
            self._slots.put(slot)


class _Span(NamedTuple):
    """Rows, or columns, of a window, and those of them that it yields."""

    begin: int
    end: int
    first: int
    last: int


def spans(length: int, window: int, halo: int) -> Iterator[_Span]:
    """The windows that cover [0, length): each yields what is its own, without its halo."""
    step = window - 2 * halo
    for begin in range(0, max(1, length - 2 * halo), step):
        end = min(begin + window, length)
        yield _Span(
            begin, end, begin + halo if begin else 0, end - halo if end < length else length
        )


class _Slot:
    """Memory for one window, pinned and on the device, a stream, and the network as a graph.

    Copies from and to pinned memory run beside the kernels of other streams.
    """

    def __init__(
        self,
        network: SegmentationNetwork,
        window: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        self._network = deepcopy(network).to(device, dtype)
        to_channels_last(self._network)
        self._dtype = dtype
        # What lies outside of the pixels, by the columns of the maps: one at each stride.
        self._outside = {
            window[1] // stride: torch.ones(
                (1, 1, window[0] // stride, window[1] // stride), dtype=torch.bool, device=device
            )
            for stride in _strides(network.divisor)
        }
        self._inside = (0, 0)
        for module in self._network.modules():
            if isinstance(module, ConvBlock):
                module.register_forward_hook(lambda _block, _inputs, y: self._cleared(y))
        self._pixels = torch.zeros((1, 3, *window), device=device)
        self._pinned_pixels = torch.zeros((1, 3, *window), pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        with _exact(), torch.inference_mode():
            self._probabilities = self._captured() if on_gpu else self._compute()
        self._pinned_probabilities = torch.empty(
            self._probabilities.shape, pin_memory=on_gpu, dtype=torch.float32
        )

    def run(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Network input (H, W, 3), at most a window, to probabilities (C, H, W)."""
        height, width = pixels.shape[:2]
        planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
        self._pinned_pixels[..., :height, :width] = planes  # what is outside is cleared
        with torch.cuda.stream(self._stream), torch.inference_mode():
            self._mark_outside(height, width)
            self._pixels.copy_(self._pinned_pixels, non_blocking=True)
            if self._graph is None:
                self._probabilities = self._compute()
            else:
                self._graph.replay()
            self._pinned_probabilities.copy_(self._probabilities, non_blocking=True)
            if self._stream is not None:
                self._stream.synchronize()
        return self._pinned_probabilities[0, :, :height, :width].numpy().copy()

    def _compute(self) -> Tensor:
        """Probabilities of the pixels on the device, (1, C, H, W) in float32."""
        x = self._pixels.to(self._dtype, memory_format=torch.channels_last)
        y = self._network.probabilities(self._cleared(x))
        return y.to(torch.float32).contiguous()

    def _captured(self) -> Tensor:
        """Capture the computation as a graph -> what holds its probabilities."""
        assert self._stream is not None
        torch.cuda.synchronize(self._pixels.device)  # streams do not wait for the weights
        with torch.cuda.stream(self._stream):
            for _ in range(2):  # loads kernels, which a capture cannot
                self._compute()
        self._graph = torch.cuda.CUDAGraph()
        # Threads may use another engine meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return self._compute()

    def _mark_outside(self, height: int, width: int) -> None:
        if self._inside != (height, width):
            self._inside = (height, width)
            for columns, outside in self._outside.items():
                stride = self._pixels.shape[-1] // columns
                outside.fill_(True)
                outside[..., : height // stride, : width // stride] = False

    def _cleared(self, x: Tensor) -> Tensor:
        """Maps (1, C, h, w), with 0 outside of the pixels, as a convolution pads its input."""
        return x.masked_fill_(self._outside[x.shape[-1]], 0)


class _ProductConv(nn.Module):
    """A convolution as one product of matrices. It takes more memory: 9 times its input."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        assert not isinstance(conv.padding, str)
        self.kernel, self.dilation, self.padding = conv.kernel_size, conv.dilation, conv.padding
        self.weight = nn.Parameter(conv.weight.flatten(1).contiguous(), requires_grad=False)
        self.bias = nn.Parameter(conv.bias[:, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        columns = F.unfold(x, self.kernel, self.dilation, self.padding)[0]  # (inputs * 9, H * W)
        y = torch.addmm(self.bias, self.weight, columns)
        return y.view(1, len(y), *x.shape[2:])  # (1, outputs, H, W)


def _prepared(network: SegmentationNetwork, method: _Method) -> SegmentationNetwork:
    network = folded(network)
    if method.by_products:
        for parent in [*network.modules()]:
            for name, child in parent.named_children():
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, _ProductConv(child))
    return network


def _strides(divisor: int) -> Iterator[int]:
    """1, 2, 4 … to ``divisor``: those of a network's maps."""
    stride = 1
    while stride <= divisor:
        yield stride
        stride *= 2


@contextmanager
def _exact() -> Iterator[None]:
    """Kernels that add in one order, all digits of float32, none chosen by its time."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before


def _largest_error(found: Run, expected: Run) -> float:
    """The largest difference between two engines, on noise over the range of normalised stains."""
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-0.2, 1.3, (_PROBE_PX, _PROBE_PX, 3)).astype(np.float32)
    pixels[: _PROBE_PX // 2] = pixels[0, 0]  # an even half: there, activations are the largest
    return float(np.abs(found(pixels) - expected(pixels)).max())


def _noise(height: int, width: int) -> NDArray[np.float32]:
    """Input with structures of the size of nuclei, and fine noise."""
    rng = np.random.default_rng(0)
    spots = rng.uniform(0, 1, (-(-height // 8), -(-width // 8), 3)).astype(np.float32)
    spots = spots.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]
    return spots + rng.uniform(-0.2, 0.2, spots.shape).astype(np.float32)


def _first_line(error: Exception) -> str:
    """What an error of CUDA says, without its advice for programmers."""
    return (str(error).splitlines() or [type(error).__name__])[0]
