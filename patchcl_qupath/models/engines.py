"""What runs a network: torch, on CPUs and GPUs, or OpenVINO, on CPUs and two to four times as fast.

An engine turns network input, normalised stains for one, (H, W, 3) in float32, into probabilities
(C, H, W); H and W are multiples of the network's divisor. Threads may share an engine.
"""

from __future__ import annotations

import logging
import platform
import threading
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from patchcl_qupath.config import EngineChoice
from patchcl_qupath.errors import ConfigError
from patchcl_qupath.models.cuda import cuda_engine
from patchcl_qupath.models.network import SegmentationNetwork, device, folded, to_channels_last
from patchcl_qupath.models.openvino_model import has_openvino, load_openvino, openvino_model

logger = logging.getLogger(__name__)

Engine = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class EngineKind(StrEnum):
    """A backend with its precision, which changes the last digits of a probability, in 8 bits more.

    Its text is part of the provenance of nuclei, and of the name of a run.
    """

    TORCH = "torch"  # in float32, on a GPU if there is one
    OPENVINO_FLOAT32 = "openvino float32"
    OPENVINO_BFLOAT16 = "openvino bfloat16"
    OPENVINO_INT8 = "openvino int8"
    CUDA_FLOAT16 = "torch cuda float16"

    @property
    def is_openvino(self) -> bool:
        """Whether OpenVINO is the backend."""
        return self in _PRECISION_HINTS


_PRECISION_HINTS = {
    EngineKind.OPENVINO_FLOAT32: "f32",
    EngineKind.OPENVINO_BFLOAT16: "bf16",
    EngineKind.OPENVINO_INT8: "f32",  # of what is not in 8 bits
}
# OpenVINO's Python side sets itself up when it is given its first array; two threads that do so at
# the same moment deadlock.
_STARTING = threading.RLock()

_KEPT = 4
_kept: dict[tuple[EngineKind, str], Engine] = {}  # by kind and the model's digest


def choose(
    wanted: EngineChoice | str, network: SegmentationNetwork | type[SegmentationNetwork]
) -> EngineKind:
    """The engine for "auto", "torch" or "openvino" on this machine.

    "auto" is torch in half precision on a GPU, if there is one; else OpenVINO, if it is installed,
    in 8 bits where CPU and network do that. "torch" computes in float32 on any device, "openvino"
    in float32 or bfloat16. Raises ConfigError.
    """
    if wanted == EngineChoice.AUTO and device().type != "cpu":
        return EngineKind.CUDA_FLOAT16
    if wanted == EngineChoice.OPENVINO and not has_openvino():
        raise ConfigError("there is no OpenVINO here: pip install openvino, or use --engine torch")
    if wanted == EngineChoice.TORCH or not has_openvino():
        return EngineKind.TORCH
    if wanted == EngineChoice.AUTO and network.input_range is not None and multiplies_int8():
        return EngineKind.OPENVINO_INT8
    return EngineKind.OPENVINO_BFLOAT16 if multiplies_bfloat16() else EngineKind.OPENVINO_FLOAT32


def of(kind: EngineKind, network: SegmentationNetwork, digest: str) -> Engine:
    """The engine for the network of the model with ``digest``; kept for the next image."""
    with _STARTING:
        if (kind, digest) not in _kept:
            if len(_kept) == _KEPT:
                _kept.pop(next(iter(_kept)))
            _kept[kind, digest] = start(kind, network)
        return _kept[kind, digest]


def start(kind: EngineKind, network: SegmentationNetwork) -> Engine:
    """A new engine for a network.

    Raises ConfigError as ``check_installed``. On a machine without a GPU that another one chose,
    the CPU does the same in float32, with a line in the log.
    """
    check_installed(kind)
    if not kind.is_openvino:
        return _torch(kind, network)
    with _STARTING:
        model = openvino_model(folded(network), in_int8=kind is EngineKind.OPENVINO_INT8)
    return _openvino(model, _PRECISION_HINTS[kind])


def check_installed(kind: EngineKind) -> None:
    """Raise ConfigError on a machine that has not what another machine chose: OpenVINO, or a CPU
    that multiplies in 8 bits without overflow, or bfloat16: where a CPU does not, OpenVINO
    computes otherwise, or slower, without a word."""
    if kind.is_openvino and not has_openvino():
        raise ConfigError(
            f"{platform.node()} has no OpenVINO: install it on all workers, or use --engine torch"
        )
    if kind is EngineKind.OPENVINO_INT8 and not multiplies_int8():
        raise ConfigError(
            f"{platform.node()} does not compute in 8 bits, as others do: use --engine openvino"
        )
    if kind is EngineKind.OPENVINO_BFLOAT16 and not multiplies_bfloat16():
        raise ConfigError(
            f"{platform.node()} does not compute in bfloat16, as others do: use --engine torch"
        )


def _torch(kind: EngineKind, network: SegmentationNetwork) -> Engine:
    on_cpu = _torch_on_cpu(folded(network))
    if device().type == "cpu":
        if kind is EngineKind.CUDA_FLOAT16:
            logger.warning("%s has no GPU, the CPU is used", platform.node())
        return on_cpu
    dtype = torch.float16 if kind is EngineKind.CUDA_FLOAT16 else torch.float32
    return cuda_engine(network, fallback=on_cpu, dtype=dtype, device=device())


def _torch_on_cpu(network: SegmentationNetwork) -> Engine:
    to_channels_last(network)

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            x = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
            x = x.contiguous(memory_format=torch.channels_last)
            return network.probabilities(x)[0].numpy()  # (C, H, W)

    return run


def _core() -> Any:
    with _STARTING:
        return _only_core()


@cache
def _only_core() -> Any:
    return load_openvino().Core()


@cache
def multiplies_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16, twice as fast as float32; not known without OpenVINO."""
    return has_openvino() and ("BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def multiplies_int8() -> bool:
    """Whether the CPU multiplies integers of 8 bits faster than floats: one of x86 with AVX2."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _openvino(model: Any, precision_hint: str) -> Engine:
    settings = {
        "INFERENCE_PRECISION_HINT": precision_hint,
        "INFERENCE_NUM_THREADS": 1,  # for each tile: workers are the threads
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    local = threading.local()

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        if not hasattr(local, "request"):
            with _STARTING:
                local.request = _core().compile_model(model, "CPU", settings).create_infer_request()
                local.request.infer({0: np.zeros((1, 3, 8, 8), np.float32)})
        x = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])  # (1, 3, H, W)
        return np.array(local.request.infer({0: x})[0][0], np.float32)

    return run
