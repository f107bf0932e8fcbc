"""PatchCL: a confidence network is trained to find nuclei, without labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).

Patches, weighted with the confidence of one channel, should resemble each other, and differ from
what that channel leaves out and from what other channels take. They are sampled where the network
is certain, of either answer (see ``contrast``).
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork, FeatureNetwork, device, folded
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.storage.files import to_jpeg
from patchcl_qupath.storage.records import ChannelsRecord, PatchCLLog
from patchcl_qupath.training.contrast import (
    MEASURES,
    Contrast,
    blur,
    contrast_patches,
    contrast_prototypes,
    draw_patches,
    similarity_space,
)
from patchcl_qupath.training.halves import Halves
from patchcl_qupath.training.pseudo_labels import otsu
from patchcl_qupath.training.supervision import check_finite, mixed_precision, random_window

_SHOWN_PX = 192  # side of the crop that the report shows the channels of
_VALIDATION_CROPS = 32  # crops on which channel and threshold are chosen
_TYPICAL_LOGIT = 1.5  # a confidence of 0.82

# With the measures of the paper (see ``_best_start``).
_PUBLISHED_THRESHOLD = 0.5
_STARTS = 10
_SEEDS = 1000  # between the seeds of two starts
_TRIAL_STEPS = 45  # of all starts
_KEPT_STARTS = 2  # that go on
_SNAPSHOT_STEPS = 15  # between two snapshots; 5 epochs of the paper's data
_JUDGED_CROPS = 12  # crops that a snapshot is scored on


def train(
    crops: TrainingCrops,
    config: Config,
    report: ShowCount | None = None,
    watch: Watch | None = None,
) -> Model:
    """Train PatchCL on tissue crops at ``config.slide.mpp``, without labels.

    Crops may differ in size; those narrower than a patch are left out. Equal crops, settings and
    numbers of threads give equal weights on one machine's CPU. With the measures of the paper,
    there are several starts (``_best_start``); ``watch`` is called with each snapshot of them.
    Raises TrainingError where nothing can be learnt from the crops, or the training diverges.
    """
    settings = config.patchcl
    wide = [min(image.shape[:2]) >= settings.patch_px for image in crops.images]
    usable = [int(i) for i in np.flatnonzero(wide)]
    if not usable:
        least_um = settings.patch_px * config.slide.mpp
        raise TrainingError(f"no image is {least_um:g} µm wide: add larger ones to train on")
    crops = crops.select(usable)
    validation = crops.some(_VALIDATION_CROPS)

    as_published = settings.similarity in MEASURES
    if as_published:
        snapshot, trained = _best_start(crops, config, report, watch)
    else:
        trained = _train_network(crops, config, report)
    correlation, logit = _channel_scores(trained.network, validation, config)
    if as_published:
        correlation = snapshot.scores
    if not np.isfinite(correlation).any():
        raise TrainingError("the images look blank: add some with stained tissue to train on")
    correlation = np.nan_to_num(correlation)  # a map that is the same everywhere shows nothing
    channel = int(np.argmax(np.abs(correlation)))
    with torch.no_grad():
        # Contrast drives confidences to 0 and 1, the closer the longer the training. Scaled back,
        # they do not depend on when it ended, and are graded by how clear a nucleus is.
        for weights in trained.network.last.parameters():
            weights.mul_(_TYPICAL_LOGIT / logit[channel])
    model = Model(
        network=trained.network.cpu().eval(),
        config=config,
        channel=channel,
        inverted=bool(correlation[channel] < 0),
    )
    log = PatchCLLog(
        steps=trained.steps,
        skipped_steps=trained.steps - len(trained.contrasts),
        converged_at=trained.converged_at,
        hematoxylin_correlation=[round(float(r), 3) for r in correlation],
        loss=[round(c.loss.item(), 4) for c in trained.contrasts],
        positive_positive=[round(c.positive_positive, 4) for c in trained.contrasts],
        positive_negative=[round(c.positive_negative, 4) for c in trained.contrasts],
        channels=_channels(model, validation),
    )
    threshold = _PUBLISHED_THRESHOLD if as_published else _otsu_threshold(model, validation)
    return replace(model, threshold=threshold, training=log)


def _otsu_threshold(model: Model, crops: TrainingCrops) -> float:
    predictions = [
        confidence(model, image, normaliser).nucleus.ravel()
        for image, normaliser in zip(crops.images, crops.normalisers, strict=True)
    ]
    return otsu(np.concatenate(predictions))


class _Trained(NamedTuple):
    """A network after some steps, of ``last``; when it converged; each step's contrast."""

    network: ConfidenceNetwork
    steps: int
    last: int
    converged_at: int | None
    contrasts: list[Contrast]  # of the steps that were not skipped


def _train_network(crops: TrainingCrops, config: Config, report: ShowCount | None) -> _Trained:
    """Train until convergence and a cooldown, or for ``max_steps``."""
    for trained in _steps(crops, config, config.patchcl.seed):
        if report:
            report(trained.steps, trained.last)
    return trained


