"""Self-training: PatchCL's pseudo-labels train the network that separates nuclei, without labels.

PatchCL's confidence and the shape of a nucleus choose pseudo-labels (``pseudo_labels``): confident
foreground and confident background. A U-Net, which sees texture, too, learns from these to find
the other nuclei, and where one ends and the next begins. What it finds, separated by shape, teaches
a second one: it has more of the nuclei, and better outlines, than the pseudo-labels that it was
taught by. In the end, the second one learns from the nuclei that it is sure of itself (``cdcl``).

D.-H. Lee, Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural
Networks, ICML 2013 workshop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from patchcl_qupath.config import CDCLConfig, EngineChoice, SegmentConfig, SelfTrainConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Confidence, Model, confidence
from patchcl_qupath.models.network import NucleusNetwork, device, to_channels_last
from patchcl_qupath.overlap import mapped
from patchcl_qupath.progress import ShowCount, ShowProgress, Stage, counter, part_of
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.measurements import NuclearStain, means, runs_of
from patchcl_qupath.segmentation.probability import nucleus_probability
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.records import PatchCLLog, SelfTrainingLog
from patchcl_qupath.training import cdcl
from patchcl_qupath.training.calibration import calibrated, separation_of_slide
from patchcl_qupath.training.pseudo_labels import (
    PseudoLabels,
    are_several,
    clumps_without_nuclei,
    is_glass,
    keep_labels,
    only_sure,
    pseudo_labels,
)
from patchcl_qupath.training.supervision import (
    TrainingSample,
    augment_stains,
    bce_dice_loss,
    check_finite,
    ema_model,
    made_ahead,
    mixed_precision,
    random_crop,
    targets,
    to_batch,
)
from patchcl_qupath.training.touching import with_touching_nuclei

_WARMUP_STEPS = 20  # in which the learning rate rises
_LEAST_FOUND = 0.5  # of the area of nuclei that the first network was taught
_LEAST_SURE = 0.25  # of the area of nuclei that the second one was taught
_MAX_ARTEFACT = 0.5  # of the pixels of a nucleus
_TURNS = 4  # of a crop, by 90 degrees, over which a network's probabilities are averaged


class Trained(NamedTuple):
    """A network that was trained on samples; the loss of each step; and how long it took."""

    network: NucleusNetwork
    loss: list[float]
    seconds: float
    seconds_for_batches: float  # in which the network waited


def train(crops: TrainingCrops, teacher: Model, progress: ShowProgress) -> Model:
    """Train a network on the pseudo-labels of ``teacher``, of PatchCL, in tissue crops.

    A first network learns from these; what it finds in the crops are the pseudo-labels of the
    second. A first network that finds far less than it was taught teaches none. The second one is
    returned, after CDCL on those nuclei that are probable enough.
    Equal crops, teachers and numbers of threads give equal weights on one machine's CPU. Raises
    TrainingError where no nucleus is pseudo-labelled, or the training diverges.
    """
    config, settings = teacher.config, teacher.config.selftrain
    assert isinstance(teacher.training, PatchCLLog), "self-training begins with PatchCL"
    log = teacher.training
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    training = counter(progress, Stage.TRAINING_NETWORK)
    total, done = settings.first_steps + settings.steps, 0
    rounds: list[Trained] = []
    labelled: list[LabelledCrop] = []
    first = replace(settings, steps=settings.first_steps, small_batches=1.0)
    for of_round in (first, settings):
        found = pseudo_labelled(crops, teacher, choosing)
        if labelled:
            found = [*map(without_artefacts, found, labelled)]
        if _nucleus_px(found) > _LEAST_FOUND * _nucleus_px(labelled):
            labelled = found
        if not labelled:
            raise TrainingError("no clear nucleus was found: add images of cellular tissue")
        samples = training_samples(labelled, settings.touching, config.patchcl.seed)
        show = part_of(training, done, total)
        rounds.append(train_on(samples, of_round, config.patchcl.seed, show))
        teacher = Model(network=rounds[-1].network, config=config)
        done += of_round.steps
    model = replace(
        teacher,
        training=SelfTrainingLog(
            patchcl=log,
            nucleus_fraction=_fraction([crop.labels.nuclei > 0 for crop in labelled]),
            labelled_fraction=_fraction(
                [(crop.labels.nuclei > 0) | crop.labels.background for crop in labelled]
            ),
            loss=[loss for trained in rounds for loss in trained.loss],
            seconds=round(sum(trained.seconds for trained in rounds), 1),
            seconds_for_batches=round(sum(trained.seconds_for_batches for trained in rounds), 1),
        ),
    )
    if not settings.cdcl_steps:
        return model
    # What a person sets in [cdcl] is for refinement with labels.
    by_defaults = replace(config, cdcl=CDCLConfig(steps=settings.cdcl_steps))
    sure = partial(_sure_samples, crops=crops, before=labelled, progress=progress)
    refining = counter(progress, Stage.REFINING)
    model = cdcl.refine_without_labels(replace(model, config=by_defaults), sure, refining)
    return replace(model, config=config)


def _sure_samples(
    model: Model,
    *,
    crops: TrainingCrops,
    before: Sequence[LabelledCrop],
    progress: ShowProgress,
) -> list[TrainingSample]:
    """The crops with the nuclei that a model is sure of, by a calibration, as samples.

    ``before`` are the pseudo-labels that the network was taught by. None where there are too few
    nuclei for a calibration, or too few that it is sure of: a network that is taught background
    alone unlearns nuclei.
    """
    model = calibrated(model, crops, counter(progress, Stage.CALIBRATING))
    if model.calibration is None:
        return []
    found = pseudo_labelled(crops, model, counter(progress, Stage.CHOOSING_PSEUDO_LABELS))
    sure = [*map(of_sure_nuclei, found, before)]
    enough = _nucleus_px(sure) >= max(1, _LEAST_SURE * _nucleus_px(before))
    return [crop.sample for crop in sure] if enough else []


def train_on(
    samples: Sequence[TrainingSample],
    settings: SelfTrainConfig,
    seed: int,
    report: ShowCount,
) -> Trained:
    """Train a network on samples alone; its weights are averaged over the last steps.

    Equal arguments and numbers of threads give equal weights on one machine's CPU. Raises
    TrainingError where it diverges.
    """
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        network = NucleusNetwork(settings.widths).to(device())
    to_channels_last(network)
    average = ema_model(network, warmup_steps=1)
    # The scheduler multiplies the optimizer's rate with what its function returns.
    optimizer = torch.optim.AdamW(
        network.parameters(), 1.0, weight_decay=settings.weight_decay, fused=True
    )
    scheduler = LambdaLR(optimizer, partial(learning_rate, settings=settings))
    losses: list[Tensor] = []
    batches = made_ahead(partial(_batch, samples, settings, seed), settings.steps)
    began, waited = time.perf_counter(), 0.0
    for step in range(settings.steps):
        asked = time.perf_counter()
        stains, target = next(batches)
        waited += time.perf_counter() - asked
        with mixed_precision():
            logits = network(stains)
        loss = bce_dice_loss(logits.float(), target)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        average.update_parameters(network)
        losses.append(loss.detach())
        report(step + 1, settings.steps)
    check_finite(torch.stack(losses), "selftrain.learning_rate")
    averaged = average.module
    assert isinstance(averaged, NucleusNetwork)
    return Trained(
        network=averaged.cpu().eval(),
        loss=[round(loss.item(), 4) for loss in losses],
        seconds=round(time.perf_counter() - began, 1),
        seconds_for_batches=round(waited, 1),
    )


class LabelledCrop(NamedTuple):
    """Normalised stains (H, W, 3) of a crop, and its pseudo-labels."""

    stains: NDArray[np.float32]
    labels: PseudoLabels

    @property
    def sample(self) -> TrainingSample:
        """What a network is trained on."""
        return TrainingSample(self.stains, targets(self.labels.nuclei, self.labels.background))


def pseudo_labelled(crops: TrainingCrops, teacher: Model, report: ShowCount) -> list[LabelledCrop]:
    """The crops, in their order, with the pseudo-labels that a network can learn from ``teacher``.

    Those of a network that separates nuclei are the nuclei that it finds itself, and the
    background. Those of PatchCL, which does not, are confident components of the hematoxylin map
    (``pseudo_labels``), whose thresholds are those of all crops of a slide.
    """
    found: dict[int, LabelledCrop] = {}
    for slide in dict.fromkeys(crops.slides):
        indices = crops.of_slide(slide)
        of_slide = crops.select(indices)
        stains = [*mapped(StainNormaliser.apply, of_slide.normalisers, of_slide.images)]
        if teacher.network.core_channel is None:
            labels = _of_patchcl(of_slide, stains, teacher)
        else:
            separation = _separation(teacher.config.selftrain)
            separation = separation_of_slide(separation, teacher, of_slide, _engine(teacher))
            find = partial(_of_network, teacher, separation)
            labels = [*mapped(find, of_slide.images, of_slide.normalisers)]
        found |= zip(indices, map(LabelledCrop, stains, labels), strict=True)
        report(len(found), len(crops))
    return [found[i] for i in range(len(crops))]


def without_artefacts(crop: LabelledCrop, before: LabelledCrop) -> LabelledCrop:
    """A crop without the nuclei that a network finds in what was an artefact ``before``.

    A network that learns that keratin is background still takes some of it for nuclei, and would
    teach them.
    """
    artefacts = before.labels.artefacts
    if artefacts is None:
        return crop
    nuclei = outside_artefacts(crop, before)
    background = (crop.labels.background | artefacts) & (nuclei == 0)
    return crop._replace(labels=before.labels._replace(nuclei=nuclei, background=background))


def outside_artefacts(crop: LabelledCrop, before: LabelledCrop) -> NDArray[np.int32]:
    """The nuclei (H, W) of a crop but for those, mostly, in what was an artefact ``before``."""
    nuclei, artefacts = crop.labels.nuclei, before.labels.artefacts
    if artefacts is None:
        return nuclei
    count = int(nuclei.max(initial=0))
    share = means(runs_of(nuclei), count, artefacts.astype(np.float32))
    return keep_labels(nuclei, np.append(False, share < _MAX_ARTEFACT))


def of_sure_nuclei(crop: LabelledCrop, before: LabelledCrop) -> LabelledCrop:
    """A crop with the nuclei that a network is sure of, but for those in what was an artefact
    ``before``, which may be a dark nucleus: it is no more background than the network says itself.

    In clumps that hold hardly one of them, doubtful background is background: a network that is
    taught none in keratin never learns that it is no nuclei.
    """
    nuclei, labels = outside_artefacts(crop, before), crop.labels
    background, clumps = labels.background, before.labels.clumps
    if clumps is not None and labels.doubtful is not None:
        background = background | (labels.doubtful & clumps_without_nuclei(clumps, nuclei))
    return crop._replace(labels=PseudoLabels(nuclei, background))


def training_samples(
    crops: Sequence[LabelledCrop], touching: float, seed: int
) -> list[TrainingSample]:
    """A sample of each crop; into every other one nuclei are pasted that touch others."""
    rng = np.random.default_rng(seed)
    pasted = [
        LabelledCrop(*with_touching_nuclei(*crop, touching, rng)) if i % 2 else crop
        for i, crop in enumerate(crops)
    ]
    return [*mapped(attrgetter("sample"), pasted)]


def _of_patchcl(
    crops: TrainingCrops, stains: Sequence[NDArray[np.float32]], teacher: Model
) -> list[PseudoLabels]:
    """The pseudo-labels of the crops of one slide, by PatchCL's confidence and by shape."""
    config = teacher.config
    predict = partial(confidence, teacher, engine=_engine(teacher))
    labels = pseudo_labels(
        crops=stains,
        glass=[is_glass(image, config.slide.mpp, config.selftrain) for image in crops.images],
        confidences=[found.nucleus for found in mapped(predict, crops.images, crops.normalisers)],
        mpp=config.slide.mpp,
        config=config.selftrain,
        has_brown=crops.normalisers[0].has_brown,
    )
    of_colour = partial(without_other_colours, mpp=config.slide.mpp)
    return [*mapped(of_colour, labels, crops.images, crops.normalisers)]


