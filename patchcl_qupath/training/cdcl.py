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
from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.config import CDCLConfig
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork, device
from patchcl_qupath.training.supervision import (
    Lesson,
    draw_lesson,
    follow,
    teaching_loss,
    to_batch,
    varied,
)

Report = Callable[[str, int, int], None]


def refine(
    start: Model,
    labelled: Sequence[Lesson],
    unlabelled: Sequence[Lesson],
    report: Report,
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
    bank = Bank(settings)
    log: list[dict[str, float]] = []
    for step in range(settings.steps):
        done = step / settings.steps
        optimizer.param_groups[0]["lr"] = (
            settings.learning_rate * (1 + math.cos(math.pi * done)) / 2
        )
        known, known_target, _ = _batch(labelled, settings.labelled, settings, rng)
        strong, target, weak = _batch(unlabelled, settings.unlabelled, settings, rng)
        logits, coarse = student.both(torch.cat([known, strong]))
        n = len(known)
        losses = {
            "labelled": teaching_loss(logits[:n], known_target),
            "pseudo": settings.pseudo_weight * teaching_loss(logits[n:], target),
        }
        with torch.no_grad():
            said, taught = teacher.both(weak)
            said = torch.sigmoid(said)  # (B, 2, H, W)
        # The teacher is worth listening to once it followed the student for a while.
        trust = math.exp(-5 * (1 - done) ** 2) if done >= settings.patience else 0.0
        if trust:
            losses["consistency"] = trust * consistency(logits[n:], said, settings)
            losses["entropy"] = trust * settings.entropy_weight * entropy(logits[n:])
            share = F.avg_pool2d((said[:, :1] > 0.5).float(), settings.patch_px)  # (B, 1, h, w)
            losses["contrast"] = settings.contrast_weight * contrast(
                patches(projection(coarse[n:]), settings),
                patches(projection(taught), settings).detach(),
                share.flatten(),
                bank,
                settings,
            )
        optimizer.zero_grad()
        torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        follow(teacher, student, keep=min(0.99, 1 - 1 / (step + 10)))
        log.append({name: round(loss.item(), 4) for name, loss in losses.items()})
        report("learning from corrections", step + 1, settings.steps)
    training = {**start.training, "cdcl": log, "refined_from": start.digest}
    return Model(teacher.cpu().eval(), start.config, 0, False, start.threshold, training)


def consistency(logits: Tensor, said: Tensor, settings: CDCLConfig) -> Tensor:
    """Cross entropy of the student's logits with the teacher's hard answers (B, 2, H, W).

    Only where the teacher is confident, of whichever answer. (The code that the authors published
    leaves these pixels out and keeps the others, against the paper.)
    """
    sure = (said > settings.confident) | (said < 1 - settings.confident)
    wrong = F.binary_cross_entropy_with_logits(logits, (said > 0.5).float(), reduction="none")
    return (wrong * sure).sum() / sure.sum().clamp_min(1)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy, in nats, of what logits say."""
    p = torch.sigmoid(logits)
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).mean()


def patches(coarse: Tensor, settings: CDCLConfig) -> Tensor:
    """Coarse maps (B, D, H / 4, W / 4) as one unit vector for each patch, (B * h * w, D)."""
    pooled = F.avg_pool2d(coarse, settings.patch_px // 4)  # (B, D, h, w)
    return F.normalize(pooled.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)


class Bank:
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
    points: Tensor, taught: Tensor, share: Tensor, bank: Bank, settings: CDCLConfig
) -> Tensor:
    """Cross-patch dense contrast of unit vectors (N, D) with the teacher's of the same places.

    ``share`` (N,) is how much of each patch is nucleus. Anchors are patches that are nearly all or
    nearly none. An anchor is to resemble what the teacher sees in its place, and to differ from
    the patches of the opposite kind in the bank.
    """
    loss, count = points.sum() * 0, 0
    kinds = {True: share >= 1 - settings.pure, False: share <= settings.pure}
    for is_nucleus, chosen in kinds.items():
        others = bank.points(not is_nucleus)
        if others is not None and bool(chosen.any()):
            alike = (points[chosen] * taught[chosen]).sum(dim=1) / settings.temperature  # (A,)
            unlike = points[chosen] @ others.T / settings.temperature  # (A, M)
            every = torch.cat([alike[:, None], unlike], dim=1)  # (A, 1 + M)
            loss = loss + (every.logsumexp(dim=1) - alike).sum()
            count += len(alike)
    for is_nucleus, chosen in kinds.items():
        bank.add(taught[chosen], is_nucleus)
    return loss / max(1, count)


def _batch(
    lessons: Sequence[Lesson], count: int, settings: CDCLConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Varied stains, targets, and stains as they are, (B, 3, S, S) each, of random crops."""
    strong: list[NDArray[np.float32]] = []
    target: list[NDArray[np.uint8]] = []
    weak: list[NDArray[np.float32]] = []
    for k in rng.integers(len(lessons), size=count):
        stains, wanted = draw_lesson(lessons[k], settings.crop_px, settings.varied_size, rng)
        strong.append(varied(stains, rng))
        target.append(wanted)
        weak.append(stains)
    return to_batch(strong), to_batch(target), to_batch(weak)
