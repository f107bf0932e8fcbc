"""The networks: PatchCL's confidence and feature networks, and the U-Net that separates nuclei.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).

O. Ronneberger, P. Fischer, T. Brox, U-Net: Convolutional Networks for Biomedical Image
Segmentation, MICCAI 2015.

M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, Data-Free Quantization Through Weight
Equalization and Bias Correction, ICCV 2019: the range of a map by its batch norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from patchcl_qupath.config import NetworkInput, PatchCLConfig
from patchcl_qupath.slides.stains import STAIN_RANGE

# How far the values of a map reach beyond their mean, in standard deviations. Of 4, 6, 8 and 10
# (the paper takes 6), 8 changes least.
_DEVIATIONS = 8.0
_FEW = 8  # maps, of which batch norm takes several times as long as of more on a CPU
_SETS = 8  # of columns, that are seen as maps instead


class ConvBlock(nn.Module):
    """3x3 convolution that keeps the size, batch norm, ELU or ReLU."""

    def __init__(self, inputs: int, outputs: int, dilation: int = 1, elu: bool = True) -> None:
        super().__init__()
        self.activation = F.elu if elu else F.relu
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outputs)
        self.largest = math.inf

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(self.conv(x))  # (B, outputs, H, W)

    def activated(self, y: Tensor) -> Tensor:
        """What follows the convolution: batch norm and activation of its maps.

        In training, few maps are seen as more, side by side: every eighth column is one of eight
        sets, each with its own mean and variance, which hardly differ. That takes a sixth of the
        time.
        """
        batch, maps, height, width = y.shape
        if not (self.training and y.is_cpu and maps <= _FEW and width % _SETS == 0):
            return self.activation(self.norm(y), inplace=True)
        assert isinstance(self.norm, nn.BatchNorm2d)
        wide = y.permute(0, 2, 3, 1).reshape(batch, height, width // _SETS, _SETS * maps)
        wide = _normalised(wide.permute(0, 3, 1, 2), self.norm)
        wide = self.activation(wide, inplace=True)
        return wide.permute(0, 2, 3, 1).reshape(batch, height, width, maps).permute(0, 3, 1, 2)

    def fold(self) -> None:
        """Fold the batch norm into the convolution: same values, a third less work.

        The block keeps ``largest``, which its values hardly ever exceed.
        """
        assert isinstance(self.norm, nn.BatchNorm2d)
        with torch.no_grad():
            self.largest = float((self.norm.bias + _DEVIATIONS * self.norm.weight.abs()).max())
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()


class UpBlock(ConvBlock):
    """A ``ConvBlock`` of coarse maps, each pixel of which stands for four, and of fine ones.

    Of coarse maps, the nine weights of a fine pixel see no more than four different pixels. Those
    that see the same are added up first, so that four products are left of nine; nothing is copied.
    ``as_one`` computes the same by one convolution of all maps, as a folded block does: torch adds
    up the products of the other way in an order that depends on the size of the maps.
    """

    def __init__(self, coarse: int, fine: int, outputs: int) -> None:
        super().__init__(coarse + fine, outputs, elu=False)
        self.coarse = coarse
        self.as_one = False

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:  # type: ignore[override]
        """Maps (B, coarse, H / 2, W / 2) and (B, fine, H, W) to (B, outputs, H, W)."""
        if self.as_one:
            doubled = F.interpolate(coarse, scale_factor=2)
            return super().forward(torch.cat([doubled, fine], dim=1))
        of_coarse, of_fine = self.weights()
        y = F.conv2d(fine, of_fine, self.conv.bias, padding=1)
        return self.activated(y + F.conv_transpose2d(coarse, of_coarse, stride=2, padding=1))

    def fold(self) -> None:
        super().fold()
        self.as_one = True

    def weights(self) -> tuple[Tensor, Tensor]:
        """Those of coarse maps, (coarse, outputs, 4, 4) of a convolution that is transposed, in
        steps of 2 and padded by 1; and those of fine maps, (outputs, fine, 3, 3)."""
        of_coarse, of_fine = self.conv.weight.tensor_split([self.coarse], dim=1)
        for axis in (2, 3):
            before, at, after = of_coarse.chunk(3, axis)
            of_coarse = torch.cat([after, at + after, before + at, before], axis)
        return of_coarse.transpose(0, 1), of_fine


def _normalised(y: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """Batch norm, in training, of sets of maps (B, _SETS * C, H, W), each by itself.

    Running statistics are means of those of the sets.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    mean, var, weight, bias = (
        of_map.repeat(_SETS)
        for of_map in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    y = F.batch_norm(y, mean, var, weight, bias, True, norm.momentum or 0.0, norm.eps)
    norm.running_mean.copy_(mean.view(_SETS, -1).mean(dim=0))
    norm.running_var.copy_(var.view(_SETS, -1).mean(dim=0))
    norm.num_batches_tracked += 1
    return y


class SegmentationNetwork(nn.Module):
    """A network from pixels to probability maps, and what must be known of it to run it.

    ``input`` is what it sees of a pixel. Rows and columns must be multiples of ``divisor``, and
    begin at multiples of it in the slide, or pooling would combine other pixels. Pixels farther
    than ``receptive_radius_px`` rows or columns away do not influence a probability.
    ``core_channel`` is the map of nucleus cores; None where the network has none.
    ``feature_channels`` is the number of maps of ``logits_and_features``; None where there are no
    such maps, so that the network cannot be refined. ``input_range`` holds all values of its input,
    where its maps may be computed in 8 bits; None where they may not.
    """

    input: NetworkInput = NetworkInput.STAINS
    divisor: int = 1
    receptive_radius_px: int
    core_channel: int | None = None
    feature_channels: int | None = None
    input_range: tuple[float, float] | None = None

    @property
    def can_be_refined(self) -> bool:
        """Whether CDCL can refine the network."""
        return self.feature_channels is not None

    def probabilities(self, x: Tensor) -> Tensor:
        """Network input (B, 3, H, W) to probabilities (B, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def logits_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C, H, W), and the feature maps (B, feature_channels, h, w) behind them."""
        raise NotImplementedError


class ConfidenceNetwork(SegmentationNetwork):
    """The fully convolutional network of PatchCL: three stains in, ``channels`` confidences out.

    With the paper's 4 channels, width 8 and dilations 1, 2, 3, 5, 10, 20 it has 7,372 weights.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        dilations: Sequence[int],
        network_input: NetworkInput = NetworkInput.STAINS,
    ) -> None:
        super().__init__()
        self.first = ConvBlock(3, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(ConvBlock(width, width, dilation), ConvBlock(width, width, dilation))
            for dilation in dilations
        )
        self.last = nn.Conv2d(width, channels, 1)
        self.input = network_input
        self.receptive_radius_px = 1 + 2 * sum(dilations)

    @classmethod
    def of(cls, config: PatchCLConfig) -> ConfidenceNetwork:
        """The untrained network that the settings describe."""
        return cls(config.channels, config.width, config.dilations, config.input)

    def forward(self, x: Tensor) -> Tensor:
        """Network input (B, 3, H, W) to confidences (B, channels, H, W) in (0, 1)."""
        return torch.sigmoid(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """Network input (B, 3, H, W) to the log-odds (B, channels, H, W) of confidences."""
        x = self.first(x)  # (B, width, H, W)
        for block in self.blocks:
            y = block(x)  # (B, width, H, W)
            x = x + y if torch.is_grad_enabled() else x.add_(y)  # in place: a map less to move
        return self.last(x)  # type: ignore[no-any-return]  # (B, channels, H, W)

    def probabilities(self, x: Tensor) -> Tensor:
        """The confidences."""
        return self(x)  # type: ignore[no-any-return]


class FeatureNetwork(nn.Module):
    """The feature network of PatchCL, by whose features the cosine similarity compares patches.

    It sees patches in grey. For 50 px it has 3,386 weights; with the 7,372 of the confidence
    network these are the paper's 10.8k.
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


class _Up(nn.Sequential):
    """Two blocks: the first sees coarse and fine maps."""

    def __init__(self, coarse: int, fine: int) -> None:
        super().__init__(UpBlock(coarse, fine, fine), ConvBlock(fine, fine, elu=False))

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:  # type: ignore[override]
        first, second = self
        return second(first(coarse, fine))  # type: ignore[no-any-return]


class NucleusNetwork(SegmentationNetwork):
    """A small U-Net: three stains in; logits of a nucleus, and of the core of a nucleus, out.

    With the default widths it has 62,002 weights.
    """

    divisor = 4
    core_channel = 1
    input_range = STAIN_RANGE
    # Two convolutions on each of the five stages, of 1, 2, 4, 2 and 1 px; and where in its block
    # of 4 a pixel lies.
    receptive_radius_px = 2 * (1 + 2 + 4 + 2 + 1) + divisor - 1

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.down = _twice(3, fine)
        self.down_middle = _twice(fine, middle)
        self.coarse = _twice(middle, coarse)
        self.up_middle = _Up(coarse, middle)
        self.up = _Up(middle, fine)
        self.last = nn.Conv2d(fine, 2, 1)
        self.feature_channels = coarse

    def forward(self, x: Tensor) -> Tensor:
        """Normalised stains (B, 3, H, W) to logits (B, 2, H, W) of a nucleus, and of its core."""
        return self.logits_and_features(x)[0]

    def probabilities(self, x: Tensor) -> Tensor:
        """The sigmoid of the logits."""
        return torch.sigmoid(self(x))

    def logits_and_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, 2, H, W), and the coarse features (B, coarse, H / 4, W / 4) behind them."""
        fine = self.down(x)  # (B, fine, H, W)
        middle = self.down_middle(F.max_pool2d(fine, 2))  # (B, middle, H / 2, W / 2)
        coarse = self.coarse(F.max_pool2d(middle, 2))  # (B, coarse, H / 4, W / 4)
        middle = self.up_middle(coarse, middle)  # (B, middle, H / 2, W / 2)
        fine = self.up(middle, fine)  # (B, fine, H, W)
        return self.last(fine), coarse  # (B, 2, H, W), (B, coarse, H / 4, W / 4)


Network = TypeVar("Network", bound=nn.Module)


def _twice(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        ConvBlock(inputs, outputs, elu=False), ConvBlock(outputs, outputs, elu=False)
    )


def folded(network: Network) -> Network:
    """A copy for inference, with each batch norm folded into the convolution before it."""
    network = deepcopy(network).eval()
    for module in network.modules():
        if isinstance(module, ConvBlock):
            module.fold()
    return network


def to_channels_last(network: nn.Module) -> None:
    """Store the weights in the order in which convolutions are 1.7 times as fast on CPUs."""
    to: Any = network.to  # torch 2.13 does not type this call, later ones do
    to(memory_format=torch.channels_last)


def device() -> torch.device:
    """Where networks run: a CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
