"""CDCL: a model is refined with a few corrected ROIs, and does not forget its other training.

H. Wu, Z. Wang, Y. Song, L. Yang, J. Qin, Cross-patch Dense Contrastive Learning for
Semi-supervised Segmentation of Cellular Nuclei in Histopathologic Images, CVPR 2022.

A student is trained on labelled crops, and on unlabelled ones by what its teacher, the moving
average of its weights, predicts with confidence on a less augmented view (consistency). Its own
predictions become certain (entropy minimisation), and features of patches of nuclei alike, and
unlike those of background, from whichever image (cross-patch dense contrast). Beyond the paper:
student and teacher begin as the label-free model, and its pseudo-labels stay in the loss on
unlabelled crops, or the student would forget whatever one labelled ROI does not show. There are
two rounds: what the model of the first one finds are the pseudo-labels of the second. Those of the
first leave out what the label-free model is not sure of; it must be surer of what is large and not
convex, as that is often several nuclei in one. At the end the network is fitted to the labels,
while it is held to what it has learnt elsewhere by distillation: Z. Li, D. Hoiem, Learning without
Forgetting, ECCV 2016. Without any label, two rounds, which both leave out the same, end the
label-free training itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from patchcl_qupath.config import CDCLConfig
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import SegmentationNetwork, device
from patchcl_qupath.progress import ShowCount, part_of
from patchcl_qupath.storage.records import CDCLLog, SelfTrainingLog
from patchcl_qupath.training.supervision import (
    TrainingSample,
    augment_stains,
    bce_dice_loss,
    check_finite,
    distillation_loss,
    ema_model,
    made_ahead,
    mixed_precision,
    random_crop,
    to_batch,
)


class Batch(NamedTuple):
    """Random crops, (B, 3, S, S) each: augmented stains, targets, and stains as they are."""

    strong: Tensor
    target: Tensor
    weak: Tensor


class Batches(NamedTuple):
    """The crops of a step: of labelled ROIs, and of all tissue."""

    labelled: Batch
    unlabelled: Batch


def refine(
    start: Model,
    labelled: Sequence[TrainingSample],
    pseudo_labelled: Callable[[Model], Sequence[TrainingSample]],
    drawn: Callable[[], Sequence[TrainingSample]],
    report: ShowCount,
    seed: int = 0,
) -> Model:
    """Refine a model with samples of labelled ROIs, and of all tissue around them.

    ``pseudo_labelled`` are the samples of tissue with a model's pseudo-labels; ``drawn`` those with
    what a person drew, and nothing else. Equal samples, seeds and numbers of threads give equal
    weights on one machine's CPU.
    """
    assert isinstance(start.training, SelfTrainingLog), "CDCL begins with self-training"
    settings = start.config.cdcl
    before = settings.rounds * settings.steps
    total = before + settings.distillation_steps
    show = part_of(report, 0, total)
    model, log = _rounds(start, lambda model: (labelled, pseudo_labelled(model)), show, seed)
    distillation = list[dict[str, float]]()
    if settings.distillation_steps:
        show, turn = part_of(report, before, total), (seed, settings.rounds)
        network, distillation = _fitted(model.network, settings, labelled, drawn(), show, turn)
        model = replace(model, network=network)
    return replace(
        model,
        training=CDCLLog(
            **{name: getattr(start.training, name) for name in SelfTrainingLog.__struct_fields__},
            cdcl=log,
            distillation=distillation,
            refined_from=start.digest,
        ),
    )


def refine_without_labels(
    start: Model, pseudo_labelled: Callable[[Model], Sequence[TrainingSample]], report: ShowCount
) -> Model:
    """Refine a label-free model with what it is sure of itself, in place of labels.

    ``pseudo_labelled`` are the samples of that; the rounds end where a model has none.
    """
    assert isinstance(start.training, SelfTrainingLog), "CDCL begins with self-training"

    def sure(model: Model) -> _Samples | None:
        samples = pseudo_labelled(model)
        return (samples, samples) if samples else None

    model, log = _rounds(start, sure, report, start.config.patchcl.seed)
    for step in log:  # both are of pseudo-labels
        step["pseudo"] = round(step.pop("labelled") + step["pseudo"], 4)
    return replace(model, training=msgspec.structs.replace(start.training, unlabelled_cdcl=log))


_Samples = tuple[Sequence[TrainingSample], Sequence[TrainingSample]]  # labelled, unlabelled


def _rounds(
    start: Model, samples: Callable[[Model], _Samples | None], report: ShowCount, seed: int
) -> tuple[Model, list[dict[str, float]]]:
    """The model after all rounds, and the losses of each step by name.

    ``samples`` are those of a round, by the model before it; None ends the rounds.
    """
    settings = start.config.cdcl
    model, log = start, list[dict[str, float]]()
    for turn in range(settings.rounds):
        of_round = samples(model)
        if of_round is None:
            break
        show = part_of(report, turn * settings.steps, settings.rounds * settings.steps)
        network, losses = _round(model.network, settings, *of_round, show, (seed, turn))
        model = replace(start, network=network, calibration=None)
        log += losses
    return model, log


def _round(
    start: SegmentationNetwork,
    settings: CDCLConfig,
    labelled: Sequence[TrainingSample],
    unlabelled: Sequence[TrainingSample],
    report: ShowCount,
    seed: tuple[int, int],
) -> tuple[SegmentationNetwork, list[dict[str, float]]]:
    """The network of the teacher after one round, and the losses of each step by name."""
    assert start.feature_channels is not None, "this network cannot be refined"
    student = _Student(start, settings, settings.steps)
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(int(np.random.default_rng(seed).integers(2**31)))
        projection = nn.Conv2d(start.feature_channels, settings.dimensions, 1)
        projection.to(device())
    bank = MemoryBank(settings)

    def losses(step: int, batches: Batches) -> dict[str, Tensor]:
        return _losses(
            student=student.network,
            teacher=student.average,
            projection=projection,
            batches=batches,
            weight=consistency_weight(step, settings),
            bank=bank,
            settings=settings,
        )

    batches = partial(_batches, labelled, unlabelled, settings, seed)
    return student.trained(batches, losses, report, also=projection.parameters())


def _fitted(
    start: SegmentationNetwork,
    settings: CDCLConfig,
    labelled: Sequence[TrainingSample],
    drawn: Sequence[TrainingSample],
    report: ShowCount,
    seed: tuple[int, int],
) -> tuple[SegmentationNetwork, list[dict[str, float]]]:
    """The network fitted to the labels, and elsewhere to ``start``; the losses of each step."""
    student = _Student(start, settings, settings.distillation_steps)
    teacher = deepcopy(start).to(device()).eval()

    def losses(_: int, batches: Batches) -> dict[str, Tensor]:
        of_rois, of_tissue = batches
        with torch.no_grad():
            probability = torch.sigmoid(_in_float32(teacher, of_tissue.weak)[0])
        strong = torch.cat([of_rois.strong, of_tissue.strong])
        logits = _in_float32(student.network, strong)[0]
        n = len(of_rois.strong)
        distance = distillation_loss(logits[n:], probability, of_tissue.target)
        return {
            "labelled": bce_dice_loss(logits[:n], of_rois.target),
            "distillation": settings.distillation_weight * distance,
        }

    return student.trained(partial(_batches, labelled, drawn, settings, seed), losses, report)


class _Student:
    """A network in training, and the moving average of its weights, which is what is kept."""

    def __init__(self, start: SegmentationNetwork, settings: CDCLConfig, steps: int) -> None:
        self.network = deepcopy(start).to(device()).train()
        self._mean = ema_model(self.network, warmup_steps=9)
        self._mean.update_parameters(self.network)  # a copy: start is the first in the mean
        average = self._mean.module.eval()
        assert isinstance(average, SegmentationNetwork)
        self.average = average
        self._settings, self._steps = settings, steps

    def trained(
        self,
        batches: Callable[[int], Batches],
        losses: Callable[[int, Batches], dict[str, Tensor]],
        report: ShowCount,
        also: Iterable[nn.Parameter] = (),
    ) -> tuple[SegmentationNetwork, list[dict[str, float]]]:
        """The average after all steps, and the losses of each by name.

        ``also`` are parameters that are trained beside those of the network. Raises TrainingError
        where the training diverges.
        """
        settings = self._settings
        optimizer = torch.optim.AdamW(
            [*self.network.parameters(), *also],
            settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        scheduler = LambdaLR(optimizer, partial(_annealing, steps=self._steps))
        log: list[dict[str, float]] = []
        for step, batch in enumerate(made_ahead(batches, self._steps)):
            of_step = losses(step, batch)
            loss = torch.stack([*of_step.values()]).sum()
            check_finite(loss, "cdcl.learning_rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            self._mean.update_parameters(self.network)
            log.append({name: round(loss.item(), 4) for name, loss in of_step.items()})
            report(step + 1, self._steps)
        return self.average.cpu(), log


def consistency_weight(step: int, settings: CDCLConfig) -> float:
    """The weight of the teacher's predictions: 0 during its warm-up, then rising to 1."""
    done = step / settings.steps
    return math.exp(-5 * (1 - done) ** 2) if done >= settings.teacher_warmup else 0.0


