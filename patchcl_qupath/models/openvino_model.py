"""A network as an OpenVINO model, operation by operation.

OpenVINO's own ways from torch cost more than they give: one needs ``torch.jit.trace``, which torch
deprecates, and does not support on Python 3.14; the other ``torch.export``, which takes 20 s in
each process. The networks here are of few operations, so that these are written down.
"""

from __future__ import annotations

import logging
import operator
import sys
import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from patchcl_qupath.models.network import ConvBlock, SegmentationNetwork, UpBlock

logger = logging.getLogger(__name__)

_LOADING = threading.Lock()


def load_openvino() -> Any:
    """The module openvino, imported without its telemetry; threads may ask for it at once.

    That reports the import to a web service, in a process of its own: a fork of this one, which has
    threads, or, from Python 3.14 on, one that runs the user's script again.
    """
    with _LOADING:
        return _loaded()


def has_openvino() -> bool:
    """Whether OpenVINO is installed, and can be loaded: a library that it needs may be absent."""
    if find_spec("openvino") is None:
        return False
    try:
        load_openvino()
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("OpenVINO cannot be loaded, and is not used: %s", error)
        return False
    return True


@cache
def _loaded() -> Any:
    telemetry = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # as if not installed
    try:
        import openvino
        import openvino.opset13
    finally:
        del sys.modules["openvino_telemetry"]
        if telemetry is not None:
            sys.modules["openvino_telemetry"] = telemetry
    return openvino


def openvino_model(network: SegmentationNetwork, in_int8: bool = False) -> Any:
    """``network.probabilities`` as an OpenVINO model, for one image of any height and width.

    The batch norms of the network are folded. With ``in_int8``, which needs a network with an
    ``input_range``, all maps and weights of convolutions are rounded to 8 bits, and OpenVINO
    multiplies these: maps in 256 steps from 0 to what their batch norm lets expect, weights in 127
    for each output. Raises NotImplementedError for an operation that no network had so far: add it
    to ``_FUNCTIONS`` or ``_MODULES``.
    """
    openvino = load_openvino()
    opset13 = openvino.opset13
    with torch.no_grad():
        traced = _traced(_Probabilities(network))
    pixels = opset13.parameter([1, 3, -1, -1], np.float32, name="pixels")
    outputs: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            outputs[node] = pixels
            if in_int8:
                assert network.input_range is not None, "this network is not one for 8 bits"
                outputs[node] = _in_steps(opset13, pixels, *network.input_range)
        elif node.op == "output":
            result = opset13.result(outputs[node.args[0]])
            return openvino.Model([result], [pixels], "network")
        else:
            convert = _converter(node, traced, in_int8)
            arguments = fx.node.map_arg(node.args, outputs.get)
            outputs[node] = convert(opset13, *arguments, **_settings(node))
    raise AssertionError("a graph without an output")


class _Probabilities(nn.Module):
    """A network whose forward pass yields probabilities, as that alone is traced."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.probabilities(x)


class _Tracer(fx.Tracer):
    """Blocks are single operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ConvBlock) or super().is_leaf_module(m, module_qualified_name)


def _traced(module: nn.Module) -> fx.GraphModule:
    return fx.GraphModule(module, _Tracer().trace(module))


def _converter(node: fx.Node, traced: fx.GraphModule, in_int8: bool) -> Callable[..., Any]:
    """What makes the OpenVINO node of a call, given the opset and the call's arguments."""
    if node.op == "call_module":
        module = traced.get_submodule(str(node.target))
        if type(module) in _MODULES:
            convert = _MODULES[type(module)]
            return lambda ops, *maps: convert(ops, *maps, module, in_int8)
    elif node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target]
    raise NotImplementedError(f"no OpenVINO operation for {node.op} {node.target}")


def _settings(node: fx.Node) -> dict[str, Any]:
    """The settings of a call that are not torch's default."""
    given = node.kwargs.items()
    return {name: value for name, value in given if _DEFAULTS.get(name, _NONE) != value}


def _in_steps(ops: Any, x: Any, lowest: Any, highest: Any, steps: int = 256) -> Any:
    """Values in equal steps between two: how OpenVINO is told of 8 bits."""
    ends = [ops.constant(np.asarray(end, np.float32)) for end in (lowest, highest)]
    return ops.fake_quantize(x, *ends, *ends, steps)