def without_other_colours(
    labels: PseudoLabels, image: NDArray[np.uint8], normaliser: StainNormaliser, mpp: float
) -> PseudoLabels:
    """Pseudo-labels of a crop (H, W, 3) without what no run takes for a nucleus, whatever a network
    says: ink, pieces of a smear, membranes on glass. That is an artefact, and background.
    """
    stain = NuclearStain.of(labels.nuclei, image, mpp, SegmentConfig())
    enough = np.append(True, stain.is_enough(SegmentConfig(), normaliser.has_brown))
    if enough.all():
        return labels
    others = ~enough[labels.nuclei]
    artefacts = others if labels.artefacts is None else labels.artefacts | others
    return labels._replace(
        nuclei=keep_labels(labels.nuclei, enough),
        background=labels.background | others,
        artefacts=artefacts,
    )


def _separation(settings: SelfTrainConfig) -> SegmentConfig:
    """How nuclei that a network finds are separated for its pseudo-labels."""
    largest = max(SegmentConfig().max_area_um2, settings.max_area_um2)
    return SegmentConfig(min_area_um2=settings.min_area_um2, max_area_um2=largest)


def _engine(teacher: Model) -> EngineKind:
    """What runs a teacher: as in a run, but not in 8 bits."""
    kind = engines.choose(teacher.config.engine, teacher.network)
    if kind is EngineKind.OPENVINO_INT8:
        return engines.choose(EngineChoice.OPENVINO, teacher.network)
    return kind


