"""Supervised training on nucleus labels, whoever made them: samples, loss, augmentation, averages.

The weights of a network are averaged exponentially over the steps of its training, as those of the
mean teacher are: A. Tarvainen, H. Valpola, Mean teachers are better role models, NeurIPS 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.engines import multiplies_bfloat16
from patchcl_qupath.models.network import device
from patchcl_qupath.overlap import Stop, overlapped, usable_cores

_NUCLEUS, _CORE, _VALID = range(3)  # channels of a target
_CORE_DEPTH = 0.5  # of a nucleus's greatest depth: what is deeper is its core
_MAX_DECAY = 0.99  # of the average of weights
_BATCHES_AT_ONCE = 4  # that are made or used
_FEW_CORES = 2  # that the threads of the network itself need

Made = TypeVar("Made")


class TrainingSample(NamedTuple):
    """Normalised stains (H, W, 3), and a target (H, W, 3) of 0 and 1 to train a network with.

    The channels of the target are nucleus, core of a nucleus, and valid mask: other pixels are
    unlabelled, and have no part in the loss.
    """

    stains: NDArray[np.float32]
    target: NDArray[np.uint8]

    @property
    def nucleus(self) -> NDArray[np.uint8]:
        """Pixels (H, W) of nuclei."""
        return self.target[..., _NUCLEUS]

    @property
    def core(self) -> NDArray[np.uint8]:
        """Pixels (H, W) of the cores of nuclei."""
        return self.target[..., _CORE]

    @property
    def valid(self) -> NDArray[np.uint8]:
        """Pixels (H, W) that are labelled, as nucleus or as background."""
        return self.target[..., _VALID]


def targets(labels: NDArray[np.int32], background: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The target (H, W, 3) of a training sample, from labels 1..N (H, W) and background (H, W).

    Pixels that are neither are unlabelled. The core of a nucleus ends at a touching one, too.
    """
    inside = labels > 0
    wide = np.pad(labels, 1, mode="edge")
    separate = inside.copy()  # without a pixel of another nucleus next to it
    for beside in (wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]):
        separate &= (beside == labels) | (beside == 0)
    depth = ndimage.distance_transform_edt(separate)
    deepest = np.zeros(labels.max(initial=0) + 1)
    np.maximum.at(deepest, labels.ravel(), depth.ravel())
    core = inside & (depth > _CORE_DEPTH * deepest[labels])
    return np.stack([inside, core, inside | background], axis=-1).astype(np.uint8)


def bce_dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy and soft Dice of logits (B, 2, H, W) against targets (B, 3, H, W)."""
    answer, valid = target[:, :_VALID], target[:, _VALID:]
    bce = F.binary_cross_entropy_with_logits(logits, answer, reduction="none") * valid
    bce = bce.sum(dim=(0, 2, 3)) / valid.sum().clamp_min(1)  # (2,)
    probability = torch.sigmoid(logits) * valid
    both = (probability * answer).sum(dim=(0, 2, 3))  # (2,)
    either = (probability + answer * valid).sum(dim=(0, 2, 3))  # (2,)
    return (bce + 1 - (2 * both + 1) / (either + 1)).sum()


def distillation_loss(logits: Tensor, probability: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits with a teacher's probabilities, (B, 2, H, W) each.

    Where pixels are labelled in targets (B, 3, H, W), their labels count in place of the teacher:
    or it would teach its errors against these.
    """
    answer = torch.where(target[:, _VALID:] > 0, target[:, :_VALID], probability)
    bce = F.binary_cross_entropy_with_logits(logits, answer, reduction="none")
    return bce.mean(dim=(0, 2, 3)).sum()


def check_finite(values: Tensor, setting: str) -> None:
    """Raise TrainingError where losses or logits are no numbers: then no weight is one any more.

    ``setting`` is the learning rate that was too high. Such a model would find nothing, in silence.
    """
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(f"the training diverged: lower {setting}, or leave it out")


def mixed_precision(wanted: bool = True) -> torch.autocast:
    """Within it, convolutions are in bfloat16 where the device multiplies it: 1.7 times as fast.

    Weights, their averages, batch statistics and losses stay in float32; if not ``wanted``, all.
    """
    where = device().type
    if where == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = multiplies_bfloat16()
    return torch.autocast(where, torch.bfloat16, enabled=wanted and native)


