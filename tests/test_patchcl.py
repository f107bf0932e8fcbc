"""PatchCL on synthetic tissue: dark blue discs, the nuclei, on a pink and purple background."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from slides import crops_of

import patchcl_qupath
from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.errors import ConfigError, TrainingError
from patchcl_qupath.models.model import confidence
from patchcl_qupath.models.network import FeatureNetwork
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training import patchcl
from patchcl_qupath.training.contrast import (
    MEASURES,
    Contrast,
    blur,
    contrast_patches,
    contrast_prototypes,
    draw_patches,
)

PACKAGE = Path(patchcl_qupath.__file__).parent
PINK, PURPLE, NUCLEUS = (235, 170, 205), (165, 120, 185), (90, 60, 140)
SETTINGS = PatchCLConfig(crop_px=64, batch=4, max_steps=4, dilations=(1, 2))


def tissue(seed, side=160):
    """RGB (side, side, 3), and where its nuclei are (side, side)."""
    rng = np.random.default_rng(seed)
    rgb = np.full((side, side, 3), PINK, dtype=np.float64)
    rgb[:, side // 2 :] = PURPLE
    nuclei = np.zeros((side, side), dtype=bool)
    rows, cols = np.mgrid[:side, :side]
    for row, col in rng.integers(0, side, (side**2 // 500, 2)):
        nuclei |= (rows - row) ** 2 + 1.5 * (cols - col) ** 2 < rng.uniform(4, 7) ** 2
    rgb[nuclei] = NUCLEUS
    rgb = ndimage.gaussian_filter(rgb, (0.7, 0.7, 0)) + rng.normal(0, 5, rgb.shape)
    return np.clip(rgb, 0, 255).astype(np.uint8), nuclei


def config(**changes):
    return replace(Config(), patchcl=replace(SETTINGS, **changes))


def trained(settings, images=None, report=None):
    images = [tissue(seed)[0] for seed in range(3)] if images is None else images
    return patchcl.train(crops_of(images), settings, report)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small maps are not worth more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return trained(config(max_steps=150, dilations=(1, 2, 3)))


def test_nuclei_are_found_without_labels(model):
    rgb, nuclei = tissue(seed=9)
    found = confidence(model, rgb, StainNormaliser.fit([rgb])).nucleus > model.threshold
    for half in (np.s_[:, :80], np.s_[:, 80:]):  # on pink, and on purple
        both = np.count_nonzero(found[half] & nuclei[half])
        assert 2 * both / (found[half].sum() + nuclei[half].sum()) > 0.9


def test_the_training_is_logged(model):
    log = model.training
    assert log.steps == 150
    assert log.converged_at is None or log.converged_at <= 150
    assert len(log.channels.confidences) == 4
    assert (log.channels.chosen, log.channels.inverted) == (model.channel, model.inverted)
    assert log.skipped_steps == 0
    assert len(log.loss) == len(log.positive_positive) == len(log.positive_negative) == 150
    assert log.positive_negative[-1] > 3 * log.positive_positive[-1]
    assert len(log.hematoxylin_correlation) == 4
    chosen = log.hematoxylin_correlation[model.channel]
    assert abs(chosen) == max(map(abs, log.hematoxylin_correlation))
    assert model.inverted == (chosen < 0)


def test_typical_confidence_is_neither_all_nor_nothing(model):
    rgb, _ = tissue(seed=9)
    values = confidence(model, rgb, StainNormaliser.fit([rgb])).nucleus
    assert 0.7 < np.median(np.maximum(values, 1 - values)) < 0.95


def test_a_seed_repeats_a_training_and_leaves_other_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = trained(config(seed=7))
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert first.digest == trained(config(seed=7)).digest
    assert first.digest != trained(config(seed=8)).digest


@pytest.mark.parametrize("similarity", MEASURES)
def test_each_measure_of_the_paper_trains(similarity, monkeypatch):
    monkeypatch.setattr(patchcl, "_STARTS", 2)
    model = trained(config(similarity=similarity, patches=6, max_steps=3))
    assert model.training.skipped_steps + len(model.training.loss) == 3
    assert np.isfinite(model.training.loss).all()
    assert model.threshold == 0.5


@pytest.fixture
def starts(monkeypatch):
    """Few short starts, with a snapshot at each step."""
    for name, value in {"_STARTS": 3, "_TRIAL_STEPS": 2, "_KEPT_STARTS": 2}.items():
        monkeypatch.setattr(patchcl, name, value)
    monkeypatch.setattr(patchcl, "_SNAPSHOT_STEPS", 1)
    return config(similarity="mse", patches=20, max_steps=4)


def test_the_best_snapshot_of_several_starts_is_chosen_without_labels(starts, monkeypatch):
    scores = {  # start and step: the second start never gets better, the third gets worse again
        (0, 1): 0.1,
        (0, 2): 0.3,
        (0, 3): 0.2,
        (0, 4): 0.4,
        (1, 1): 0.1,
        (1, 2): 0.1,
        (2, 1): 0.2,
        (2, 2): 0.25,
        (2, 3): -0.9,
        (2, 4): 0.3,
    }
    trial = [(start, step) for start in range(3) for step in (1, 2)]
    order, networks = iter([*trial, (0, 3), (0, 4), (2, 3), (2, 4)]), {}

    def score(network, crops, settings):
        at = next(order)
        networks[at] = [weights.detach().clone() for weights in network.parameters()]
        return np.array([0.05, -0.05, scores[at], 0.0], np.float32)

    monkeypatch.setattr(patchcl, "mask_correlations", score)
    watched, counts = [], []
    crops = crops_of([tissue(seed)[0] for seed in range(3)])
    model = patchcl.train(crops, starts, lambda *steps: counts.append(steps), watched.append)
    assert [(each.start, each.step) for each in watched] == [*networks]
    assert counts == [(step, 10) for step in range(1, 11)]
    assert (model.channel, model.inverted) == (2, True)
    assert model.training.steps == 3
    assert len(model.training.loss) + model.training.skipped_steps == 3
    first, same = next(model.network.parameters()), networks[2, 3][0]
    torch.testing.assert_close(first, same, rtol=0, atol=0)


def test_starts_differ_and_the_first_is_that_of_the_seed(starts):
    watched = []
    crops = crops_of([tissue(seed)[0] for seed in range(3)])
    patchcl.train(crops, starts, watch=watched.append)
    assert len(watched) == 10
    steps = patchcl._steps(crops, starts, starts.patchcl.seed)
    next(steps)
    expected = next(next(steps).network.parameters())
    found = {(each.start, each.step): next(each.network.parameters()) for each in watched}
    torch.testing.assert_close(found[0, 2], expected, rtol=0, atol=0)
    assert not torch.equal(found[1, 2], expected)


class Fixed(torch.nn.Module):
    """In place of a network: nuclei, all else, nothing, and the nuclei of the right half."""

    def forward(self, x):
        dark = (x[:, 1:2] < 0.35).float()  # nuclei have the least green
        half = torch.where(torch.arange(x.shape[3]) < 80, 0.0, dark)
        return torch.cat([dark, 1 - dark, torch.zeros_like(dark), half], dim=1)


def test_a_mask_is_scored_by_the_hematoxylin_that_it_explains():
    images = [tissue(seed)[0] for seed in range(2)]
    published = replace(Config(), patchcl=PatchCLConfig.paper())
    nuclei, others, nothing, half = patchcl.mask_correlations(Fixed(), crops_of(images), published)
    assert nuclei > 0.7
    assert others == pytest.approx(-nuclei)
    assert nothing == 0
    assert 0.2 < half < nuclei - 0.1


def test_blank_images_are_an_error_with_the_settings_of_the_paper(starts):
    blank = [np.full((100, 100, 3), 240, dtype=np.uint8)]
    with pytest.raises(TrainingError, match="blank"):
        trained(starts, blank)


def test_paper_settings():
    settings = PatchCLConfig.paper("cosine", seed=3)
    assert (settings.similarity, settings.patch_px, settings.crop_px) == ("cosine", 50, 300)
    assert settings.seed == 3


@pytest.mark.parametrize(
    "wrong", [{"similarity": "mes"}, {"patch_px": 8}, {"patch_px": 100, "crop_px": 90}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"patchcl\."):
        PatchCLConfig(**wrong)


def test_progress_is_reported_up_to_the_end():
    seen = []
    trained(config(), report=lambda step, last: seen.append((step, last)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_training_ends_once_converged(monkeypatch):
    monkeypatch.setattr(patchcl, "has_converged", lambda log, patience: len(log) >= 2)
    seen = []
    model = trained(
        config(max_steps=50, cooldown_steps=3), report=lambda *steps: seen.append(steps)
    )
    assert (model.training.converged_at, model.training.steps) == (2, 5)
    assert seen[-1] == (5, 5)


def test_convergence_is_a_gap_that_no_longer_widens():
    def log(gaps):
        return [Contrast(torch.zeros(()), 0.1, 0.1 + gap) for gap in gaps]

    assert not patchcl.has_converged(log([1.0] * 9), patience=5)  # too early to say
    assert patchcl.has_converged(log([1.0] * 10), patience=5)
    assert not patchcl.has_converged(log([1.0] * 5 + [1.1] * 5), patience=5)
    assert patchcl.has_converged(log([0.5] * 9 + [1.0] * 5 + [1.01] * 5), patience=5)


def test_small_images_are_mirrored_and_tiny_ones_left_out():
    images = [tissue(1, side=40)[0], tissue(2)[0][:30], tissue(3)[0][:16, :16]]
    assert trained(config(), images).training.steps == 4


def test_nothing_but_tiny_images_is_an_error():
    with pytest.raises(TrainingError, match="no image is 12 µm wide"):
        trained(config(), [tissue(3)[0][:16, :16]])


def test_blank_images_are_an_error():
    with pytest.raises(TrainingError, match="blank"):
        trained(config(), [np.full((100, 100, 3), 240, dtype=np.uint8)])


def test_a_training_that_diverges_is_an_error():
    with pytest.raises(TrainingError, match=r"diverged.*lower patchcl\.learning_rate"):
        trained(config(learning_rate=1e30))


def test_a_map_that_is_the_same_everywhere_is_not_chosen(monkeypatch):
    """It has no correlation with hematoxylin, which no other map must lose for."""
    scores = np.array([-0.4, np.nan, 0.2, 0.1], np.float32), np.ones(4, np.float32)
    monkeypatch.setattr(patchcl, "_channel_scores", lambda *_: scores)
    model = trained(config(max_steps=1))
    assert (model.channel, model.inverted) == (0, True)
    assert model.training.hematoxylin_correlation == [-0.4, 0, 0.2, 0.1]


def test_sampler_prefers_patches_of_low_entropy():
    uncertain = torch.full((1, 2, 64, 64), 0.5)
    uncertain[..., :24, :24] = 0.01  # exactly the first patch of the grid
    index = draw_patches(
        uncertain, replace(SETTINGS, patches=2000), torch.Generator().manual_seed(0)
    )
    assert index.shape == (1, 2, 2000)
    frequency = np.bincount(index[0, 1], minlength=36) / 2000
    expected = torch.stack([*map(_certainty, uncertain[0, 1].unfold(0, 24, 8).unfold(1, 24, 8))])
    np.testing.assert_allclose(frequency, expected.flatten() / expected.sum(), atol=0.03)


def _certainty(row_of_patches):
    a = row_of_patches  # (6, 24, 24)
    entropy = -(a * a.log2() + (1 - a) * (1 - a).log2())
    return (1 - entropy.mean((1, 2))).clamp_min(1e-3)


def maps(channels=2):
    generator = torch.Generator().manual_seed(0)
    uncertain = torch.rand(2, channels, 64, 64, generator=generator)
    stains = torch.rand(2, 3, 64, 64, generator=generator)
    index = torch.randint(36, (2, channels, 5), generator=generator)
    return uncertain, stains, index, generator


def test_prototype_contrast_is_the_formula_term_by_term():
    uncertain, stains, index, _ = maps()
    space, tau = stains[:, :2], SETTINGS.temperature
    found = contrast_prototypes(uncertain, space, index, SETTINGS)

    def points(channel):
        """Foreground, background and weight of each patch drawn, one after the other."""
        for b in range(2):
            for p in index[b, channel].tolist():
                at = np.s_[p // 6 * 8 : p // 6 * 8 + 24, p % 6 * 8 : p % 6 * 8 + 24]
                a, s = uncertain[b, channel][at], space[b][:, *at]
                f = (a * s).sum((1, 2)) / a.sum()
                g = ((1 - a) * s).sum((1, 2)) / (1 - a).sum()
                yield f, g, 4 * a.mean() * (1 - a.mean())

    patches = [list(points(0)), list(points(1))]
    distance = F.mse_loss
    terms = []
    for c in range(2):
        total = sum(w for _, _, w in patches[c])
        others = sum(w for _, _, w in patches[1 - c])
        for f, g, weight in patches[c]:
            pull_f = sum(w * distance(f, fj) for fj, _, w in patches[c]) / total / tau
            pull_g = sum(w * distance(g, gj) for _, gj, w in patches[c]) / total / tau
            push_f = sum(w * (-distance(f, gk) / tau).exp() for _, gk, w in patches[c]) / total
            push_g = sum(w * (-distance(g, fk) / tau).exp() for fk, _, w in patches[c]) / total
            away = sum(w * (-distance(f, fk) / tau).exp() for fk, _, w in patches[1 - c]) / others
            loss = 2 * pull_f + push_f.log() + pull_g + push_g.log() + away.log()
            terms.append(weight * loss)
    torch.testing.assert_close(found.loss, torch.stack(terms).mean(), rtol=1e-3, atol=1e-6)


def test_a_blur_of_0_blurs_nothing() -> None:
    maps = torch.rand(2, 1, 8, 8)
    assert torch.equal(blur(maps, 0.0), maps)
    torch.testing.assert_close(blur(maps, 0.05), maps)
    assert not torch.allclose(blur(maps, 1.0), maps)


def test_published_contrast_is_small_where_positives_are_similar():
    _, stains, index, generator = maps()
    settings = replace(SETTINGS, similarity="mse", inter_weight=0.0)
    nuclei = torch.zeros(2, 2, 64, 64)
    nuclei[..., :32] = 1  # left: confident; right: not
    ordered = torch.where(nuclei[:, :1].bool(), torch.full_like(stains, 0.9), stains)

    def loss(seen):
        features = FeatureNetwork(24)
        contrast = contrast_patches(nuclei, seen, index, settings, features, generator)
        assert contrast is not None
        return contrast

    alike, unlike = loss(ordered), loss(stains)
    assert alike.positive_positive < unlike.positive_positive
    assert alike.positive_negative > alike.positive_positive


def test_nothing_to_contrast_without_a_negative_patch():
    uncertain, stains, index, generator = maps()
    settings = replace(SETTINGS, similarity="mse")
    positive = torch.ones_like(uncertain)
    assert (
        contrast_patches(positive, stains, index, settings, FeatureNetwork(24), generator) is None
    )


@pytest.mark.parametrize("similarity", MEASURES)
def test_a_patch_is_most_similar_to_itself(similarity):
    represent, compare = MEASURES[similarity]
    patches = torch.rand(6, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    patches = patches * (patches > 0.5)  # entropy of a grey level differs, as in tissue
    points = represent(patches, FeatureNetwork(24).eval())
    similarity_of = compare(points[:3], points)  # (3, 6)
    assert similarity_of.shape == (3, 6)
    assert similarity_of.argmax(dim=1).tolist() == [0, 1, 2]


def executed(tree):
    """The nodes of a module, but for what type checkers alone read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from executed(node)


