"""What runs a network on pixels: torch, on any device, or OpenVINO, on CPUs and much faster.

An engine turns what the network sees of pixels, its scaled stains say, (H, W, 3) in float32, into
confidences (C, H, W); H and W are multiples of what the network asks for. Threads may share it.
"""

from __future__ import annotations

import platform
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.errors import ConfigError
from patchcl_qupath.models.network import (
    ConfidenceNetwork,
    NucleusNetwork,
    device,
    folded,
)

Engine = Callable[[NDArray[np.float32]], NDArray[np.float32]]
Network = ConfidenceNetwork | NucleusNetwork

# The first array that OpenVINO's Python side is given sets it up, and two threads that do so at the
# same moment wait for each other for ever.
_STARTING = threading.RLock()

_KEPT = 4
_kept: dict[tuple[str, str], Engine] = {}  # by kind and digest


def choose(wanted: str) -> str:
    """The engine for "auto", "torch" or "openvino", with its precision, which changes last digits.

    "auto" is OpenVINO where it is installed and no GPU is there. Raises ConfigError.
    """
    if wanted == "openvino" and not find_spec("openvino"):
        raise ConfigError("there is no OpenVINO here: pip install openvino, or use --engine torch")
    if wanted == "torch" or not find_spec("openvino"):
        return "torch"
    if wanted == "auto" and device().type != "cpu":
        return "torch"
    return "openvino bfloat16" if _has_bfloat16() else "openvino float32"


def of(kind: str, network: Network, digest: str) -> Engine:
    """The engine for a network of a model's ``digest``: kept, as workers meet it image by image."""
    with _STARTING:
        if (kind, digest) not in _kept:
            if len(_kept) == _KEPT:
                _kept.pop(next(iter(_kept)))
            _kept[kind, digest] = start(kind, network)
        return _kept[kind, digest]


def start(kind: str, network: Network) -> Engine:
    """An engine, of those that ``choose`` names, for a network.

    Raises ConfigError on a machine that has not what the one had that chose.
    """
    if kind == "torch":
        return _torch(folded(network))
    if not find_spec("openvino"):
        raise ConfigError(
            f"{platform.node()} has no OpenVINO: install it on all workers, or use --engine torch"
        )
    return _openvino(folded(network), precision=kind.removeprefix("openvino "))


def _torch(network: Network) -> Engine:
    network = network.to(device())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.7 x as fast
    # A GPU has memory for a few tiles, and is busy with one; there may be dozens of threads.
    turn = threading.Lock() if device().type != "cpu" else nullcontext()

    def run(stains: NDArray[np.float32]) -> NDArray[np.float32]:
        with turn, torch.inference_mode():
            x = torch.from_numpy(stains).to(device()).permute(2, 0, 1)[None]  # (1, 3, H, W)
            x = x.contiguous(memory_format=torch.channels_last)
            y = network(x)[0]  # (C, H, W)
            y = torch.sigmoid(y) if isinstance(network, NucleusNetwork) else y
            return np.asarray(y.cpu(), np.float32)

    return run


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16, twice as fast as float32."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _openvino(network: Network, precision: str) -> Engine:
    settings = {
        "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float32": "f32"}[precision],
        "INFERENCE_NUM_THREADS": 1,  # for each tile: workers are the threads
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    with _STARTING:
        model = _converted(network)
    local = threading.local()

    def run(stains: NDArray[np.float32]) -> NDArray[np.float32]:
        if not hasattr(local, "request"):
            with _STARTING:
                local.request = _core().compile_model(model, "CPU", settings).create_infer_request()
                local.request.infer({0: np.zeros((1, 3, 8, 8), np.float32)})
        x = np.ascontiguousarray(stains.transpose(2, 0, 1)[None])  # (1, 3, H, W)
        return np.array(local.request.infer({0: x})[0][0], np.float32)

    return run


class _Probabilities(nn.Module):
    """A network whose output is probabilities."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return torch.sigmoid(y) if isinstance(self.network, NucleusNetwork) else y


def _converted(network: Network) -> Any:
    """A network as an OpenVINO model, for one image of any height and width.

    This calls OpenVINO's torch frontend directly. ``openvino.convert_model`` calls it, too, but
    also reports each conversion to a web service unless the user has opted out, and takes a second.
    """
    from openvino import PartialShape, Type
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(1, 3, 8, 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # the frontend still needs a trace
        # Checking the trace imports torch.distributed: 0.6 s.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            _Probabilities(network), example, check_trace=False
        )
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, shared_memory=False)  # in use until the end
    loaded = frontend.load(decoder)
    (stains,) = loaded.get_inputs()
    loaded.set_partial_shape(stains, PartialShape([1, 3, -1, -1]))
    loaded.set_element_type(stains, Type.f32)
    return frontend.convert(loaded)
