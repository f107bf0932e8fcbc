import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from patchcl_qupath.config import Config, PatchCLConfig, SelfTrainConfig
from patchcl_qupath.errors import ModelError, StorageError
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import (
    ConfidenceNetwork,
    ConvBlock,
    FeatureNetwork,
    NucleusNetwork,
    UpBlock,
    folded,
)
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.records import CDCLLog, to_plain, training_log

DEFAULT = PatchCLConfig()
NORMALISER = StainNormaliser((0.0, 0.0, 0.0), (2.0, 1.0, 1.0))


def count(network):
    return sum(weights.numel() for weights in network.parameters())


def untrained(kind="patchcl", config=DEFAULT):
    if kind == "nucleus":
        return NucleusNetwork(SelfTrainConfig().widths)
    return ConfidenceNetwork.of(config)


def random_network(kind="patchcl", config=DEFAULT):
    """Weights and batch norms of a network that has seen something."""
    generator = torch.Generator().manual_seed(1)
    network = untrained(kind, config)
    for name, values in network.state_dict().items():
        if values.is_floating_point():
            noise = torch.rand(values.shape, generator=generator)
            positive = "norm" in name and ("weight" in name or "var" in name)
            values.copy_(noise + 0.5 if positive else noise - 0.5)
    return network.eval()


def random_model(kind="patchcl", **changes):
    model = Model(
        network=random_network(kind), config=Config(), channel=2 if kind == "patchcl" else 0
    )
    return replace(model, **changes)


def patchcl_log(**changes):
    """The log of a training of one step."""
    plain = {
        "steps": 1,
        "skipped_steps": 0,
        "converged_at": None,
        "hematoxylin_correlation": [0.5],
        "loss": [1.0],
        "positive_positive": [0.1],
        "positive_negative": [0.2],
        "channels": {"crop": "", "confidences": [""], "chosen": 0, "inverted": False},
    }
    return training_log(plain | changes)


def selftraining_log(**changes):
    """The log of a training of one step after PatchCL's."""
    plain = {
        "patchcl": to_plain(patchcl_log()),
        "sure_nucleus": 0.1,
        "known": 0.8,
        "loss": [1.0],
        "seconds": 1.5,
        "seconds_for_batches": 0.5,
    }
    return training_log(plain | changes)


