"""How a network is taught from labels, whoever made them: what it is to answer, how wrong it is,
how crops are varied, and how its weights are averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from patchcl_qupath.models.network import device

TrainingSample = tuple[
    NDArray[np.float32], NDArray[np.uint8]
]  # scaled stains, targets: (H, W, 3) each
_CORE = 0.5  # of a nucleus's greatest depth: what is deeper is its core


def targets(labels: NDArray[np.int32], background: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """What to answer, from labels 1..N (H, W) and what is surely none: (H, W, 3).

    The three are nucleus, core of a nucleus, and whether the pixel is known at all. What is neither
    labelled nor background is not. Touching nuclei end where the other begins.
    """
    inside = labels > 0
    wide = np.pad(labels, 1, mode="edge")
    alone = inside.copy()  # without a pixel of another nucleus next to it
    for beside in (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]):
        alone &= (beside == labels) | (beside == 0)
    depth = ndimage.distance_transform_edt(alone)
    deepest = np.zeros(labels.max(initial=0) + 1)
    np.maximum.at(deepest, labels.ravel(), depth.ravel())
    core = inside & (depth > _CORE * deepest[labels])
    return np.stack([inside, core, inside | background], axis=-1).astype(np.uint8)


def bce_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy and soft Dice of logits (B, 2, H, W) against ``targets`` (B, 3, H, W)."""
    answer, valid = target[:, :2], target[:, 2:]
    wrong = F.binary_cross_entropy_with_logits(logits, answer, reduction="none") * valid
    entropy = wrong.sum(dim=(0, 2, 3)) / valid.sum().clamp_min(1)  # (2,)
    probability = torch.sigmoid(logits) * valid
    both = (probability * answer).sum(dim=(0, 2, 3))  # (2,)
    either = (probability + answer * valid).sum(dim=(0, 2, 3))  # (2,)
    return (entropy + 1 - (2 * both + 1) / (either + 1)).sum()


def random_crop(
    sample: TrainingSample, side_px: int, scale_jitter: float, rng: np.random.Generator
) -> TrainingSample:
    """A random crop of a lesson, (side_px, side_px, 3) each: turned, mirrored, larger or smaller.

    The factor of its size is between 1 / varied_size and varied_size.
    """
    factor = math.exp(rng.uniform(-1, 1) * math.log(scale_jitter))
    stains, target = random_window(sample, round(side_px * factor), rng)
    seen = torch.from_numpy(stains.copy()).permute(2, 0, 1)[None]  # (1, 3, S', S')
    seen = F.interpolate(seen, size=(side_px, side_px), mode="bilinear")  # (1, 3, S, S)
    wanted = torch.from_numpy(target.copy()).permute(2, 0, 1)[None]
    wanted = F.interpolate(wanted, size=(side_px, side_px), mode="nearest-exact")
    return seen[0].permute(1, 2, 0).numpy(), wanted[0].permute(1, 2, 0).numpy()


def augment_stains(stains: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Scaled stains (H, W, 3) as another stainer and scanner might have left them.

    Each stain is stronger or weaker and has another zero; a quarter is blurred, a quarter noisy.
    """
    gain = rng.uniform(0.75, 1.25, 3).astype(np.float32)
    zero = rng.uniform(-0.12, 0.12, 3).astype(np.float32)
    stains = stains * gain + zero
    kind = rng.random()
    if kind < 0.25:
        sigma = rng.uniform(0.3, 1.2)
        return np.asarray(ndimage.gaussian_filter(stains, (sigma, sigma, 0)))
    if kind < 0.5:
        return stains + 0.05 * rng.standard_normal(stains.shape, np.float32)
    return stains


@torch.no_grad()
def ema_update(average: nn.Module, network: nn.Module, keep: float) -> None:
    """Move averaged weights towards those of ``network``, keeping so much of what they were."""
    pairs = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
    for mean, now in pairs:
        if mean.dtype.is_floating_point:
            mean.lerp_(now, 1 - keep)
        else:  # how many batches were seen
            mean.copy_(now)


def to_batch(crops: Sequence[NDArray[np.generic]]) -> Tensor:
    """Arrays (S, S, C) as a tensor (B, C, S, S), channels last in memory."""
    batch = torch.from_numpy(np.stack(crops).astype(np.float32, copy=False)).to(device())
    return batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def random_window(
    layers: Sequence[NDArray[Any]], side_px: int, rng: np.random.Generator
) -> list[NDArray[Any]]:
    """A random crop (side_px, side_px, ...), turned and mirrored at random.

    ``layers`` are images (H, W, ...) that lie over each other: all are cut and turned alike. What
    a small image lacks is mirrored.
    """
    height, width = layers[0].shape[:2]
    row, col = (int(rng.integers(max(0, size - side_px) + 1)) for size in (height, width))
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    crops = []
    for layer in layers:
        crop = layer[row : row + side_px, col : col + side_px]
        lacks = [(0, side_px - crop.shape[0]), (0, side_px - crop.shape[1])]
        crop = np.pad(crop, [*lacks, *[(0, 0)] * (crop.ndim - 2)], mode="symmetric")
        crop = np.rot90(crop, turns)
        crops.append(crop[:, ::-1] if mirror else crop)
    return crops
