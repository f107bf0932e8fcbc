"""The contrastive loss of PatchCL: patches sampled by entropy, and their similarity.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).

``PatchCLConfig.similarity`` is what patches are compared by: "prototypes" compares the mean stain
where a patch is confident, and where it is not; the paper's own measures (``MEASURES``) compare
patches that are positive or negative as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.models.network import FeatureNetwork, device

_ANCHORS = 10  # positives per channel that the paper compares with all others


class Contrast(NamedTuple):
    """A loss, and the two mean distances of patches by which the paper defines convergence."""

    loss: Tensor
    positive_positive: float  # small once confident regions are alike
    positive_negative: float  # large once they are unlike the rest


def draw_patches(confidence: Tensor, settings: PatchCLConfig, generator: torch.Generator) -> Tensor:
    """The entropy sampler: patches are drawn where the network is certain, of either answer.

    From confidences (B, C, H, W): positions (B, C, n) in the grid of patches, drawn with
    replacement, with a probability proportional to 1 - the patch's mean entropy in bits.
    """
    a = confidence.clamp(1e-6, 1 - 1e-6)
    entropy = -(a * a.log2() + (1 - a) * (1 - a).log2())  # (B, C, H, W)
    chance = (1 - _patch_means(entropy, settings)).clamp_min(1e-3)  # (B, C, P)
    drawn = torch.multinomial(chance.flatten(0, 1), settings.patches, True, generator=generator)
    return drawn.view(*chance.shape[:2], -1)  # (B, C, n)


def similarity_space(stains: Tensor, config: Config) -> Tensor:
    """The space of prototypes: hematoxylin, and its local contrast against the background.

    From normalised stains (B, 3, H, W) to (B, 2, H, W). By local contrast, a nucleus in purple
    tissue differs from that tissue, which may have more hematoxylin than nuclei elsewhere.
    """
    settings, mpp = config.patchcl, config.slide.mpp
    hematoxylin = blur(stains[:, :1], settings.blur_um / mpp)  # (B, 1, H, W)
    background = blur(hematoxylin, settings.background_radius_um / mpp)  # (B, 1, H, W)
    local_contrast = hematoxylin - background
    return torch.cat([hematoxylin, settings.local_contrast_weight * local_contrast], dim=1)


def contrast_prototypes(
    confidence: Tensor, space: Tensor, index: Tensor, settings: PatchCLConfig
) -> Contrast:
    """The contrast of the paper with soft parity: each patch has a foreground and a background.

    ``confidence`` (B, C, H, W), ``space`` (B, S, H, W), ``index`` (B, C, n) of ``draw_patches``.
    The foreground f of a patch is its mean of ``space`` weighted with confidence, its background g
    that weighted with 1 - confidence; both always exist, so no step is skipped. A patch of mean
    confidence m has weight 4 m (1 - m), or the foreground would shrink to the darkest spots.
    """
    channels, tau = confidence.shape[1], settings.temperature
    attended = (confidence[:, :, None] * space[:, None]).flatten(1, 2)  # (B, C * S, H, W)
    inside = _patch_means(attended, settings)  # (B, C * S, P)
    inside = inside.view(len(index), channels, -1, inside.shape[-1])  # (B, C, S, P)
    outside = _patch_means(space, settings)[:, None] - inside  # (B, C, S, P)
    filled = _patch_means(confidence, settings)[:, :, None]  # (B, C, 1, P)
    f = _pick(inside / (filled + 1e-6), index)  # (C, N, S), N = B * n patches
    g = _pick(outside / (1 - filled + 1e-6), index)  # (C, N, S)
    m = _pick(filled, index)[..., 0]  # (C, N)
    weight = 4 * m * (1 - m) + 1e-6  # (C, N)
    ff, gg, fg = _distances(f, f), _distances(g, g), _distances(f, g)  # (C, N, N)
    weights = weight[:, None]  # (C, 1, N): of the patches that each is compared with
    pull_f, pull_g = _mean(ff, weights) / tau, _mean(gg, weights) / tau  # (C, N)
    loss = pull_f + _nearness(fg, weights, tau) + pull_g + _nearness(fg.mT, weights, tau)
    if channels > 1:
        own = _own(channels, f.shape[1])  # (C, 1, C * N)
        across = _distances(f, f.flatten(0, 1)).masked_fill(own, math.inf)  # (C, N, C * N)
        others = weight.flatten().masked_fill(own, 0)  # (C, 1, C * N)
        loss = loss + settings.inter_weight * (pull_f + _nearness(across, others, tau))
    apart = _mean(ff, weights).mean().item(), _mean(fg, weights).mean().item()
    return Contrast((weight * loss).mean(), *apart)


def contrast_patches(
    confidence: Tensor,
    stains: Tensor,
    index: Tensor,
    settings: PatchCLConfig,
    features: FeatureNetwork,
    generator: torch.Generator,
) -> Contrast | None:
    """The contrast of the paper as published, with hard parity: a patch is positive or negative.

    ``confidence`` (B, C, H, W), ``stains`` (B, 3, H, W), ``index`` (B, C, n) of ``draw_patches``.
    It is positive with a probability of its mean confidence. None where a channel has no positive
    or no negative patch: then there is nothing to contrast. Two details of the published code are
    left out, and hardly change the Dice: there, channels weigh as much as they have positives, and
    pixels are in [0.05, 1].
    """
    channels, side, tau = confidence.shape[1], settings.patch_px, settings.temperature
    mean = _pick(_patch_means(confidence.detach(), settings)[:, :, None], index)[..., 0]
    positive = torch.bernoulli(mean, generator=generator).bool()  # (C, N), N = B * n patches
    if not (positive.any(dim=1) & ~positive.all(dim=1)).all():
        return None

    cut = {"kernel_size": side, "stride": settings.stride_px}
    pixels = F.unfold(stains.clamp(0, 1), **cut)[:, None].expand(-1, channels, -1, -1)
    weights = F.unfold(confidence.flatten(0, 1)[:, None], **cut)  # (B * C, p * p, P)
    weights = _pick(weights.view(len(index), channels, *weights.shape[1:]), index)  # (C, N, p * p)
    patches = _pick(pixels, index).view(*positive.shape, 3, -1) * weights[:, :, None]
    represent, compare = MEASURES[settings.similarity]
    points = represent(patches.reshape(-1, 3, side, side), features)  # (C * N, ...)
    chosen = torch.multinomial(positive.float(), _ANCHORS, True, generator=generator)  # (C, A)
    chosen = chosen + positive.shape[1] * torch.arange(channels, device=device())[:, None]
    similar = compare(points[chosen.flatten()], points)  # (C * A, C * N)
    similar = similar.view(channels, _ANCHORS, -1)  # (C, A, C * N)
    own, taken = _own(channels, positive.shape[1]), positive.flatten()  # (C, 1, C * N), (C * N,)
    alike, unlike = _mean(similar, own & taken), _mean(similar, own & ~taken)  # (C, A)
    logits = similar / tau
    loss = logits.masked_fill(~own | taken, -math.inf).logsumexp(-1) - alike / tau  # (C, A)
    if channels > 1:
        others = logits.masked_fill(own | ~taken, -math.inf).logsumexp(-1)  # (C, A)
        loss = loss + settings.inter_weight * (others - alike / tau)
    return Contrast(loss.mean(), -alike.mean().item(), -unlike.mean().item())


def _grey_levels(patches: Tensor) -> Tensor:
    """The soft membership of each pixel in each of 25 grey levels: (N, 25, p * p)."""
    levels = torch.linspace(0, 1, 25, device=patches.device)[:, None]  # (25, 1)
    grey = patches.mean(dim=1).flatten(1)[:, None]  # (N, 1, p * p)
    return torch.softmax(-0.5 * ((grey - levels) / levels[1]) ** 2, dim=1)


def _cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    y = y.clamp(1e-6, 1 - 1e-6)
    return (x @ y.log2().T + (1 - x) @ (1 - y).log2().T) / x.shape[1]  # (A, K)


def _mutual_information(x: Tensor, y: Tensor) -> Tensor:
    joint = torch.einsum("aip,kjp->akij", x, y) / x.shape[-1] + 1e-9  # (A, K, 25, 25)
    independent = joint.sum(dim=3, keepdim=True) * joint.sum(dim=2, keepdim=True)
    return (joint * (joint / independent).log2()).sum(dim=(2, 3))  # (A, K), in bits


Measure = tuple[Callable[[Tensor, FeatureNetwork], Tensor], Callable[[Tensor, Tensor], Tensor]]
# The paper's: a representation of patches (N, 3, p, p), and the similarity of two sets of these.
MEASURES: dict[str, Measure] = {
    "mse": (lambda patches, _: patches.flatten(1), lambda x, y: -_distances(x, y)),
    "cross_entropy": (lambda patches, _: patches.flatten(1), _cross_entropy),
    "cosine": (lambda patches, f: F.normalize(f(patches.mean(1, True))), lambda x, y: x @ y.T),
    "mutual_information": (lambda patches, _: _grey_levels(patches), _mutual_information),
}


def _own(channels: int, patches: int) -> Tensor:
    """Which of all channels' patches are of the channel itself: (C, 1, C * N)."""
    return torch.eye(channels, device=device()).bool().repeat_interleave(patches, dim=1)[:, None]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared differences (..., N, M) of points (..., N, S) and (..., M, S)."""
    squares = x.square().mean(-1)[..., :, None] + y.square().mean(-1)[..., None, :]
    return (squares - 2 * x @ y.mT / x.shape[-1]).clamp_min(0)


def _mean(distances: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the last dimension."""
    return (distances * weights).sum(-1) / weights.sum(-1)