def random_rgb(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_networks_are_of_the_size_of_the_paper():
    assert count(ConfidenceNetwork.of(PatchCLConfig())) == 7_372
    assert count(FeatureNetwork(50)) == 3_386  # together the 10.8k of the paper


@pytest.mark.parametrize("patch_px", [16, 24, 50, 51])
def test_feature_network_takes_patches_of_the_size_it_was_made_for(patch_px):
    assert FeatureNetwork(patch_px)(torch.rand(3, 1, patch_px, patch_px)).shape == (3, 32)


def test_network_sees_83_px_and_no_farther():
    network = random_network().double()
    assert network.receptive_radius_px == 83
    centre = 100
    x = torch.zeros(1, 3, 2 * centre + 1, 2 * centre + 1, dtype=torch.float64)
    x[..., centre, centre] = 1
    with torch.inference_mode():
        touched = (network(x) != network(torch.zeros_like(x))).any(dim=1)[0]  # (H, W)
    rows, cols = np.nonzero(touched.numpy())
    assert np.abs(rows - centre).max() == np.abs(cols - centre).max() == 83


def test_nucleus_network_has_its_size_and_receptive_radius():
    """Wherever in its block of 4 a pixel lies, only pixels within the radius influence it."""
    network = random_network("nucleus").double()
    assert count(network) == 62_002
    farthest = 0
    for row in range(100, 104):
        x = torch.rand(1, 3, 200, 8, dtype=torch.float64)
        other = x.clone()
        other[:, :, row] += 10
        with torch.inference_mode():
            touched = (network(x) != network(other)).any(dim=1)[0].any(dim=1)  # (200,)
        farthest = max(farthest, int((touched.nonzero() - row).abs().max()))
    assert network.receptive_radius_px - 3 <= farthest <= network.receptive_radius_px


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_folded_network_computes_the_same(kind):
    network = random_network(kind).double()
    x = torch.rand(2, 3, 60, 72, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(folded(network)(x), network(x))


def test_nucleus_network_finds_nuclei_and_cores_in_images_of_any_size():
    model = random_model("nucleus")
    for shape in ((50, 41), (1, 3), (64, 64)):
        found = confidence(model, random_rgb(*shape), NORMALISER)
        assert found.nucleus.shape == found.core.shape == shape
        assert (found.nucleus != found.core).any()
    assert confidence(random_model(), random_rgb(9, 9), NORMALISER).core is None


def test_confidence_is_the_chosen_channel_in_255_steps():
    model = random_model()
    rgb = random_rgb(50, 40)
    x = torch.from_numpy(NORMALISER.apply(rgb)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = model.network(x)[0, 2].numpy()

    found = confidence(model, rgb, NORMALISER).nucleus
    assert found.shape == (50, 40)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-4
    assert np.abs(found * 255 - np.round(found * 255)).max() < 1e-4
    assert (
        np.abs(confidence(random_model(inverted=True), rgb, NORMALISER).nucleus - (1 - found)).max()
        <= 0.005
    )


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_confidence_of_a_tile_is_that_of_the_whole(kind):
    model = random_model(kind)
    whole = random_rgb(300, 258)
    everything = confidence(model, whole, NORMALISER)
    for rows, cols in ((slice(20, 280), slice(8, 220)), (slice(100, 300), slice(40, 258))):
        tile = confidence(model, whole[rows, cols], NORMALISER)
        radius = model.receptive_radius_px
        inner = np.s_[
            radius : None if rows.stop == 300 else -radius,
            radius : None if cols.stop == 258 else -radius,
        ]
        for found, expected in zip(tile, everything, strict=True):
            if found is None:
                assert kind == "patchcl"
                continue
            found, expected = found[inner], expected[rows, cols][inner]
            assert found.size > 1000
            assert (found != expected).mean() < 1e-3  # between two steps it may go either way
            assert np.abs(found - expected).max() < 1.01 / 255


def test_saved_nucleus_network_is_loaded_whole(tmp_path):
    model = random_model("nucleus")
    loaded = Model.load(model.save(tmp_path, "mine"))
    assert (loaded.digest, loaded.receptive_radius_px, loaded.divisor) == (model.digest, 23, 4)
    rgb = random_rgb(30, 30)
    np.testing.assert_array_equal(
        confidence(loaded, rgb, NORMALISER).core, confidence(model, rgb, NORMALISER).core
    )


def test_saved_model_is_loaded_whole(tmp_path):
    config = replace(Config(), patchcl=PatchCLConfig(channels=2, dilations=(1, 4)))
    model = Model(
        network=random_network(config=config.patchcl),
        config=config,
        channel=1,
        inverted=True,
        threshold=0.25,
        training=patchcl_log(loss=[1.0, 0.5]),
    )
    path = model.save(tmp_path / "models", "mine")
    loaded = Model.load(path)
    assert path == tmp_path / "models" / "mine.pt"
    assert loaded.config == config
    assert (loaded.channel, loaded.inverted, loaded.threshold) == (1, True, 0.25)
    assert loaded.training == model.training
    assert (loaded.mpp, loaded.receptive_radius_px, loaded.digest) == (0.5, 11, model.digest)
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["digest"] == model.digest
    assert written["training"]["loss"] == [1.0, 0.5]
    rgb = random_rgb(30, 30)
    np.testing.assert_array_equal(
        confidence(loaded, rgb, NORMALISER).nucleus, confidence(model, rgb, NORMALISER).nucleus
    )


def test_training_logs_are_kept_under_their_names_of_version_0_1(tmp_path):
    log = selftraining_log(cdcl=[{"labelled": 1.0}], refined_from="abc")
    assert isinstance(log, CDCLLog)
    model = random_model("nucleus", training=log)
    path = model.save(tmp_path, "mine")
    assert Model.load(path).training == log
    names = list(json.loads(path.with_suffix(".json").read_text())["training"])
    assert names == [
        *("patchcl", "sure_nucleus", "known", "loss", "seconds", "seconds_for_batches"),
        *("unlabelled_cdcl", "cdcl", "distillation", "refined_from"),
    ]
    assert Model.load(random_model().save(tmp_path, "without")).training is None


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("patchcl", "2bb8a61b5eda909bf5a7e2b1dfc5f6d4ebfebcd147c3a422ade02a9d601d89c6"),
        ("nucleus", "84ccc1916473e0597b76aab741efa1433664ebb26d331863ac3607c749e379e9"),
    ],
)
def test_digests_are_those_of_version_0_1(kind, digest):
    """A run that was stopped resumes only if the model has the digest that it had then."""
    model = random_model(kind, threshold=0.25, inverted=True, channel=1)
    assert model.digest == digest


def test_pickled_model_is_the_same_model():
    model = random_model()
    rgb = random_rgb(30, 30)
    expected = confidence(model, rgb, NORMALISER).nucleus
    copy = pickle.loads(pickle.dumps(model))
    assert copy.digest == model.digest
    np.testing.assert_array_equal(confidence(copy, rgb, NORMALISER).nucleus, expected)


def test_digest_is_that_of_weights_and_choices():
    model = random_model()
    assert model.digest == random_model().digest
    other = random_network()
    with torch.no_grad():
        other.last.bias[0] += 1e-6
    others = [
        random_model(network=other),
        random_model(channel=1),
        random_model(inverted=True),
        random_model(threshold=0.4),
    ]
    assert len({model.digest, *(m.digest for m in others)}) == 5


class Hostile:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a model file was executed')",))


def damaged(path):
    content = bytearray(path.read_bytes())
    middle = content.index(b"weights") // 2 + len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)


def rewritten(**changes):
    def rewrite(path):
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return rewrite


UNUSABLE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a model"),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-5000]),
    "damaged": damaged,
    "hostile": lambda path: path.write_bytes(pickle.dumps(Hostile())),
    "hostile in torch's own format": lambda path: torch.save(Hostile(), path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "another format": rewritten(format="patchcl-qupath model 99"),
    "another architecture": rewritten(weights=ConfidenceNetwork(4, 16, (1, 2)).state_dict()),
    "absurdly large": rewritten(config={"patchcl": {"width": 10**9}}),
    "settings of another version": rewritten(config={"patchcl": {"depth": 3}}),
    "another channel": rewritten(channel=1),
}


@pytest.mark.parametrize("spoil", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_model_says_what_to_do(tmp_path, spoil):
    path = random_model().save(tmp_path, "mine")
    spoil(path)
    with pytest.raises(ModelError, match=r"mine\.pt .*patchcl-qp train"):
        Model.load(path)


def test_failed_save_leaves_nothing(tmp_path):
    (tmp_path / "mine.pt").mkdir()
    (tmp_path / "mine.pt" / "occupied").touch()
    with pytest.raises(StorageError):
        random_model().save(tmp_path, "mine")
    assert {p.name for p in tmp_path.iterdir()} <= {"mine.pt", "mine.json"}


def test_a_block_of_coarse_and_fine_maps_convolves_them_side_by_side():
    random = torch.Generator().manual_seed(1)
    block = UpBlock(3, 4, 5).double()
    coarse = torch.randn(2, 3, 5, 6, generator=random, dtype=torch.float64)
    fine = torch.randn(2, 4, 10, 12, generator=random, dtype=torch.float64)
    wanted = torch.randn(2, 5, 10, 12, generator=random, dtype=torch.float64)
    found = []
    for as_one in (False, True):
        block.as_one = as_one
        ends = [end.clone().requires_grad_() for end in (coarse, fine)]
        y = block(*ends)
        found.append([y, *torch.autograd.grad((y * wanted).sum(), [*ends, block.conv.weight])])
    doubled = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    sums = F.conv2d(torch.cat([doubled, fine], dim=1), block.conv.weight, padding=1)
    torch.testing.assert_close(found[0][0], F.relu(block.norm(sums)))
    torch.testing.assert_close(*found)


def test_few_maps_are_normalised_side_by_side_as_they_are_alone():
    """On a CPU, in training: each set of columns by itself, which hardly differ."""
    torch.manual_seed(0)
    block, x = ConvBlock(3, 8).train(), torch.randn(4, 3, 64, 64)
    x = (x + 0.3).contiguous(memory_format=torch.channels_last)
    y = block.conv(x)
    alone = F.elu(F.batch_norm(y, None, None, block.norm.weight, block.norm.bias, training=True))
    found = block(x)
    assert found.shape == alone.shape
    assert 0 < (found - alone).abs().max() < 0.2
    assert (found - alone).abs().mean() < 0.02
    mean, var = block.norm.running_mean / 0.1, 1 + (block.norm.running_var - 1) / 0.1
    torch.testing.assert_close(mean, y.mean(dim=(0, 2, 3)), rtol=0, atol=1e-4)
    torch.testing.assert_close(var, y.var(dim=(0, 2, 3)), rtol=0.01, atol=0)
    assert block.norm.num_batches_tracked == 1
    wanted = torch.randn(found.shape)
    gradients = [
        torch.autograd.grad((y * wanted).sum(), block.conv.weight)[0] for y in (found, alone)
    ]
    assert (gradients[0] - gradients[1]).norm() < 0.1 * gradients[1].norm()


def test_maps_that_do_not_fall_into_sets_of_columns_are_normalised_alone():
    block, x = ConvBlock(3, 8).train(), torch.randn(2, 3, 12, 12)
    y = block.conv(x)
    alone = F.batch_norm(y, None, None, block.norm.weight, block.norm.bias, training=True)
    torch.testing.assert_close(block(x), F.elu(alone))