def _of_network(
    teacher: Model,
    separation: SegmentConfig,
    image: NDArray[np.uint8],
    normaliser: StainNormaliser,
) -> PseudoLabels:
    """The nuclei that a network finds in a crop (H, W, 3), and its background.

    Probabilities are means over four turns of the crop: where they differ, the network is not sure.
    What it calls a nucleus but is too large or small for one, or has no core, is unlabelled. Of a
    calibrated model, so are nuclei that are not probable enough, with the background around them,
    and those that seem several: the probability is that of the means, mostly less than in a single
    view.
    """
    nucleus, core = np.zeros((2, *image.shape[:2]), np.float32)
    engine = _engine(teacher)
    for turns in range(_TURNS):
        found = confidence(teacher, np.rot90(image, turns), normaliser, engine)
        assert found.core is not None
        nucleus += np.rot90(found.nucleus, -turns) / _TURNS
        core += np.rot90(found.core, -turns) / _TURNS
    nuclei = instances(nucleus, teacher.mpp, separation, teacher.threshold, core)
    labels = PseudoLabels(nuclei, (nucleus < teacher.threshold) & (nuclei == 0))
    labels = without_other_colours(labels, image, normaliser, teacher.mpp)
    nuclei = labels.nuclei
    if teacher.calibration is None:
        return labels
    settings = teacher.config.cdcl
    means_of_turns = Confidence(nucleus, core)
    probability = nucleus_probability(teacher, nuclei, means_of_turns, teacher.mpp, separation)
    several = are_several(nuclei, settings.large_area, settings.min_solidity)
    return only_sure(
        labels,
        is_sure=probability >= settings.min_probability,
        is_single=~several | (probability >= settings.min_probability_of_several),
    )