def _steps(crops: TrainingCrops, config: Config, seed: int) -> Iterator[_Trained]:
    """Train step by step, until convergence and a cooldown, or for ``max_steps``.

    Yields one and the same network after each step.
    """
    settings = config.patchcl
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device()).manual_seed(seed)
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        network = ConfidenceNetwork.of(settings).to(device())
        features = FeatureNetwork(settings.patch_px).to(device())
    both = nn.ModuleList([network, features]).parameters()
    optimizer = torch.optim.Adam(both, settings.learning_rate, weight_decay=settings.weight_decay)
    step, last = 0, settings.max_steps

    def cooldown(step: int) -> float:
        """The fraction of the learning rate at a step: a cosine to 0 over the last steps."""
        done = max(0.0, 1 - (last - step) / max(1, settings.cooldown_steps))
        return (1 + math.cos(math.pi * done)) / 2

    scheduler = LambdaLR(optimizer, cooldown)
    log: list[Contrast] = []
    converged_at = None
    as_published = settings.similarity in MEASURES  # batch norm, too
    logits_of = partial(_logits, mixed=not as_published)
    with Halves(network, whole=as_published) as halves:
        while step < last:
            step += 1
            x = _batch(crops, settings, rng).to(device())  # (B, 3, S, S)
            parts = halves.each(logits_of, x)
            logits = torch.cat([part.detach() for part in parts]).requires_grad_()
            check_finite(logits, "patchcl.learning_rate")
            prediction = torch.sigmoid(logits)  # (B, C, S, S)
            index = draw_patches(prediction.detach(), settings, generator)  # (B, C, n)
            if as_published:
                contrast = contrast_patches(prediction, x, index, settings, features, generator)
            else:
                space = similarity_space(x, config)  # (B, 2, S, S)
                contrast = contrast_prototypes(prediction, space, index, settings)
            optimizer.zero_grad()
            if contrast is not None:
                contrast.loss.backward()  # type: ignore[no-untyped-call]
                assert logits.grad is not None
                halves.each(_backward, parts, logits.grad)
                halves.join()
                log.append(contrast._replace(loss=contrast.loss.detach()))
                if converged_at is None and has_converged(log, settings.patience):
                    converged_at = step
                    last = min(last, step + settings.cooldown_steps)
            optimizer.step()  # without gradients, in a step that is skipped, nothing changes
            scheduler.step()
            yield _Trained(network, step, last, converged_at, log)


def _logits(network: ConfidenceNetwork, x: Tensor, *, mixed: bool) -> Tensor:
    with mixed_precision(mixed):
        return network.logits(x).float()


def _backward(_: ConfidenceNetwork, logits: Tensor, gradient: Tensor) -> None:
    logits.backward(gradient)  # type: ignore[no-untyped-call]


class Snapshot(NamedTuple):
    """The network of a start, counted from 0, after some steps.

    ``scores`` are those of its channels, which need no label: ``mask_correlations``.
    """

    start: int
    step: int
    network: ConfidenceNetwork
    scores: NDArray[np.float32]  # (C,)

    @property
    def score(self) -> float:
        """That of its best channel."""
        return float(np.nan_to_num(np.abs(self.scores)).max())


Watch = Callable[[Snapshot], None]


def _best_start(
    crops: TrainingCrops, config: Config, report: ShowCount | None, watch: Watch | None
) -> tuple[Snapshot, _Trained]:
    """Train from several starts as the paper does; the best snapshot of all, chosen without labels.

    With the measures of the paper, what a channel finds depends on the start and on the step: most
    starts do not end at nuclei, and those that do leave them again. The authors choose by labels
    which of several trainings, epochs and channels to take. Here, the score of a snapshot decides:
    after ``_TRIAL_STEPS`` which starts go on, and in the end.
    """
    steps = config.patchcl.max_steps
    trial = min(_TRIAL_STEPS, steps)
    judged = crops.some(_JUDGED_CROPS)
    starts = [_steps(crops, config, config.patchcl.seed + _SEEDS * i) for i in range(_STARTS)]
    best: dict[int, tuple[Snapshot, _Trained]] = {}
    total, done = _STARTS * trial + _KEPT_STARTS * (steps - trial), 0

    def go_on(start: int, until: int) -> None:
        nonlocal done
        for trained in starts[start]:
            done += 1
            if report:
                report(done, total)
            step = trained.steps
            if step % _SNAPSHOT_STEPS == 0 or step == trained.last:
                scores = mask_correlations(trained.network, judged, config)
                snapshot = Snapshot(start, step, deepcopy(trained.network), scores)
                if watch:
                    watch(snapshot)
                if start not in best or snapshot.score > best[start][0].score:
                    kept = trained._replace(
                        network=snapshot.network, contrasts=[*trained.contrasts]
                    )
                    best[start] = snapshot, kept
            if step == until:
                break

    for start in range(_STARTS):
        go_on(start, trial)
    ranked = sorted(best, key=lambda start: -best[start][0].score)
    for start in ranked[:_KEPT_STARTS]:
        go_on(start, steps)
    return max(best.values(), key=lambda found: found[0].score)


