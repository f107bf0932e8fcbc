"""PatchCL: a confidence network learns to tell nuclei from the rest, without labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.network import ConfidenceNetwork, FeatureNetwork, Model, device
from patchcl_qupath.stains import StainScale

Images = Sequence[NDArray[np.uint8]]
Report = Callable[[int, int], None]


class Contrast(NamedTuple):
    loss: Tensor
    positive_positive: float
    positive_negative: float


def train(images, scales, config, report=None, trace=None):
    settings = config.patchcl
    where = device()
    rng = np.random.default_rng(settings.seed)
    generator = torch.Generator(where).manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = ConfidenceNetwork.of(settings).to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(
        network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.max_steps)
    log = []
    for step in range(settings.max_steps):
        stains = _batch(images, scales, settings, rng).to(where)
        confidence = network(stains)
        index = draw_patches(confidence.detach(), settings, generator)
        contrast = contrast_prototypes(confidence, _space(stains, config), index, settings)
        optimizer.zero_grad()
        contrast.loss.backward()
        optimizer.step()
        schedule.step()
        log.append(
            (
                contrast.loss.item(),
                contrast.positive_positive,
                contrast.positive_negative,
                *confidence.detach().mean((0, 2, 3)).tolist(),
            )
        )
        if trace:
            trace(step, network, log)
        if report:
            report(step + 1, settings.max_steps)
    network.eval()
    channel, inverted, corr = _choose(network, images, scales, config)
    return Model(network.cpu(), config, channel, inverted, 0.5, {"log": log, "correlations": corr})


def _batch(images, scales, settings, rng) -> Tensor:
    side = settings.crop_px
    crops = []
    for i in rng.integers(len(images), size=settings.batch):
        row, col = (rng.integers(s - side + 1) for s in images[i].shape[:2])
        crop = scales[i].apply(images[i][row : row + side, col : col + side])
        crop = np.rot90(crop, rng.integers(4))
        if rng.integers(2):
            crop = crop[:, ::-1]
        crops.append(crop)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def _blur(maps: Tensor, sigma: float) -> Tensor:
    radius = min(math.ceil(3 * sigma), maps.shape[-1] - 1, maps.shape[-2] - 1)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=maps.device) / sigma) ** 2)
    taps = taps / taps.sum()
    m = F.pad(maps, [radius] * 4, mode="reflect")
    m = F.conv2d(m, taps[None, None, :, None])
    return F.conv2d(m, taps[None, None, None, :])


def _space(stains, config):
    s = config.patchcl
    h = _blur(stains[:, :1], s.blur_um / config.slide.mpp)
    return torch.cat([h, 2 * (h - _blur(h, s.around_um / config.slide.mpp))], 1)


def _grid(maps, settings):
    return F.avg_pool2d(maps, settings.patch_px, settings.stride_px).flatten(2)


def draw_patches(confidence, settings, generator):
    a = confidence.clamp(1e-6, 1 - 1e-6)
    entropy = -(a * a.log2() + (1 - a) * (1 - a).log2())
    chances = (1 - _grid(entropy, settings)).clamp_min(1e-3)
    index = torch.multinomial(chances.flatten(0, 1), settings.patches, True, generator=generator)
    return index.view(*chances.shape[:2], -1)


def contrast_prototypes(confidence, space, index, settings):
    B, C, H, W = confidence.shape
    tau = settings.temperature
    eps = 1e-3 / settings.patch_px**2
    attended = (confidence[:, :, None] * space[:, None]).flatten(1, 2)
    mean = _grid(confidence, settings)  # B C P
    fsum = _grid(attended, settings).unflatten(1, (C, -1))  # B C 2 P
    total = _grid(space, settings)[:, None]
    f = fsum / (mean[:, :, None] + eps)
    g = (total - fsum) / (1 - mean[:, :, None] + eps)
    pick = lambda v: (
        v.gather(3, index[:, :, None].expand(-1, -1, v.shape[2], -1))
        .permute(1, 0, 3, 2)
        .flatten(1, 2)
    )
    f, g, m = pick(f), pick(g), pick(mean[:, :, None])[..., 0]  # C N 2
    w = 4 * m * (1 - m)
    logw = (w + 1e-6).log()

    def dist(x, y):
        return (x[..., :, None, :] - y[..., None, :, :]).square().mean(-1)

    def average(d):  # C N N -> C N
        return (d * w[:, None]).sum(-1) / (w.sum(-1)[:, None] + 1e-6)

    ff, gg, fg = dist(f, f), dist(g, g), dist(f, g)
    norm = logw.logsumexp(-1)

    def pull_push(same, other):
        return (
            average(same / tau) + torch.logsumexp(-other / tau + logw[:, None], -1) - norm[:, None]
        )

    loss = (w * (pull_push(ff, fg) + pull_push(gg, fg.transpose(1, 2)))).mean()
    if C > 1 and settings.inter:
        across = dist(f[:, None], f[None])  # C C N N
        e = -across / tau + logw[None, :, None]
        e = e.masked_fill(
            torch.eye(C, dtype=torch.bool, device=e.device)[:, :, None, None], -torch.inf
        )
        e = torch.logsumexp(e, (1, 3))  # C N
        n = (
            logw[None]
            .expand(C, -1, -1)
            .masked_fill(torch.eye(C, dtype=torch.bool)[:, :, None], -torch.inf)
            .logsumexp((1, 2))
        )
        loss = loss + settings.inter * (w * (average(ff / tau) + e - n[:, None])).mean()
    return Contrast(loss, average(ff).detach().mean().item(), average(fg).detach().mean().item())


def _choose(network, images, scales, config):
    folded = network.folded()
    sums = []
    with torch.inference_mode():
        for k in np.linspace(0, len(images) - 1, min(len(images), 30)).astype(int):
            x = torch.from_numpy(scales[k].apply(images[k][:512, :512])).permute(2, 0, 1)[None]
            a = folded(x)[0].flatten(1)
            h = _blur(x[:, :1], config.patchcl.blur_um / config.slide.mpp)[0].flatten(1)
            sums.append(torch.corrcoef(torch.cat([h, a]))[0, 1:])
    corr = torch.stack(sums).mean(0)
    ch = int(corr.abs().argmax())
    return ch, bool(corr[ch] < 0), corr.tolist()
