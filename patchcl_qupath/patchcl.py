"""PatchCL: a confidence network learns to tell nuclei from the rest, without labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779).

Patches, weighted with the confidence of one channel, should resemble each other, and differ from
what that channel leaves out and from what other channels take. They are drawn where the network is
sure of itself, either way. What it means to resemble is said by ``PatchCLConfig.similarity``:
"prototypes" compares the mean stain where a patch is confident, and where it is not; the paper's
own measures (``MEASURES``) compare patches that are positive or negative as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.network import ConfidenceNetwork, FeatureNetwork, Model, device
from patchcl_qupath.stains import StainScale

Images = Sequence[NDArray[np.uint8]]
Report = Callable[[int, int], None]  # steps done, steps in all

_ANCHORS = 10  # positives per channel that the paper compares with all others
_JUDGES = 32  # crops on which the nucleus channel is chosen
_TYPICAL_LOGIT = 1.5  # a confidence of 0.82


class Contrast(NamedTuple):
    """A loss to descend, and the two distances by which the paper judges convergence."""

    loss: Tensor
    positive_positive: float  # small once what is confident looks alike
    positive_negative: float  # large once it looks unlike the rest


def train(
    images: Images, scales: Sequence[StainScale], config: Config, report: Report | None = None
) -> Model:
    """Learn nuclei from RGB tissue crops (H, W, 3) at ``config.slide.mpp``, without labels.

    ``scales`` has the stain range of each crop's slide. Crops may differ in size; those narrower
    than a patch are left out. Equal crops, settings and numbers of threads give equal weights on
    one machine. Raises TrainingError if there is nothing to learn from.
    """
    settings = config.patchcl
    usable = [i for i, image in enumerate(images) if min(image.shape[:2]) >= settings.patch_px]
    if not usable:
        least_um = settings.patch_px * config.slide.mpp
        raise TrainingError(f"no image is {least_um:g} um wide: add larger ones to learn from")
    images, scales = [images[i] for i in usable], [scales[i] for i in usable]

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
    while step < last:
        cooled = max(0.0, 1 - (last - step) / max(1, settings.cooldown_steps))  # 0, then up to 1
        fall = (1 + math.cos(math.pi * cooled)) / 2
        optimizer.param_groups[0]["lr"] = settings.learning_rate * fall
        step += 1
        stains = _batch(images, scales, settings, rng).to(device())  # (B, 3, S, S)
        confidence = network(stains)  # (B, C, S, S)
        index = draw_patches(confidence.detach(), settings, generator)  # (B, C, n)
        if settings.similarity in MEASURES:
            contrast = contrast_patches(confidence, stains, index, settings, features, generator)
        else:
            space = similarity_space(stains, config)  # (B, 2, S, S)
            contrast = contrast_prototypes(confidence, space, index, settings)
        if contrast is not None:
            optimizer.zero_grad()
            contrast.loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            log.append(contrast._replace(loss=contrast.loss.detach()))
            if has_converged(log, settings.patience):
                last = min(last, step + settings.cooldown_steps)
        if report:
            report(step, last)

    correlation, logit = _judge(network, images, scales, config)
    if not np.isfinite(correlation).all():
        raise TrainingError("the images look blank: add some with stained tissue to learn from")
    channel = int(np.argmax(np.abs(correlation)))
    with torch.no_grad():
        # Contrast drives confidences to 0 and 1, the closer the longer it goes on. Scaled back,
        # they do not depend on when it ended, and tell a clear nucleus from a doubtful one.
        for weights in network.last.parameters():
            weights.mul_(_TYPICAL_LOGIT / logit[channel])
    training = {
        "steps": step,
        "skipped_steps": step - len(log),
        "hematoxylin_correlation": [round(float(r), 3) for r in correlation],
        "loss": [round(c.loss.item(), 4) for c in log],
        "positive_positive": [round(c.positive_positive, 4) for c in log],
        "positive_negative": [round(c.positive_negative, 4) for c in log],
    }
    inverted = bool(correlation[channel] < 0)
    return Model(network.cpu().eval(), config, channel, inverted, 0.5, training)


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


def draw_patches(confidence: Tensor, settings: PatchCLConfig, generator: torch.Generator) -> Tensor:
    """The entropy sampler: patches are drawn where the network is sure, of whichever answer.

    From confidences (B, C, H, W): positions (B, C, n) in the grid of patches, drawn with
    replacement, with a chance proportional to 1 - the patch's mean entropy in bits.
    """
    a = confidence.clamp(1e-6, 1 - 1e-6)
    entropy = -(a * a.log2() + (1 - a) * (1 - a).log2())  # (B, C, H, W)
    chance = (1 - _patch_means(entropy, settings)).clamp_min(1e-3)  # (B, C, P)
    drawn = torch.multinomial(chance.flatten(0, 1), settings.patches, True, generator=generator)
    return drawn.view(*chance.shape[:2], -1)  # (B, C, n)


def similarity_space(stains: Tensor, config: Config) -> Tensor:
    """What prototypes are made of: hematoxylin, and its excess over the surroundings.

    From scaled stains (B, 3, H, W) to (B, 2, H, W). By the excess, a nucleus in purple tissue
    differs from that tissue, which may hold more hematoxylin than nuclei do elsewhere.
    """
    settings, mpp = config.patchcl, config.slide.mpp
    hematoxylin = _blur(stains[:, :1], settings.blur_um / mpp)  # (B, 1, H, W)
    excess = hematoxylin - _blur(hematoxylin, settings.around_um / mpp)  # (B, 1, H, W)
    return torch.cat([hematoxylin, settings.excess_weight * excess], dim=1)


def contrast_prototypes(
    confidence: Tensor, space: Tensor, index: Tensor, settings: PatchCLConfig
) -> Contrast:
    """The contrast of the paper with soft parity: each patch has a foreground and a background.

    ``confidence`` (B, C, H, W), ``space`` (B, S, H, W), ``index`` (B, C, n) of ``draw_patches``.
    The foreground f of a patch is its mean of ``space`` weighted with confidence, its background g
    that weighted with 1 - confidence; both always exist, so no step is lost. A patch of mean
    confidence m counts by 4 m (1 - m), or the foreground would shrink to the darkest spots.
    """
    channels, tau = confidence.shape[1], settings.temperature
    attended = (confidence[:, :, None] * space[:, None]).flatten(1, 2)  # (B, C * S, H, W)
    inside = _patch_means(attended, settings)  # (B, C * S, P)
    inside = inside.view(len(index), channels, -1, inside.shape[-1])  # (B, C, S, P)
    outside = _patch_means(space, settings)[:, None] - inside  # (B, C, S, P)
    filled = _patch_means(confidence, settings)[:, :, None]  # (B, C, 1, P)
    f = _pick(inside / (filled + 1e-6), index)  # (C, N, S), N = B * n patches
    g = _pick(outside / (1 - filled + 1e-6), index)  # (C, N, S)
    m = _pick(filled, index)[..., 0]  # (C, N)
    weight = 4 * m * (1 - m) + 1e-6  # (C, N)
    ff, gg, fg = _distances(f, f), _distances(g, g), _distances(f, g)  # (C, N, N)
    weights = weight[:, None]  # (C, 1, N): of the patches that each is compared with
    pull_f, pull_g = _mean(ff, weights) / tau, _mean(gg, weights) / tau  # (C, N)
    loss = pull_f + _nearness(fg, weights, tau) + pull_g + _nearness(fg.mT, weights, tau)
    if channels > 1:
        own = _own(channels, f.shape[1])  # (C, 1, C * N)
        across = _distances(f, f.flatten(0, 1)).masked_fill(own, math.inf)  # (C, N, C * N)
        others = weight.flatten().masked_fill(own, 0)  # (C, 1, C * N)
        loss = loss + settings.inter_weight * (pull_f + _nearness(across, others, tau))
    apart = _mean(ff, weights).mean().item(), _mean(fg, weights).mean().item()
    return Contrast((weight * loss).mean(), *apart)


def contrast_patches(
    confidence: Tensor,
    stains: Tensor,
    index: Tensor,
    settings: PatchCLConfig,
    features: FeatureNetwork,
    generator: torch.Generator,
) -> Contrast | None:
    """The contrast of the paper as published: a coin decides whether a patch is positive.

    ``confidence`` (B, C, H, W), ``stains`` (B, 3, H, W), ``index`` (B, C, n) of ``draw_patches``.
    The coin shows positive with the patch's mean confidence. None where a channel has no positive
    or no negative patch: then there is nothing to contrast.
    """
    channels, side, tau = confidence.shape[1], settings.patch_px, settings.temperature
    chance = _pick(_patch_means(confidence.detach(), settings)[:, :, None], index)[..., 0]
    positive = torch.bernoulli(chance, generator=generator).bool()  # (C, N), N = B * n patches
    if not (positive.any(dim=1) & ~positive.all(dim=1)).all():
        return None

    cut = {"kernel_size": side, "stride": settings.stride_px}
    pixels = F.unfold(stains.clamp(0, 1), **cut)[:, None].expand(-1, channels, -1, -1)
    certain = F.unfold(confidence.flatten(0, 1)[:, None], **cut)  # (B * C, p * p, P)
    certain = _pick(certain.view(len(index), channels, *certain.shape[1:]), index)  # (C, N, p * p)
    patches = _pick(pixels, index).view(*positive.shape, 3, -1) * certain[:, :, None]
    represent, compare = MEASURES[settings.similarity]
    points = represent(patches.view(-1, 3, side, side), features)  # (C * N, ...)
    chosen = torch.multinomial(positive.float(), _ANCHORS, True, generator=generator)  # (C, A)
    chosen = chosen + positive.shape[1] * torch.arange(channels, device=device())[:, None]
    similar = compare(points[chosen.flatten()], points)  # (C * A, C * N)
    similar = similar.view(channels, _ANCHORS, -1)  # (C, A, C * N)
    own, taken = _own(channels, positive.shape[1]), positive.flatten()  # (C, 1, C * N), (C * N,)
    alike, unlike = _mean(similar, own & taken), _mean(similar, own & ~taken)  # (C, A)
    logits = similar / tau
    loss = logits.masked_fill(~own | taken, -math.inf).logsumexp(-1) - alike / tau  # (C, A)
    if channels > 1:
        others = logits.masked_fill(own | ~taken, -math.inf).logsumexp(-1)  # (C, A)
        loss = loss + settings.inter_weight * (others - alike / tau)
    return Contrast(loss.mean(), -alike.mean().item(), -unlike.mean().item())


def _grey_levels(patches: Tensor) -> Tensor:
    """How far each pixel is of each of 25 grey levels, smoothly: (N, 25, p * p)."""
    levels = torch.linspace(0, 1, 25, device=patches.device)[:, None]  # (25, 1)
    grey = patches.mean(dim=1).flatten(1)[:, None]  # (N, 1, p * p)
    return torch.softmax(-0.5 * ((grey - levels) / levels[1]) ** 2, dim=1)


def _cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    y = y.clamp(1e-6, 1 - 1e-6)
    return (x @ y.log2().T + (1 - x) @ (1 - y).log2().T) / x.shape[1]  # (A, K)


def _mutual_information(x: Tensor, y: Tensor) -> Tensor:
    joint = torch.einsum("aip,kjp->akij", x, y) / x.shape[-1] + 1e-9  # (A, K, 25, 25)
    independent = joint.sum(dim=3, keepdim=True) * joint.sum(dim=2, keepdim=True)
    return (joint * (joint / independent).log2()).sum(dim=(2, 3))  # (A, K), in bits


Measure = tuple[Callable[[Tensor, FeatureNetwork], Tensor], Callable[[Tensor, Tensor], Tensor]]
# The paper's: how patches (N, 3, p, p) are represented, and how similar two sets of these are.
MEASURES: dict[str, Measure] = {
    "mse": (lambda patches, _: patches.flatten(1), lambda x, y: -_distances(x, y)),
    "cross_entropy": (lambda patches, _: patches.flatten(1), _cross_entropy),
    "cosine": (lambda patches, f: F.normalize(f(patches.mean(1, True))), lambda x, y: x @ y.T),
    "mutual_information": (lambda patches, _: _grey_levels(patches), _mutual_information),
}


def _own(channels: int, patches: int) -> Tensor:
    """(C, 1, C * N): whether a patch, of all channels' patches, is of the channel itself."""
    return torch.eye(channels, device=device()).bool().repeat_interleave(patches, dim=1)[:, None]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared differences (..., N, M) of points (..., N, S) and (..., M, S)."""
    squares = x.square().mean(-1)[..., :, None] + y.square().mean(-1)[..., None, :]
    return (squares - 2 * x @ y.mT / x.shape[-1]).clamp_min(0)


def _mean(distances: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the last dimension."""
    return (distances * weights).sum(-1) / weights.sum(-1)


