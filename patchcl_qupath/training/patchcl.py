"""PatchCL: a confidence network learns to tell nuclei from the rest, without labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).

Patches, weighted with the confidence of one channel, should resemble each other, and differ from
what that channel leaves out and from what other channels take. They are drawn where the network is
sure of itself, either way (see ``contrast``).
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork, FeatureNetwork, device, folded
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.files import to_jpeg
from patchcl_qupath.training.contrast import (
    MEASURES,
    Contrast,
    blur,
    contrast_patches,
    contrast_prototypes,
    draw_patches,
    similarity_space,
)
from patchcl_qupath.training.pseudo_labels import otsu
from patchcl_qupath.training.supervision import random_window

Images = Sequence[NDArray[np.uint8]]
Report = Callable[[int, int], None]  # steps done, steps in all

_SHOWN_PX = 192  # side of the crop that the report shows the channels of
_VALIDATION_CROPS = 32  # crops on which the nucleus channel is chosen
_TYPICAL_LOGIT = 1.5  # a confidence of 0.82


def train(
    images: Images,
    normalisers: Sequence[StainNormaliser],
    config: Config,
    report: Report | None = None,
) -> Model:
    """Learn nuclei from RGB tissue crops (H, W, 3) at ``config.slide.mpp``, without labels.

    ``normalisers`` has the stain range of each crop's slide. Crops may differ in size; those
    narrower than a patch are left out. Equal crops, settings and numbers of threads give equal
    weights on one machine. Raises TrainingError if there is nothing to learn from.
    """
    settings = config.patchcl
    usable = [i for i, image in enumerate(images) if min(image.shape[:2]) >= settings.patch_px]
    if not usable:
        least_um = settings.patch_px * config.slide.mpp
        raise TrainingError(f"no image is {least_um:g} um wide: add larger ones to learn from")
    images, normalisers = [images[i] for i in usable], [normalisers[i] for i in usable]

    rng = np.random.default_rng(settings.seed)
    generator = torch.Generator(device()).manual_seed(settings.seed)
    with torch.random.fork_rng():  # the caller's random numbers stay as they are
        torch.manual_seed(settings.seed)
        network = ConfidenceNetwork.of(settings).to(device())
        features = FeatureNetwork(settings.patch_px).to(device())
    both = nn.ModuleList([network, features]).parameters()
    optimizer = torch.optim.Adam(both, weight_decay=settings.weight_decay)

    log: list[Contrast] = []
    step, last = 0, settings.max_steps
    converged = None  # at this step
    while step < last:
        cooled = max(0.0, 1 - (last - step) / max(1, settings.cooldown_steps))  # 0, then up to 1
        fall = (1 + math.cos(math.pi * cooled)) / 2
        optimizer.param_groups[0]["lr"] = settings.learning_rate * fall
        step += 1
        seen = _batch(images, normalisers, settings, rng).to(device())  # (B, 3, S, S)
        prediction = network(seen)  # (B, C, S, S)
        index = draw_patches(prediction.detach(), settings, generator)  # (B, C, n)
        if settings.similarity in MEASURES:
            contrast = contrast_patches(prediction, seen, index, settings, features, generator)
        else:
            space = similarity_space(seen, config)  # (B, 2, S, S)
            contrast = contrast_prototypes(prediction, space, index, settings)
        if contrast is not None:
            optimizer.zero_grad()
            contrast.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            log.append(contrast._replace(loss=contrast.loss.detach()))
            if converged is None and has_converged(log, settings.patience):
                converged = step
                last = min(last, step + settings.cooldown_steps)
        if report:
            report(step, last)

    correlation, logit = _channel_scores(network, images, normalisers, config)
    if not np.isfinite(correlation).all():
        raise TrainingError("the images look blank: add some with stained tissue to learn from")
    channel = int(np.argmax(np.abs(correlation)))
    with torch.no_grad():
        # Contrast drives confidences to 0 and 1, the closer the longer it goes on. Scaled back,
        # they do not depend on when it ended, and tell a clear nucleus from a doubtful one.
        for weights in network.last.parameters():
            weights.mul_(_TYPICAL_LOGIT / logit[channel])
    training: dict[str, Any] = {
        "steps": step,
        "skipped_steps": step - len(log),
        "converged_at": converged,
        "hematoxylin_correlation": [round(float(r), 3) for r in correlation],
        "loss": [round(c.loss.item(), 4) for c in log],
        "positive_positive": [round(c.positive_positive, 4) for c in log],
        "positive_negative": [round(c.positive_negative, 4) for c in log],
    }
    inverted = bool(correlation[channel] < 0)
    model = Model(network.cpu().eval(), config, channel, inverted, 0.5, training)
    validation = _validation_crops(images)
    predictions = [confidence(model, images[i], normalisers[i]).nucleus.ravel() for i in validation]
    training["channels"] = _channels(
        model, [images[i] for i in validation], [normalisers[i] for i in validation]
    )
    return replace(model, threshold=otsu(np.concatenate(predictions)))


def has_converged(log: Sequence[Contrast], patience: int) -> bool:
    """Whether the network has converged in the sense of the paper, which needs no label.

    There, positives are to be close together and far from negatives. Here, the gap between the two
    distances, averaged over ``patience`` steps, must be hardly wider (5 %) than over those before.
    """
    if len(log) < 2 * patience:
        return False
    gaps = np.array([c.positive_negative - c.positive_positive for c in log[-2 * patience :]])
    before, now = gaps.reshape(2, patience).mean(axis=1)
    return bool(now <= before + 0.05 * abs(before))


def _batch(
    images: Images,
    normalisers: Sequence[StainNormaliser],
    settings: PatchCLConfig,
    rng: np.random.Generator,
) -> Tensor:
    """What the network sees, (B, 3, S, S), of random crops, turned and mirrored at random."""
    crops = []
    for i in rng.integers(len(images), size=settings.batch):
        (crop,) = random_window([images[i]], settings.crop_px, rng)  # (S, S, 3)
        crops.append(normalisers[i].network_input(crop, settings.input))
    batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
    return batch.contiguous(memory_format=torch.channels_last)  # several times as fast


def _validation_crops(images: Images) -> list[int]:
    """Which crops decide on channel and threshold: some of each slide."""
    return [int(i) for i in np.linspace(0, len(images) - 1, min(len(images), _VALIDATION_CROPS))]


def _channels(
    model: Model, images: Images, normalisers: Sequence[StainNormaliser]
) -> dict[str, Any]:
    """What the channels say of one crop, for people to look at: JPEGs in base64.

    The crop has as much hematoxylin as half of the crops have.
    """
    amounts = [
        normaliser.apply(image)[..., 0].mean()
        for image, normaliser in zip(images, normalisers, strict=True)
    ]
    i = int(np.argsort(amounts)[len(amounts) // 2])
    crop = images[i][:_SHOWN_PX, :_SHOWN_PX]
    x = torch.from_numpy(normalisers[i].network_input(crop, model.input)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        maps = folded(model.network)(x)[0]  # (C, H, W)
    grey = (maps * 255).round().to(torch.uint8).numpy()
    return {
        "crop": b64encode(to_jpeg(crop, 75)).decode(),
        "confidences": [b64encode(to_jpeg(channel, 75)).decode() for channel in grey],
        "chosen": model.channel,
        "inverted": model.inverted,
    }


def _channel_scores(
    network: ConfidenceNetwork,
    images: Images,
    normalisers: Sequence[StainNormaliser],
    config: Config,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel: correlation of confidence with smoothed hematoxylin, and median |logit|."""
    engine = folded(network)
    scores = []
    for i in _validation_crops(images):
        seen = normalisers[i].network_input(images[i], config.patchcl.input)
        x = torch.from_numpy(seen).to(device()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        stains = (
            torch.from_numpy(normalisers[i].apply(images[i])).to(device()).permute(2, 0, 1)[None]
        )
        with torch.inference_mode():
            prediction = engine(x)[0].flatten(1)  # (C, H * W)
            hematoxylin = blur(stains[:, :1], config.patchcl.blur_um / config.slide.mpp)
            rows = torch.cat([hematoxylin[0].flatten(1), prediction])  # (1 + C, H * W)
            logits = torch.logit(prediction, eps=1e-6).abs()  # (C, H * W)
            scores.append(torch.stack([rows.corrcoef()[0, 1:], logits.median(dim=1).values]))
    correlation, logit = torch.stack(scores).nanmean(dim=0).cpu().numpy()  # (C,) each
    return correlation, logit