def has_converged(log: Sequence[Contrast], patience: int) -> bool:
    """Whether the network has converged in the sense of the paper, which needs no label.

    There, positives are to be close together and far from negatives. Here, the gap between the two
    distances, averaged over ``patience`` steps, must be at most 5 % wider than over those before.
    """
    if len(log) < 2 * patience:
        return False
    gaps = np.array([c.positive_negative - c.positive_positive for c in log[-2 * patience :]])
    before, now = gaps.reshape(2, patience).mean(axis=1)
    return bool(now <= before + 0.05 * abs(before))


def _batch(crops: TrainingCrops, settings: PatchCLConfig, rng: np.random.Generator) -> Tensor:
    """Network input (B, 3, S, S) of random crops, turned and mirrored at random."""
    pixels = []
    for i in rng.integers(len(crops), size=settings.batch):
        (window,) = random_window([crops.images[i]], settings.crop_px, rng)  # (S, S, 3)
        pixels.append(crops.normalisers[i].network_input(window, settings.input))
    batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)  # several times as fast


def _channels(model: Model, crops: TrainingCrops) -> ChannelsRecord:
    """The channels on one crop, for the report: the crop of median hematoxylin."""
    amounts = [
        normaliser.apply(image)[..., 0].mean()
        for image, normaliser in zip(crops.images, crops.normalisers, strict=True)
    ]
    i = int(np.argsort(amounts)[len(amounts) // 2])
    crop = crops.images[i][:_SHOWN_PX, :_SHOWN_PX]
    pixels = crops.normalisers[i].network_input(crop, model.input)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None]  # (1, 3, H, W)
    with torch.inference_mode():
        maps = folded(model.network).probabilities(x)[0]  # (C, H, W)
    grey = (maps * 255).round().to(torch.uint8).numpy()
    return ChannelsRecord(
        crop=b64encode(to_jpeg(crop, 75)).decode(),
        confidences=[b64encode(to_jpeg(channel, 75)).decode() for channel in grey],
        chosen=model.channel,
        inverted=model.inverted,
    )


def _channel_scores(
    network: ConfidenceNetwork, crops: TrainingCrops, config: Config
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel: correlation of confidence with smoothed hematoxylin, and median |logit|."""
    network = folded(network)
    scores = []
    for image, normaliser in zip(crops.images, crops.normalisers, strict=True):
        x = _to_tensor(normaliser.network_input(image, config.patchcl.input))  # (1, 3, H, W)
        stains = _to_tensor(normaliser.apply(image))  # (1, 3, H, W)
        with torch.inference_mode():
            prediction = network(x)[0].flatten(1)  # (C, H * W)
            hematoxylin = blur(stains[:, :1], config.patchcl.blur_um / config.slide.mpp)
            rows = torch.cat([hematoxylin[0].flatten(1), prediction])  # (1 + C, H * W)
            logits = torch.logit(prediction, eps=1e-6).abs()  # (C, H * W)
            scores.append(torch.stack([rows.corrcoef()[0, 1:], logits.median(dim=1).values]))
    correlation, logit = torch.stack(scores).nanmean(dim=0).cpu().numpy()  # (C,) each
    return correlation, logit


def mask_correlations(
    network: ConfidenceNetwork, crops: TrainingCrops, config: Config
) -> NDArray[np.float32]:
    """The mean correlation (C,) of smoothed hematoxylin with the mask of each channel.

    Its square is the fraction of the variance of hematoxylin that the mask explains, which Otsu's
    method maximises over thresholds of hematoxylin itself. It is negative for a mask of all but
    nuclei, and 0 for one of all or nothing; NaN on blank images.
    """
    network = folded(network)
    found = []
    for image, normaliser in zip(crops.images, crops.normalisers, strict=True):
        x = _to_tensor(normaliser.network_input(image, config.patchcl.input))  # (1, 3, H, W)
        stains = _to_tensor(normaliser.apply(image))  # (1, 3, H, W)
        with torch.inference_mode():
            masks = (network(x)[0] > _PUBLISHED_THRESHOLD).flatten(1).float()  # (C, H * W)
            hematoxylin = blur(stains[:, :1], config.patchcl.blur_um / config.slide.mpp).flatten()
            rows = torch.cat([hematoxylin[None], masks])  # (1 + C, H * W)
            is_flat = rows.amin(dim=1) == rows.amax(dim=1)  # (1 + C,)
            correlation = rows.corrcoef()[0, 1:]  # (C,)
            found.append(correlation.masked_fill(is_flat[1:] & ~is_flat[0], 0))
    mean: NDArray[np.float32] = torch.stack(found).nanmean(dim=0).cpu().numpy()
    return mean


def _to_tensor(image: NDArray[np.float32]) -> Tensor:
    """(H, W, 3) as (1, 3, H, W)."""
    return torch.from_numpy(image).to(device()).permute(2, 0, 1)[None]