def _nearness(distances: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """Log of the weighted mean of exp(-distance / temperature), over the last dimension."""
    terms = weights.clamp_min(1e-12).log() - distances / temperature
    return terms.logsumexp(-1) - weights.sum(-1).log()


def _patch_means(maps: Tensor, settings: PatchCLConfig) -> Tensor:
    """Means (B, C, P) over the patches of maps (B, C, H, W), row by row."""
    return F.avg_pool2d(maps, settings.patch_px, settings.stride_px).flatten(2)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Of values (B, C, S, P) those of the patches ``index`` (B, C, n), as (C, B * n, S)."""
    drawn = values.gather(3, index[:, :, None].expand(-1, -1, values.shape[2], -1))  # (B, C, S, n)
    return drawn.permute(1, 0, 3, 2).flatten(1, 2)


def _blur(maps: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of maps (B, 1, H, W), mirrored at the border."""
    radius = min(math.ceil(3 * sigma_px), min(maps.shape[2:]) - 1)
    x = torch.arange(-radius, radius + 1, device=maps.device) / sigma_px
    taps = torch.softmax(-0.5 * x**2, dim=0)  # (2 * radius + 1,)
    maps = F.pad(maps, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(maps, taps[None, None, :, None]), taps[None, None, None])


def _batch(
    images: Images, scales: Sequence[StainScale], settings: PatchCLConfig, rng: np.random.Generator
) -> Tensor:
    """Scaled stains (B, 3, S, S) of random crops, turned and mirrored at random."""
    side = settings.crop_px
    crops = []
    for i in rng.integers(len(images), size=settings.batch):
        row, col = (int(rng.integers(max(0, size - side) + 1)) for size in images[i].shape[:2])
        crop = scales[i].apply(images[i][row : row + side, col : col + side])  # (<= S, <= S, 3)
        margins = [(0, side - crop.shape[0]), (0, side - crop.shape[1]), (0, 0)]
        crop = np.rot90(np.pad(crop, margins, mode="symmetric"), int(rng.integers(4)))  # (S, S, 3)
        crops.append(crop[:, ::-1] if rng.integers(2) else crop)
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def _judge(
    network: ConfidenceNetwork, images: Images, scales: Sequence[StainScale], config: Config
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Per channel: correlation of confidence with smoothed hematoxylin, and median |logit|."""
    folded = network.folded()
    judged = []
    for i in np.linspace(0, len(images) - 1, min(len(images), _JUDGES)).astype(int):
        stains = torch.from_numpy(scales[i].apply(images[i])).to(device())  # (H, W, 3)
        x = stains.permute(2, 0, 1)[None]  # (1, 3, H, W)
        with torch.inference_mode():
            confidence = folded(x)[0].flatten(1)  # (C, H * W)
            hematoxylin = _blur(x[:, :1], config.patchcl.blur_um / config.slide.mpp)
            rows = torch.cat([hematoxylin[0].flatten(1), confidence])  # (1 + C, H * W)
            logits = torch.logit(confidence, eps=1e-6).abs()  # (C, H * W)
            judged.append(torch.stack([rows.corrcoef()[0, 1:], logits.median(dim=1).values]))
    correlation, logit = torch.stack(judged).nanmean(dim=0).cpu().numpy()  # (C,) each
    return correlation, logit