def _nearness(distances: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Log of the weighted mean of exp(-distance / temperature), over the last dimension."""
    terms = weights.clamp_min(1e-12).log() - distances / temperature
    return terms.logsumexp(-1) - weights.sum(-1).log()


def _patch_means(maps: Tensor, settings: PatchCLConfig) -> Tensor:
    """Means (B, C, P) over the patches of maps (B, C, H, W), row by row."""
    side, stride = settings.patch_px, settings.stride_px
    if side % stride == 0:  # each pixel is in several patches, and is added up once
        return F.avg_pool2d(F.avg_pool2d(maps, stride), side // stride, 1).flatten(2)
    return F.avg_pool2d(maps, side, stride).flatten(2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, C, S, P) those of the patches ``index`` (B, C, n), as (C, B * n, S)."""
    drawn = values.gather(3, index[:, :, None].expand(-1, -1, values.shape[2], -1))  # (B, C, S, n)
    return drawn.permute(1, 0, 3, 2).flatten(1, 2)


def blur(maps: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of maps (B, 1, H, W), mirrored at the border; a sigma of 0 is none."""
    if not sigma_px:
        return maps
    radius = min(math.ceil(3 * sigma_px), min(maps.shape[2:]) - 1)
    x = torch.arange(-radius, radius + 1, device=maps.device) / sigma_px
    taps = torch.softmax(-0.5 * x**2, dim=0)  # (2 * radius + 1,)
    maps = F.pad(maps, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(maps, taps[None, None, :, None]), taps[None, None, None])