def learning_rate(step: int, settings: SelfTrainConfig) -> float:
    """A linear warm-up to the peak, times a cosine to 0."""
    warmup = min(1.0, (step + 1) / _WARMUP_STEPS)
    return settings.learning_rate * warmup * (1 + math.cos(math.pi * step / settings.steps)) / 2


def batch_size(step: int, settings: SelfTrainConfig) -> int:
    """The number of crops of a step: large batches, whose gradients have less noise, come last.

    As S. L. Smith, P.-J. Kindermans, C. Ying, Q. V. Le, Don't Decay the Learning Rate, Increase the
    Batch Size, ICLR 2018, beside a learning rate that falls.
    """
    is_early = step < settings.small_batches * settings.steps
    return min(settings.first_batch, settings.batch) if is_early else settings.batch


def _batch(
    samples: Sequence[TrainingSample], settings: SelfTrainConfig, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Augmented stains and targets (B, 3, S, S) of random crops, the same for each step."""
    rng = np.random.default_rng((seed, step))
    stains, target = [], []
    for k in rng.integers(len(samples), size=batch_size(step, settings)):
        crop = random_crop(samples[k], settings.crop_px, settings.scale_jitter, rng)
        stains.append(augment_stains(crop.stains, rng))
        target.append(crop.target)
    return to_batch(stains), to_batch(target)


def _nucleus_px(crops: Sequence[LabelledCrop]) -> int:
    """The number of pixels of nuclei in crops."""
    return sum(int(np.count_nonzero(crop.labels.nuclei)) for crop in crops)


def _fraction(masks: Sequence[NDArray[np.bool_]]) -> float:
    """Mean over crops of the fraction of pixels that is in the mask."""
    return round(float(np.mean([mask.mean() for mask in masks])), 4)