def _annealing(step: int, steps: int) -> float:
    """The fraction of the learning rate at a step: a cosine to 0."""
    return (1 + math.cos(math.pi * (step / steps))) / 2


def _losses(
    *,
    student: SegmentationNetwork,
    teacher: SegmentationNetwork,
    projection: nn.Module,
    batches: Batches,
    weight: float,
    bank: MemoryBank,
    settings: CDCLConfig,
) -> dict[str, Tensor]:
    """The losses of a step by name; those that need the teacher where ``weight`` is not 0."""
    labelled, unlabelled = batches
    strong = torch.cat([labelled.strong, unlabelled.strong])
    logits, features = _in_float32(student, strong)
    n = len(labelled.strong)
    losses = {
        "labelled": bce_dice_loss(logits[:n], labelled.target),
        "pseudo": settings.pseudo_weight * bce_dice_loss(logits[n:], unlabelled.target),
    }
    if not weight:
        return losses
    logits = logits[n:]
    with torch.no_grad():
        teacher_logits, teacher_features = _in_float32(teacher, unlabelled.weak)
        probability = torch.sigmoid(teacher_logits)  # (B, 2, H, W)
        teacher_points = patches(projection(teacher_features), settings)  # (N, D)
    foreground = (probability[:, :1] > 0.5).float()  # (B, 1, H, W)
    fraction = F.avg_pool2d(foreground, settings.patch_px).flatten()  # (N,)
    distance = contrast(
        points=patches(projection(features[n:]), settings),
        teacher_points=teacher_points,
        foreground_fraction=fraction,
        bank=bank,
        settings=settings,
    )
    return losses | {
        "consistency": weight * consistency(logits, probability, settings),
        "entropy": weight * settings.entropy_weight * entropy(logits),
        "contrast": settings.contrast_weight * distance,
    }


