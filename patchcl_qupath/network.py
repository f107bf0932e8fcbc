"""The two networks of PatchCL, the model that is stored and shipped, and how it is run.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patchcl_qupath.config import Config, PatchCLConfig, from_dict, to_dict
from patchcl_qupath.errors import ModelError
from patchcl_qupath.stains import StainScale
from patchcl_qupath.storage import replacing, write_json

_FORMAT = "patchcl-qupath model 1"


class ConvBlock(nn.Module):
    """3x3 convolution that keeps the size, batch norm, ELU."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.norm(self.conv(x)), inplace=True)  # (B, outputs, H, W)

    def fold(self) -> None:
        """Make the batch norm part of the convolution: same values, a third less work."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class ConfidenceNetwork(nn.Module):
    """The fully convolutional network of PatchCL: three stains in, ``channels`` confidences out.

    With the paper's 4 channels, width 8 and dilations 1, 2, 3, 5, 10, 20 it has 7,372 weights.
    """

    def __init__(self, channels: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.first = ConvBlock(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvBlock(width, width, dilation), ConvBlock(width, width, dilation))
            for dilation in dilations
        )
        self.last = nn.Conv2d(width, channels, 1)
        self.reach_px = 1 + 2 * sum(dilations)  # the farthest row or column that has a say

    @classmethod
    def of(cls, config: PatchCLConfig) -> ConfidenceNetwork:
        """The untrained network that the settings describe."""
        return cls(config.channels, config.width, config.dilations)

    def forward(self, x: Tensor) -> Tensor:
        """Scaled stains (B, 3, H, W) to confidences (B, channels, H, W) in (0, 1)."""
        x = self.first(x)  # (B, width, H, W)
        for block in self.blocks:
            y = block(x)  # (B, width, H, W)
            x = x + y if torch.is_grad_enabled() else x.add_(y)  # in place: a map less to move
        return torch.sigmoid(self.last(x))  # (B, channels, H, W)

    def folded(self) -> ConfidenceNetwork:
        """A copy for inference, in which each batch norm is part of the convolution before it."""
        network = deepcopy(self).eval()
        for module in network.modules():
            if isinstance(module, ConvBlock):
                module.fold()
        return network


class FeatureNetwork(nn.Module):
    """The feature network of PatchCL, which the cosine similarity compares patches with.

    It sees patches in grey. For 50 px it has 3,386 weights: with the 7,372, the paper's 10.8k.
    """

    def __init__(self, patch_px: int = 50) -> None:
        super().__init__()
        side = ((patch_px - 2 - 5) // 2 + 1 - 5) // 2 + 1  # what three unpadded layers leave
        self.layers = nn.Sequential(
            *(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ELU()),
            *(nn.Conv2d(8, 8, 3, 2, dilation=2, bias=False), nn.BatchNorm2d(8), nn.ELU()),
            *(nn.Conv2d(8, 1, 3, 2, dilation=2, bias=False), nn.BatchNorm2d(1), nn.ELU()),
            *(nn.Flatten(), nn.Linear(side**2, 32)),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """Grey patches (N, 1, patch_px, patch_px) to features (N, 32)."""
        return torch.as_tensor(self.layers(patches))


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network, with all that is needed to use it, and the settings that made it.

    ``channel`` is the one of the network's channels that shows nuclei; ``inverted`` says that it
    is low on them. A nucleus has confidence above ``threshold``. ``training`` is the log, for
    people and reports. All was chosen without labels (see ``patchcl``).
    """

    network: ConfidenceNetwork
    config: Config
    channel: int
    inverted: bool
    threshold: float
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def mpp(self) -> float:
        """um per pixel that the network was trained at, and must be run at."""
        return self.config.slide.mpp

    @property
    def reach_px(self) -> int:
        """How far beyond a pixel the confidence there looks, in working pixels."""
        return self.network.reach_px

    @cached_property
    def engine(self) -> ConfidenceNetwork:
        """The network as it is run. Threads may share it."""
        network = self.network.folded().to(device())
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 1.7 x as fast
        return network

    @cached_property
    def digest(self) -> str:
        """Hexadecimal digest of all that a confidence depends on."""
        facts = [self.config.patchcl.dilations, self.mpp, *self._choices().values()]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for name, values in self.network.state_dict().items():
            digest.update(name.encode() + values.cpu().numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path, name: str) -> Path:
        """Write NAME.pt, and NAME.json for people to read; returns the path of NAME.pt.

        Each file appears whole or not at all. Raises StorageError where they cannot be written.
        """
        path = folder / f"{name}.pt"
        facts = {"digest": self.digest, **self._choices()}
        facts |= {"config": to_dict(self.config), "training": self.training}
        weights = {key: values.cpu() for key, values in self.network.state_dict().items()}
        content = io.BytesIO()
        torch.save({"format": _FORMAT, **facts, "weights": weights}, content)
        write_json(path.with_suffix(".json"), facts)
        with replacing(path) as temporary:
            temporary.write_bytes(content.getvalue())
        return path

    @classmethod
    def load(cls, path: Path) -> Model:
        """Read NAME.pt back. Nothing in the file is executed.

        Raises ModelError for a file that is missing, damaged, of another kind or unsafe.
        """
        advice = "train a new one with `patchcl-qp train PROJECT.qpproj`"
        if not path.is_file():
            raise ModelError(f"{path} does not exist: {advice}")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            if stored["format"] != _FORMAT:
                raise ValueError(f"its format is {stored['format']}")
            config = from_dict(stored["config"])
            with torch.device("meta"):  # no memory yet: the settings are only a claim so far
                network = ConfidenceNetwork.of(config.patchcl)
            network.load_state_dict(stored["weights"], assign=True)
            choices = (stored[key] for key in ("channel", "inverted", "threshold", "training"))
            model = cls(network.eval(), config, *choices)
            if model.digest != stored["digest"]:
                raise ValueError("it was changed after it was written")
        except Exception as error:  # a damaged or hostile file can raise anything
            reason = "it is damaged, no model at all, or of another version"
            raise ModelError(f"{path} cannot be used: {reason}; {advice}") from error
        return model

    def _choices(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("channel", "inverted", "threshold")}

    def __getstate__(self) -> dict[str, Any]:
        """Pickled for Dask workers without the engine: each worker has its own device."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def device() -> torch.device:
    """Where networks run: a CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def confidence(model: Model, rgb: NDArray[np.uint8], scale: StainScale) -> NDArray[np.float32]:
    """How sure the model is of a nucleus at each pixel of an image (H, W, 3): (H, W) in [0, 1].

    ``rgb`` is at ``model.mpp``, ``scale`` the stain range of its slide. Pixels that lie at least
    ``model.reach_px`` from the border of ``rgb`` have the value they have in the whole slide.

    Values are multiples of 1/255: how a convolution sums depends on the size of the tile, and two
    tiles would differ in the last bits of a pixel, which a threshold may turn into another nucleus.
    """
    stains = torch.from_numpy(scale.apply(rgb)).to(device())  # (H, W, 3)
    x = stains.permute(2, 0, 1)[None]  # (1, 3, H, W), channels last in memory: twice as fast
    with torch.inference_mode():
        nucleus = model.engine(x)[0, model.channel]  # (H, W)
        if model.inverted:
            nucleus = 1 - nucleus
        return np.asarray((torch.round(nucleus * 255) / 255).cpu(), np.float32)
