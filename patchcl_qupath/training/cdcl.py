"""CDCL: a few corrected fields make a better model, without forgetting what was learnt unlabelled.

H. Wu, Z. Wang, Y. Song, L. Yang, J. Qin, Cross-patch Dense Contrastive Learning for
Semi-supervised Segmentation of Cellular Nuclei in Histopathologic Images, CVPR 2022.

A student learns from labelled crops, and from unlabelled ones what its teacher, the moving average
of itself, is confident of on a less disturbed view (consistency); it is to be sure of its answers
(entropy), and patches of nuclei are to look like each other, and unlike patches of none, wherever
they come from (cross-patch dense contrast). Beyond the paper: both begin as the label-free model,
and keep to its pseudo-labels on unlabelled crops, or one labelled field would make them forget the
rest.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.config import CDCLConfig
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork, device
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.training.supervision import (
    TrainingSample,
    augment_stains,
    bce_dice_loss,
    ema_update,
    random_crop,
    to_batch,
)


def refine(
    start: Model,
    labelled: Sequence[TrainingSample],
    unlabelled: Sequence[TrainingSample],
    report: ShowCount,
    seed: int = 0,
) -> Model:
    """Refine a model with labelled fields, and with unlabelled crops and their pseudo-labels.

    Equal lessons, seeds and numbers of threads give equal weights on one machine.
    """
    assert isinstance(start.network, NucleusNetwork)
    settings = start.config.cdcl
    rng = np.random.default_rng(seed)
    student = deepcopy(start.network).to(device()).train()
    teacher = deepcopy(student).eval()
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        projection = nn.Conv2d(student.coarse_width, settings.dimensions, 1).to(device())
    optimizer = torch.optim.AdamW(
        [*student.parameters(), *projection.parameters()],
        settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    bank = MemoryBank(settings)
    log: list[dict[str, float]] = []
    for step in range(settings.steps):
        done = step / settings.steps
        optimizer.param_groups[0]["lr"] = (
            settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
        )
        labelled_stains, labelled_target, _ = _batch(labelled, settings.labelled, settings, rng)
        strong, target, weak = _batch(unlabelled, settings.unlabelled, settings, rng)
        logits, coarse = student.both(torch.cat([labelled_stains, strong]))
        n = len(labelled_stains)
        losses = {
            "labelled": bce_dice_loss(logits[:n], labelled_target),
            "pseudo": settings.pseudo_weight * bce_dice_loss(logits[n:], target),
        }
        with torch.no_grad():
            teacher_probability, teacher_features = teacher.both(weak)
            teacher_probability = torch.sigmoid(teacher_probability)  # (B, 2, H, W)
        # The teacher is worth listening to once it followed the student for a while.
        consistency_weight = (
            math.exp(-5 * (1 - done) ** 2) if done >= settings.teacher_warmup else 0.0
        )
        if consistency_weight:
            losses["consistency"] = consistency_weight * consistency(
                logits[n:], teacher_probability, settings
            )
            losses["entropy"] = consistency_weight * settings.entropy_weight * entropy(logits[n:])
            foreground_fraction = F.avg_pool2d(
                (teacher_probability[:, :1] > 0.5).float(), settings.patch_px
            )  # (B, 1, h, w)
            losses["contrast"] = settings.contrast_weight * contrast(
                patches(projection(coarse[n:]), settings),
                patches(projection(teacher_features), settings).detach(),
                foreground_fraction.flatten(),
                bank,
                settings,
            )
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema_update(teacher, student, keep=min(0.99, 1 - 1 / (step + 10)))
        log.append({name: round(loss.item(), 4) for name, loss in losses.items()})
        report(step + 1, settings.steps)
    training = {**start.training, "cdcl": log, "refined_from": start.digest}
    return Model(teacher.cpu().eval(), start.config, 0, False, start.threshold, training)


def consistency(logits: Tensor, teacher_probability: Tensor, settings: CDCLConfig) -> Tensor:
    """Cross entropy of the student's logits with the teacher's hard answers (B, 2, H, W).

    Only where the teacher is confident, of whichever answer. (The code that the authors published
    leaves these pixels out and keeps the others, against the paper.)
    """
    confident = (teacher_probability > settings.confidence_threshold) | (
        teacher_probability < 1 - settings.confidence_threshold
    )
    wrong = F.binary_cross_entropy_with_logits(
        logits, (teacher_probability > 0.5).float(), reduction="none"
    )
    return (wrong * confident).sum() / confident.sum().clamp_min(1)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy, in nats, of what logits say."""
    p = torch.sigmoid(logits)
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).mean()


def patches(coarse: Tensor, settings: CDCLConfig) -> Tensor:
    """Coarse maps (B, D, H / 4, W / 4) as one unit vector for each patch, (B * h * w, D)."""
    pooled = F.avg_pool2d(coarse, settings.patch_px // 4)  # (B, D, h, w)
    return F.normalize(pooled.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)


class MemoryBank:
    """Patches of earlier steps, of nuclei and of none, to contrast with: from other images, too."""

    def __init__(self, settings: CDCLConfig) -> None:
        self._settings = settings
        self._kept: dict[bool, deque[Tensor]] = {
            kind: deque(maxlen=settings.bank_steps) for kind in (False, True)
        }

    def add(self, points: Tensor, is_nucleus: bool) -> None:
        """Keep some of the unit vectors (N, D), instead of the oldest."""
        if len(points):
            self._kept[is_nucleus].append(points[: self._settings.bank_patches])

    def points(self, is_nucleus: bool) -> Tensor | None:
        """(M, D), or None as long as there are none."""
        kept = self._kept[is_nucleus]
        return torch.cat([*kept]) if kept else None


def contrast(
    points: Tensor,
    teacher_features: Tensor,
    foreground_fraction: Tensor,
    bank: MemoryBank,
    settings: CDCLConfig,
) -> Tensor:
    """Cross-patch dense contrast of unit vectors (N, D) with the teacher's of the same places.

    ``foreground_fraction`` (N,) is how much of each patch is nucleus. Anchors are patches that are
    nearly all or nearly none. An anchor is to resemble what the teacher sees in its place, and to
    differ from the patches of the opposite kind in the bank.
    """
    loss, count = points.sum() * 0, 0
    kinds = {
        True: foreground_fraction >= 1 - settings.purity,
        False: foreground_fraction <= settings.purity,
    }
    for is_nucleus, chosen in kinds.items():
        others = bank.points(not is_nucleus)
        if others is not None and bool(chosen.any()):
            alike = (points[chosen] * teacher_features[chosen]).sum(
                dim=1
            ) / settings.temperature  # (A,)
            unlike = points[chosen] @ others.T / settings.temperature  # (A, M)
            every = torch.cat([alike[:, None], unlike], dim=1)  # (A, 1 + M)
            loss = loss + (every.logsumexp(dim=1) - alike).sum()
            count += len(alike)
    for is_nucleus, chosen in kinds.items():
        bank.add(teacher_features[chosen], is_nucleus)
    return loss / max(1, count)


def _batch(
    samples: Sequence[TrainingSample], count: int, settings: CDCLConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Varied stains, targets, and stains as they are, (B, 3, S, S) each, of random crops."""
    strong: list[NDArray[np.float32]] = []
    target: list[NDArray[np.uint8]] = []
    weak: list[NDArray[np.float32]] = []
    for k in rng.integers(len(samples), size=count):
        stains, wanted = random_crop(samples[k], settings.crop_px, settings.scale_jitter, rng)
        strong.append(augment_stains(stains, rng))
        target.append(wanted)
        weak.append(stains)
    return to_batch(strong), to_batch(target), to_batch(weak)