def random_crop(
    sample: TrainingSample, side_px: int, scale_jitter: float, rng: np.random.Generator
) -> TrainingSample:
    """A random crop of a sample, ``side_px`` wide and high: turned, mirrored, and scaled.

    Its scale is between 1 / ``scale_jitter`` and ``scale_jitter``.
    """
    factor = math.exp(rng.uniform(-1, 1) * math.log(scale_jitter))
    stains, target = random_window(sample, round(side_px * factor), rng)
    return TrainingSample(*_scaled(stains, target, side_px))


def _scaled(
    stains: NDArray[np.float32], target: NDArray[np.uint8], side_px: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Square windows (S', S', 3) as (S, S, 3): stains bilinear, of targets the nearest pixel.

    By numpy: torch would do each in as many threads as the network is trained in, all at once.
    """
    size = len(stains)
    at = ((np.arange(side_px) + 0.5) * (size / side_px)).astype(np.float32)
    nearest = at.astype(np.intp)
    before = (at - np.float32(0.5)).clip(0, size - 1)
    first = before.astype(np.intp)
    second, share = np.minimum(first + 1, size - 1), before - first.astype(np.float32)
    rows = stains[first] + (stains[second] - stains[first]) * share[:, None, None]  # (S, S', 3)
    left, right = rows[:, first], rows[:, second]
    return left + (right - left) * share[:, None], target[nearest[:, None], nearest]


def augment_stains(stains: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Normalised stains (H, W, 3) as if of another staining and scanner.

    Each stain gets a random gain and offset; a quarter of the crops is blurred, a quarter noisy.
    """
    gain = rng.uniform(0.75, 1.25, 3).astype(np.float32)
    offset = rng.uniform(-0.12, 0.12, 3).astype(np.float32)
    stains = stains * gain + offset
    kind = rng.random()
    if kind < 0.25:
        sigma = rng.uniform(0.3, 1.2)
        return np.asarray(ndimage.gaussian_filter(stains, (sigma, sigma, 0)))
    if kind < 0.5:
        return stains + 0.05 * rng.standard_normal(stains.shape, np.float32)
    return stains


def ema_model(model: nn.Module, warmup_steps: int) -> AveragedModel:
    """The exponential moving average of a model's weights and batch statistics.

    Of what it was, update n keeps ``1 - 1 / (n + warmup_steps)``, but at most 0.99: at first the
    plain mean. The first update is a copy.
    """

    @torch.no_grad()
    def update(means: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        decay = min(_MAX_DECAY, 1 - 1 / (int(updates) + warmup_steps))
        if means[0].dtype.is_floating_point:  # all are of one type
            torch._foreach_lerp_([*means], [*values], 1 - decay)
        else:  # how many batches were seen
            torch._foreach_copy_([*means], [*values])

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


def to_batch(crops: Sequence[NDArray[np.generic]]) -> Tensor:
    """Arrays (S, S, C) as a tensor (B, C, S, S), channels last in memory."""
    batch = torch.from_numpy(np.stack(crops).astype(np.float32, copy=False)).to(device())
    return batch.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def made_ahead(make: Callable[[int], Made], steps: int) -> Iterator[Made]:
    """``make(step)`` for each step, in their order, on threads: the next ones in the meantime.

    One after the other on two cores without a GPU: threads would take them from the network, all of
    whose own threads wait for the last one in each operation. That took up to 15 % longer.
    """
    has_cores = usable_cores() > _FEW_CORES or device().type != "cpu"
    at_once = min(_BATCHES_AT_ONCE, usable_cores()) if has_cores else 1
    for made in overlapped(make, range(steps), at_once, Stop()):
        yield made.result()


def random_window(
    layers: Sequence[NDArray[Any]], side_px: int, rng: np.random.Generator
) -> list[NDArray[Any]]:
    """A random window (side_px, side_px, ...), turned and mirrored at random.

    ``layers`` are images (H, W, ...) of the same place: all are cut and turned alike. Images that
    are smaller than the window are mirrored at their border.
    """
    height, width = layers[0].shape[:2]
    row, col = (int(rng.integers(max(0, size - side_px) + 1)) for size in (height, width))
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    windows = []
    for layer in layers:
        window = layer[row : row + side_px, col : col + side_px]
        missing = [(0, side_px - window.shape[0]), (0, side_px - window.shape[1])]
        if window.shape[:2] != (side_px, side_px):
            window = np.pad(window, [*missing, *[(0, 0)] * (window.ndim - 2)], mode="symmetric")
        window = np.rot90(window, turns)
        windows.append(window[:, ::-1] if mirror else window)
    return windows