def reachable(module):
    """All modules of the package that a module imports, itself or by others, wherever in a file."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = PACKAGE.parent.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in found or not path.is_file():  # a name in a module is not a module
            continue
        found.add(name)
        waiting.append(name.rpartition(".")[0])  # a package is imported before its modules
        for node in executed(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, "imports are absolute"
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                if node.module == "patchcl_qupath":  # whose functions are those of the library
                    lazy = {alias.name for alias in node.names} & {*patchcl_qupath.__all__}
                    waiting += ["patchcl_qupath.library"] if lazy else []
    return found


def read_labels(modules):
    """Those of the modules that read labels that people made, or ground truth."""
    folders = ("project", "correction", "evaluation")
    return {name for name in modules if name.split(".")[1:2] and name.split(".")[1] in folders}


@pytest.mark.parametrize("module", ["patchcl", "contrast", "pseudo_labels", "selftrain"])
def test_no_label_can_reach_label_free_training(module):
    modules = reachable(f"patchcl_qupath.training.{module}")
    assert "patchcl_qupath.config" in modules
    assert not read_labels(modules)
    assert "patchcl_qupath.library" not in modules


def test_labels_that_reach_training_would_be_found():
    modules = reachable("patchcl_qupath.pipeline")  # which refines models
    assert {"patchcl_qupath.correction.labels", "patchcl_qupath.project.drawn"} <= read_labels(
        modules
    )
