"""Self-training: PatchCL's confident nuclei teach the network that parts nuclei. No labels.

What PatchCL is sure of are seeds of a better answer: nuclei that stand out by colour and have the
shape of one (``pseudo_labels``), and what is surely none. A network that sees texture, too, learns
from these to outline the others, and where one nucleus ends and the next begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchcl_qupath.config import SelfTrainConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import NucleusNetwork, device
from patchcl_qupath.progress import ShowCount, ShowProgress, Stage, counter
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training.pseudo_labels import is_glass, pseudo_labels
from patchcl_qupath.training.supervision import (
    TrainingSample,
    augment_stains,
    bce_dice_loss,
    ema_update,
    random_crop,
    targets,
    to_batch,
)


def train(
    images: Sequence[NDArray[np.uint8]],
    normalisers: Sequence[StainNormaliser],
    teacher: Model,
    progress: ShowProgress,
) -> Model:
    """Teach a network with what ``teacher``, of PatchCL, is sure of in RGB crops (H, W, 3).

    ``normalisers`` has the stain range of each crop's slide. Equal crops, teachers and numbers of
    threads give equal weights on one machine. Raises TrainingError where there is no sure nucleus.
    """
    config, settings = teacher.config, teacher.config.selftrain
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    samples = pseudo_labelled_samples(images, normalisers, teacher, choosing)
    if not any(target[..., 0].any() for _, target in samples):
        raise TrainingError("no clear nucleus was found: add images of cellular tissue")

    step = counter(progress, Stage.TRAINING_NETWORK)
    network, log = teach(samples, settings, config.patchcl.seed, step)
    training = {
        "patchcl": teacher.training,
        "sure_nucleus": _share([target[..., 0] for _, target in samples]),
        "known": _share([target[..., 2] for _, target in samples]),
        **log,
    }
    return Model(network, config, 0, False, 0.5, training)


def teach(
    samples: Sequence[TrainingSample],
    settings: SelfTrainConfig,
    seed: int,
    report: ShowCount,
) -> tuple[NucleusNetwork, dict[str, Any]]:
    """A network that learnt from lessons alone, averaged over its last steps; and a log of it."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        network = NucleusNetwork(settings.widths).to(device())
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = deepcopy(network)
    optimizer = torch.optim.AdamW(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses: list[Tensor] = []
    began, waited = time.perf_counter(), 0.0
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        asked = time.perf_counter()
        stains, target = _batch(samples, settings, rng)
        waited += time.perf_counter() - asked
        loss = bce_dice_loss(network(stains), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ema_update(average, network, keep=min(0.99, 1 - 1 / (step + 1)))
        losses.append(loss.detach())
        report(step + 1, settings.steps)
    log = {
        "loss": [round(loss.item(), 4) for loss in losses],
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_for_batches": round(waited, 1),  # in which the network waited
    }
    return average.cpu().eval(), log


def pseudo_labelled_samples(
    images: Sequence[NDArray[np.uint8]],
    normalisers: Sequence[StainNormaliser],
    teacher: Model,
    report: ShowCount,
) -> list[TrainingSample]:
    """What can be learnt from RGB crops (H, W, 3). Crops of one slide have one stain range."""
    config = teacher.config
    samples: dict[int, TrainingSample] = {}
    for normaliser in dict.fromkeys(normalisers):
        ours = [i for i in range(len(images)) if normalisers[i] == normaliser]
        stains = [normaliser.apply(images[i]) for i in ours]
        predictions = [confidence(teacher, images[i], normaliser).nucleus for i in ours]
        glass = [is_glass(images[i], config.slide.mpp, config.selftrain) for i in ours]
        answers = pseudo_labels(stains, glass, predictions, config.slide.mpp, config.selftrain)
        for i, crop, answer in zip(ours, stains, answers, strict=True):
            samples[i] = crop, targets(*answer)
        report(len(samples), len(images))
    return [samples[i] for i in range(len(images))]


def learning_rate(step: int, settings: SelfTrainConfig) -> float:
    """Up to its height in a few steps, then down to 0 as a cosine."""
    warm = min(1.0, (step + 1) / 20)
    return settings.learning_rate * warm * (1 + math.cos(math.pi * step / settings.steps)) / 2


def _batch(
    samples: Sequence[TrainingSample], settings: SelfTrainConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Stains and targets (B, 3, S, S) of random crops."""
    stains, target = [], []
    for k in rng.integers(len(samples), size=settings.batch):
        crop, wanted = random_crop(samples[k], settings.crop_px, settings.scale_jitter, rng)
        stains.append(augment_stains(crop, rng))
        target.append(wanted)
    return to_batch(stains), to_batch(target)


def _share(masks: Sequence[NDArray[np.uint8]]) -> float:
    return round(float(np.mean([mask.mean() for mask in masks])), 4)