def _in_float32(network: SegmentationNetwork, stains: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of stains (B, 3, S, S), whatever the precision within the network."""
    with mixed_precision():
        logits, features = network.logits_and_features(stains)
    return logits.float(), features.float()


def consistency(logits: Tensor, teacher_probability: Tensor, settings: CDCLConfig) -> Tensor:
    """Cross entropy of the student's logits with the teacher's hard predictions (B, 2, H, W).

    Only pixels count where the teacher is confident, of foreground or background. (The code that
    the authors published leaves these pixels out and keeps the others, against the paper.)
    """
    threshold = settings.confidence_threshold
    confident = (teacher_probability > threshold) | (teacher_probability < 1 - threshold)
    answer = (teacher_probability > 0.5).float()
    bce = F.binary_cross_entropy_with_logits(logits, answer, reduction="none")
    return (bce * confident).sum() / confident.sum().clamp_min(1)


def entropy(logits: Tensor) -> Tensor:
    """Mean predictive entropy of logits, in nats."""
    p = torch.sigmoid(logits)
    return -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).mean()


def patches(features: Tensor, settings: CDCLConfig) -> Tensor:
    """Feature maps (B, D, H / 4, W / 4) as one unit vector for each patch, (B * h * w, D)."""
    pooled = F.avg_pool2d(features, settings.patch_px // 4)  # (B, D, h, w)
    return F.normalize(pooled.permute(0, 2, 3, 1).flatten(0, 2), dim=-1)


class MemoryBank:
    """Teacher features of patches of earlier steps, of nuclei and of background, to contrast with.

    They come from other images, too.
    """

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
        """Unit vectors (M, D), or None as long as there are none."""
        kept = self._kept[is_nucleus]
        return torch.cat([*kept]) if kept else None


def contrast(
    points: Tensor,
    teacher_points: Tensor,
    foreground_fraction: Tensor,
    bank: MemoryBank,
    settings: CDCLConfig,
) -> Tensor:
    """Cross-patch dense contrast of unit vectors (N, D) with the teacher's of the same patches.

    ``foreground_fraction`` (N,) is the fraction of each patch that is nucleus. Anchors are pure
    patches: nearly all foreground, or nearly all background. An anchor attracts the teacher's
    vector of the same patch, and repels those of the opposite kind in the memory bank (InfoNCE).
    """
    loss, count = points.sum() * 0, 0
    anchors = {
        True: foreground_fraction >= 1 - settings.purity,
        False: foreground_fraction <= settings.purity,
    }
    for is_nucleus, chosen in anchors.items():
        negatives = bank.points(not is_nucleus)
        if negatives is not None and bool(chosen.any()):
            positive = (points[chosen] * teacher_points[chosen]).sum(dim=1)
            positive = positive / settings.temperature  # (A,)
            negative = points[chosen] @ negatives.T / settings.temperature  # (A, M)
            both = torch.cat([positive[:, None], negative], dim=1)  # (A, 1 + M)
            loss = loss + (both.logsumexp(dim=1) - positive).sum()
            count += len(positive)
    for is_nucleus, chosen in anchors.items():
        bank.add(teacher_points[chosen], is_nucleus)
    return loss / max(1, count)


def _batches(
    labelled: Sequence[TrainingSample],
    unlabelled: Sequence[TrainingSample],
    settings: CDCLConfig,
    seed: tuple[int, int],
    step: int,
) -> Batches:
    """The crops of a step of a round: the same for equal seeds."""
    rng = np.random.default_rng((*seed, step))
    return Batches(
        _batch(labelled, settings.labelled, settings, rng),
        _batch(unlabelled, settings.unlabelled, settings, rng),
    )


def _batch(
    samples: Sequence[TrainingSample], count: int, settings: CDCLConfig, rng: np.random.Generator
) -> Batch:
    """``count`` random crops of random samples."""
    strong: list[NDArray[np.float32]] = []
    target: list[NDArray[np.uint8]] = []
    weak: list[NDArray[np.float32]] = []
    for k in rng.integers(len(samples), size=count):
        crop = random_crop(samples[k], settings.crop_px, settings.scale_jitter, rng)
        strong.append(augment_stains(crop.stains, rng))
        target.append(crop.target)
        weak.append(crop.stains)
    return Batch(to_batch(strong), to_batch(target), to_batch(weak))
