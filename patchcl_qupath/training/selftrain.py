"""Self-training: PatchCL's pseudo-labels train the network that separates nuclei, without labels.

PatchCL's confidence and the shape of a nucleus choose pseudo-labels (``pseudo_labels``): confident
foreground and confident background. A U-Net, which sees texture, too, learns from these to find
the other nuclei, and where one ends and the next begins.

D.-H. Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks, ICML 2013 workshop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from patchcl_qupath.config import SelfTrainConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import NucleusNetwork, device, to_channels_last
from patchcl_qupath.progress import ShowCount, ShowProgress, Stage, counter
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.storage.records import PatchCLLog, SelfTrainingLog
from patchcl_qupath.training.pseudo_labels import is_glass, pseudo_labels
from patchcl_qupath.training.supervision import (
    TrainingSample,
    augment_stains,
    bce_dice_loss,
    ema_model,
    random_crop,
    targets,
    to_batch,
)

_WARMUP_STEPS = 20  # in which the learning rate rises


class Trained(NamedTuple):
    """A network that was trained on samples; the loss of each step; and how long it took."""

    network: NucleusNetwork
    loss: list[float]
    seconds: float
    seconds_for_batches: float  # in which the network waited


def train(crops: TrainingCrops, teacher: Model, progress: ShowProgress) -> Model:
    """Train a network on the pseudo-labels of ``teacher``, of PatchCL, in tissue crops.

    Equal crops, teachers and numbers of threads give equal weights on one machine. Raises
    TrainingError where no nucleus is pseudo-labelled.
    """
    config = teacher.config
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    samples = pseudo_labelled_samples(crops, teacher, choosing)
    if not any(sample.nucleus.any() for sample in samples):
        raise TrainingError("no clear nucleus was found: add images of cellular tissue")

    assert isinstance(teacher.training, PatchCLLog), "self-training begins with PatchCL"
    step = counter(progress, Stage.TRAINING_NETWORK)
    trained = train_on(samples, config.selftrain, config.patchcl.seed, step)
    log = SelfTrainingLog(
        patchcl=teacher.training,
        nucleus_fraction=_fraction([sample.nucleus for sample in samples]),
        labelled_fraction=_fraction([sample.valid for sample in samples]),
        loss=trained.loss,
        seconds=trained.seconds,
        seconds_for_batches=trained.seconds_for_batches,
    )
    return Model(network=trained.network, config=config, training=log)


def train_on(
    samples: Sequence[TrainingSample],
    settings: SelfTrainConfig,
    seed: int,
    report: ShowCount,
) -> Trained:
    """Train a network on samples alone; its weights are averaged over the last steps."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        network = NucleusNetwork(settings.widths).to(device())
    to_channels_last(network)
    average = ema_model(network, warmup_steps=1)
    # The scheduler multiplies the optimizer's rate with what its function returns.
    optimizer = torch.optim.AdamW(network.parameters(), 1.0, weight_decay=settings.weight_decay)
    scheduler = LambdaLR(optimizer, partial(learning_rate, settings=settings))
    losses: list[Tensor] = []
    began, waited = time.perf_counter(), 0.0
    for step in range(settings.steps):
        asked = time.perf_counter()
        stains, target = _batch(samples, settings, rng)
        waited += time.perf_counter() - asked
        loss = bce_dice_loss(network(stains), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        average.update_parameters(network)
        losses.append(loss.detach())
        report(step + 1, settings.steps)
    averaged = average.module
    assert isinstance(averaged, NucleusNetwork)
    return Trained(
        network=averaged.cpu().eval(),
        loss=[round(loss.item(), 4) for loss in losses],
        seconds=round(time.perf_counter() - began, 1),
        seconds_for_batches=round(waited, 1),
    )


def pseudo_labelled_samples(
    crops: TrainingCrops, teacher: Model, report: ShowCount
) -> list[TrainingSample]:
    """A training sample of each crop, in their order.

    Thresholds of the pseudo-labels are those of all crops of a slide.
    """
    config = teacher.config
    samples: dict[int, TrainingSample] = {}
    for slide in dict.fromkeys(crops.slides):
        indices = [i for i in range(len(crops)) if crops.slides[i] == slide]
        of_slide = crops.select(indices)
        pairs = [*zip(of_slide.images, of_slide.normalisers, strict=True)]
        stains = [normaliser.apply(image) for image, normaliser in pairs]
        found = pseudo_labels(
            crops=stains,
            glass=[is_glass(image, config.slide.mpp, config.selftrain) for image, _ in pairs],
            confidences=[confidence(teacher, *pair).nucleus for pair in pairs],
            mpp=config.slide.mpp,
            config=config.selftrain,
        )
        for i, crop, labels in zip(indices, stains, found, strict=True):
            samples[i] = TrainingSample(crop, targets(labels.nuclei, labels.background))
        report(len(samples), len(crops))
    return [samples[i] for i in range(len(crops))]


def learning_rate(step: int, settings: SelfTrainConfig) -> float:
    """A linear warm-up to the peak, times a cosine to 0."""
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return settings.learning_rate * warmup * (1 + math.cos(math.pi * step / settings.steps)) / 2


def _batch(
    samples: Sequence[TrainingSample], settings: SelfTrainConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Augmented stains and targets (B, 3, S, S) of random crops."""
    stains, target = [], []
    for k in rng.integers(len(samples), size=settings.batch):
        crop = random_crop(samples[k], settings.crop_px, settings.scale_jitter, rng)
        stains.append(augment_stains(crop.stains, rng))
        target.append(crop.target)
    return to_batch(stains), to_batch(target)


def _fraction(masks: Sequence[NDArray[np.uint8]]) -> float:
    """Mean over crops of the fraction of pixels that is in the mask."""
    return round(float(np.mean([mask.mean() for mask in masks])), 4)