def _block(ops: Any, x: Any, block: ConvBlock, in_int8: bool) -> Any:
    return _activated(ops, _convolution(ops, x, block.conv, in_int8), block, in_int8)


def _up_block(ops: Any, coarse: Any, fine: Any, block: UpBlock, in_int8: bool) -> Any:
    """Sums of 8 bits are the same in any order; those of floats would depend on the tile's size."""
    once, twice = [1, 1], [2, 2]
    if not in_int8:
        maps = ops.concat([_doubled(ops, coarse), fine], 1)
        return _activated(ops, _convolution(ops, maps, block.conv, in_int8), block, in_int8)
    of_coarse, of_fine = (weights.detach().numpy() for weights in block.weights())
    kernels = _kernels(ops, of_coarse, in_int8, output_axis=1)
    y = ops.convolution_backprop_data(
        coarse, kernels, twice, pads_begin=once, pads_end=once, dilations=once
    )
    # A part of a sum hardly ever exceeds what the sum does, to either side.
    y = _in_steps(ops, y, -block.largest * 128 / 127, block.largest)
    kernels = _kernels(ops, of_fine, in_int8, output_axis=0)
    sums = _biased(ops, ops.convolution(fine, kernels, once, once, once, once), block.conv)
    return _activated(ops, ops.add(sums, y), block, in_int8)


def _activated(ops: Any, x: Any, block: ConvBlock, in_int8: bool) -> Any:
    y = _FUNCTIONS[block.activation](ops, x, inplace=True)
    return _in_steps(ops, y, 0.0, block.largest) if in_int8 else y


def _convolution(ops: Any, x: Any, conv: nn.Conv2d, in_int8: bool) -> Any:
    padding = conv.padding
    assert not isinstance(padding, str)
    assert (conv.groups, conv.padding_mode) == (1, "zeros")
    kernels = _kernels(ops, conv.weight.detach().numpy(), in_int8, output_axis=0)
    y = ops.convolution(x, kernels, [*conv.stride], [*padding], [*padding], [*conv.dilation])
    return _biased(ops, y, conv)


def _kernels(ops: Any, weights: NDArray[np.float32], in_int8: bool, *, output_axis: int) -> Any:
    """Weights (…, …, k, k), as many steps for each output.

    In 8 bits, weights are of 7: a CPU without VNNI adds up two products in 16 bits, which those of
    256 and 255 steps would exceed. So all CPUs have the same sums.
    """
    constant = ops.constant(np.ascontiguousarray(weights))
    if not in_int8:
        return constant
    others = tuple(axis for axis in range(4) if axis != output_axis)
    most = 2 * np.abs(weights).max(axis=others, keepdims=True)
    return _in_steps(ops, constant, -most, most, 255)


def _biased(ops: Any, x: Any, conv: nn.Conv2d) -> Any:
    if conv.bias is None:
        return x
    return ops.add(x, ops.constant(conv.bias.detach().numpy().reshape(1, -1, 1, 1)))


def _max_pool(ops: Any, x: Any, size: int) -> Any:
    sides, none = [size, size], [0, 0]
    return ops.max_pool(x, sides, [1, 1], none, none, sides).output(0)


def _doubled(ops: Any, x: Any) -> Any:
    """Each pixel as four."""
    return ops.interpolate(
        x,
        ops.constant(np.full(2, 2, np.float32)),
        "nearest",
        "scales",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
        axes=ops.constant(np.array([2, 3], np.int64)),
    )


# An operation that torch does in place is one of values here.
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    F.relu: lambda ops, x, inplace: ops.relu(x),
    F.elu: lambda ops, x, inplace: ops.elu(x, 1.0),
    F.max_pool2d: _max_pool,
    torch.sigmoid: lambda ops, x: ops.sigmoid(x),
    operator.add: lambda ops, x, y: ops.add(x, y),
    "add_": lambda ops, x, y: ops.add(x, y),
}
_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    ConvBlock: _block,
    UpBlock: _up_block,
    nn.Conv2d: _convolution,
}
_NONE = object()
_DEFAULTS = {
    "alpha": 1.0,
    "ceil_mode": False,
    "dilation": 1,
    "padding": 0,
    "return_indices": False,
    "stride": None,
}
