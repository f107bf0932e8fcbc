"""Self-training: PatchCL's confident nuclei teach the network that parts nuclei. No labels.

What PatchCL is sure of are seeds of a better answer: nuclei that stand out by colour and have the
shape of one (``pseudo_labels``), and what is surely none. A network that sees texture, too, learns
from these to outline the others, and where one nucleus ends and the next begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchcl_qupath.config import SelfTrainConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import NucleusNetwork, device
from patchcl_qupath.slides.stains import StainScale
from patchcl_qupath.training.pseudo_labels import is_glass, pseudo_labels
from patchcl_qupath.training.supervision import (
    Lesson,
    draw_lesson,
    follow,
    targets,
    teaching_loss,
    to_batch,
    varied,
)


def train(
    images: Sequence[NDArray[np.uint8]],
    scales: Sequence[StainScale],
    teacher: Model,
    report: Callable[[str, int, int], None],
) -> Model:
    """Teach a network with what ``teacher``, of PatchCL, is sure of in RGB crops (H, W, 3).

    ``scales`` has the stain range of each crop's slide. Equal crops, teachers and numbers of
    threads give equal weights on one machine. Raises TrainingError where there is no sure nucleus.
    """
    config, settings = teacher.config, teacher.config.selftrain
    lessons = make_lessons(images, scales, teacher, partial(report, "choosing sure nuclei"))
    if not any(target[..., 0].any() for _, target in lessons):
        raise TrainingError("no clear nucleus was found: add images of cellular tissue")

    step = partial(report, "learning to part nuclei")
    network, log = teach(lessons, settings, config.patchcl.seed, step)
    training = {
        "patchcl": teacher.training,
        "sure_nucleus": _share([target[..., 0] for _, target in lessons]),
        "known": _share([target[..., 2] for _, target in lessons]),
        **log,
    }
    return Model(network, config, 0, False, 0.5, training)


def teach(
    lessons: Sequence[Lesson],
    settings: SelfTrainConfig,
    seed: int,
    report: Callable[[int, int], None],
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
        stains, target = _batch(lessons, settings, rng)
        waited += time.perf_counter() - asked
        loss = teaching_loss(network(stains), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        follow(average, network, keep=min(0.99, 1 - 1 / (step + 1)))
        losses.append(loss.detach())
        report(step + 1, settings.steps)
    log = {
        "loss": [round(loss.item(), 4) for loss in losses],
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_for_batches": round(waited, 1),  # in which the network waited
    }
    return average.cpu().eval(), log


def make_lessons(
    images: Sequence[NDArray[np.uint8]],
    scales: Sequence[StainScale],
    teacher: Model,
    report: Callable[[int, int], None],
) -> list[Lesson]:
    """What can be learnt from RGB crops (H, W, 3). Crops of one slide have one stain range."""
    config = teacher.config
    lessons: dict[int, Lesson] = {}
    for scale in dict.fromkeys(scales):
        ours = [i for i in range(len(images)) if scales[i] == scale]
        stains = [scale.apply(images[i]) for i in ours]
        opinions = [confidence(teacher, images[i], scale).nucleus for i in ours]
        glass = [is_glass(images[i], config.slide.mpp, config.selftrain) for i in ours]
        answers = pseudo_labels(stains, glass, opinions, config.slide.mpp, config.selftrain)
        for i, crop, answer in zip(ours, stains, answers, strict=True):
            lessons[i] = crop, targets(*answer)
        report(len(lessons), len(images))
    return [lessons[i] for i in range(len(images))]


def learning_rate(step: int, settings: SelfTrainConfig) -> float:
    """Up to its height in a few steps, then down to 0 as a cosine."""
    warm = min(1.0, (step + 1) / 20)
    return settings.learning_rate * warm * (1 + math.cos(math.pi * step / settings.steps)) / 2


def _batch(
    lessons: Sequence[Lesson], settings: SelfTrainConfig, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Stains and targets (B, 3, S, S) of random crops."""
    stains, target = [], []
    for k in rng.integers(len(lessons), size=settings.batch):
        crop, wanted = draw_lesson(lessons[k], settings.crop_px, settings.varied_size, rng)
        stains.append(varied(crop, rng))
        target.append(wanted)
    return to_batch(stains), to_batch(target)


def _share(masks: Sequence[NDArray[np.uint8]]) -> float:
    return round(float(np.mean([mask.mean() for mask in masks])), 4)
