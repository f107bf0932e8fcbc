import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_network import NORMALISER, random_model, random_network, random_rgb, untrained

from patchcl_qupath.errors import ConfigError
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import confidence
from patchcl_qupath.models.network import ConvBlock, NucleusNetwork, device, folded
from patchcl_qupath.models.openvino_model import openvino_model

TORCH, FLOAT32, BFLOAT16, INT8, CUDA_FLOAT16 = EngineKind


@pytest.fixture(params=EngineKind)
def engine(request):
    """Each engine that this machine has."""
    if request.param.is_openvino:
        pytest.importorskip("openvino")
    if request.param == BFLOAT16 and not engines.multiplies_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16")
    if request.param == INT8 and not engines.multiplies_int8():
        pytest.skip("this CPU does not multiply integers of 8 bits fast")
    if request.param == CUDA_FLOAT16 and device().type == "cpu":
        pytest.skip("there is no GPU")
    return request.param


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_openvino_computes_what_torch_does(kind):
    pytest.importorskip("openvino")
    stains = NORMALISER.apply(random_rgb(64, 48))
    expected = engines.start(TORCH, random_network(kind))(stains)
    found = engines.start(FLOAT32, random_network(kind))(stains)
    assert found.shape == (4 if kind == "patchcl" else 2, 64, 48)
    assert expected.std() > 0.1
    assert np.abs(found - expected).max() < 1e-3  # random weights exaggerate


def test_openvino_reports_its_use_to_nobody():
    """Its import would start a process, which tells a web service of it."""
    pytest.importorskip("openvino")
    code = "import sys\nfrom patchcl_qupath.models import engines\n"
    code += "from patchcl_qupath.models.network import NucleusNetwork\n"
    code += "print(engines.choose('openvino', NucleusNetwork))\n"
    code += "print([name for name in sys.modules if 'openvino_telemetry' in name])\n"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert shown.splitlines()[1:] == ["[]"]


def test_threads_may_load_openvino_at_once():
    pytest.importorskip("openvino")
    code = """if True:
        import threading
        from concurrent.futures import ThreadPoolExecutor
        from patchcl_qupath.models import engines
        together = threading.Barrier(8)
        def choose(_):
            together.wait()
            return engines.multiplies_bfloat16()
        with ThreadPoolExecutor(8) as threads:
            print(len(set(threads.map(choose, range(8)))))
    """
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"


class _Changed(NucleusNetwork):
    """A network whose last step is a function of the test's choice."""

    def __init__(self, step):
        super().__init__((4, 6, 8))
        self.step = step

    def probabilities(self, x):
        return self.step(self(x))


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (torch.sigmoid, None),
        (torch.exp, (NotImplementedError, "exp")),
        (lambda x: x.tanh(), (NotImplementedError, "tanh")),
        (lambda x: F.interpolate(x, scale_factor=2), (NotImplementedError, "interpolate")),
        (lambda x: F.elu(x, alpha=2.0), (TypeError, "alpha")),
        (lambda x: F.max_pool2d(x, 2, padding=1), (TypeError, "padding")),
    ],
    ids=["sigmoid", "function", "method", "interpolation", "alpha", "padding"],
)
def test_an_operation_that_openvino_is_not_told_of_is_refused_by_name(step, error):
    pytest.importorskip("openvino")
    network = folded(_Changed(step))
    if error is None:
        openvino_model(network)
        return
    with pytest.raises(error[0], match=error[1]):
        openvino_model(network)


def test_8_bits_change_little_of_what_torch_computes():
    pytest.importorskip("openvino")
    if not engines.multiplies_int8():
        pytest.skip("this CPU does not multiply integers of 8 bits fast")
    stains = NORMALISER.apply(random_rgb(64, 48))
    network = random_network("nucleus").train()
    with torch.no_grad():
        for _ in range(100):  # until the batch norms know the maps
            network(torch.from_numpy(stains).permute(2, 0, 1)[None])
    network.eval()
    expected, found = (engines.start(kind, network)(stains) for kind in (TORCH, INT8))
    assert expected.std() > 0.1
    assert 0 < np.abs(found - expected).mean() < 0.02  # random weights exaggerate


def test_two_products_of_8_bits_do_not_exceed_16():
    """CPUs without VNNI add them up in 16 bits, and keep the largest such number if they do."""
    pytest.importorskip("openvino")
    model = openvino_model(folded(random_network("nucleus")), in_int8=True)
    weights = 0
    for node in model.get_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        rounded, highest = (node.input_value(i).get_node() for i in (0, 2))
        if rounded.get_type_name() == "Constant":
            weights += 1
            steps = np.rint(rounded.data / (highest.data / 127))
            assert np.abs(steps).max() == 64
            assert 2 * 255 * np.abs(steps).max() < 2**15
    assert weights == 13  # ten blocks, two of which have two kinds of maps, and the last


def test_8_bits_are_fast_on_cpus_of_x86_with_avx2(monkeypatch):
    for capability, is_fast in (("AVX2", True), ("AVX512", True), ("DEFAULT", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        assert engines.multiplies_int8() is is_fast


def test_a_block_knows_how_large_its_values_are_by_its_batch_norm():
    block = ConvBlock(1, 2)
    block.norm.weight.data = torch.tensor([1.0, -2.0])
    block.norm.bias.data = torch.tensor([3.0, -1.0])
    block.eval().fold()
    assert block.largest == -1 + 8 * 2  # of the map with the larger spread


def test_8_bits_are_chosen_where_cpu_and_network_do_them(monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(engines, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(engines, "multiplies_int8", lambda: True)
    assert engines.choose("auto", NucleusNetwork) is INT8
    assert engines.choose("auto", untrained("nucleus")) is INT8
    assert engines.choose("auto", untrained("patchcl")) in (FLOAT32, BFLOAT16)
    assert engines.choose("openvino", NucleusNetwork) in (FLOAT32, BFLOAT16)
    monkeypatch.setattr(engines, "multiplies_int8", lambda: False)
    assert engines.choose("auto", NucleusNetwork) in (FLOAT32, BFLOAT16)
    with pytest.raises(ConfigError, match="use --engine openvino"):
        engines.start(INT8, untrained("nucleus"))  # another machine chose it


def is_done_by(kind, engine):
    """Whether an engine runs a kind of network, with the same results in each tile."""
    if engine is INT8:
        return untrained(kind).input_range is not None
    # How seldom torch rounds the other way, test_network.py says.
    return (kind, engine, device().type) != ("patchcl", TORCH, "cpu")


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_a_tile_has_the_same_confidence_as_the_whole_to_the_bit(kind, engine):
    if not is_done_by(kind, engine):
        pytest.skip("in 8 bits this network is not run; in torch it may round the other way")
    model = random_model(kind)
    whole = random_rgb(300, 258)
    everything = confidence(model, whole, NORMALISER, engine).nucleus
    radius = model.receptive_radius_px
    for rows, cols in ((slice(0, 280), slice(8, 220)), (slice(100, 300), slice(40, 258))):
        tile = confidence(model, whole[rows, cols], NORMALISER, engine).nucleus
        inner = np.s_[
            rows.start and radius : -radius if rows.stop < 300 else None,
            cols.start and radius : -radius if cols.stop < 258 else None,
        ]
        np.testing.assert_array_equal(tile[inner], everything[rows, cols][inner])


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_bands_have_the_same_confidence_as_the_whole_to_the_bit(kind, engine, monkeypatch):
    if not is_done_by(kind, engine):
        pytest.skip("in 8 bits this network is not run; in torch it may round the other way")
    model, whole = random_model(kind), random_rgb(301, 90)
    at_once = confidence(model, whole, NORMALISER, engine)
    heights = []
    started = engines.of(engine, model.network, model.digest)

    def run(pixels):
        heights.append(len(pixels))
        return started(pixels)

    monkeypatch.setattr(engines, "of", lambda *_: run)
    monkeypatch.setattr("patchcl_qupath.models.model._BAND_PX", 7000)
    in_bands = confidence(model, whole, NORMALISER, engine)
    assert len(heights) == 4
    assert max(heights) < 80 + 2 * (model.receptive_radius_px + model.divisor)
    np.testing.assert_array_equal(in_bands.nucleus, at_once.nucleus)
    if kind == "nucleus":
        np.testing.assert_array_equal(in_bands.core, at_once.core)


def test_an_engine_is_chosen_by_what_there_is(monkeypatch):
    pytest.importorskip("openvino")
    assert engines.choose("torch", NucleusNetwork) is TORCH
    assert engines.choose("openvino", NucleusNetwork) in (FLOAT32, BFLOAT16)
    monkeypatch.setitem(sys.modules, "openvino", None)  # as if it were not installed
    assert engines.choose("auto", NucleusNetwork) is (
        TORCH if device().type == "cpu" else CUDA_FLOAT16
    )
    with pytest.raises(ConfigError, match="pip install openvino"):
        engines.choose("openvino", NucleusNetwork)
    with pytest.raises(ConfigError, match="install it on all workers"):
        engines.start(FLOAT32, random_network())


def test_openvino_that_cannot_be_loaded_is_as_if_it_were_not_installed(monkeypatch, caplog):
    """A library that it needs is absent, or the system is too old."""
    pytest.importorskip("openvino")

    def fail():
        raise ImportError("libopenvino.so: cannot open shared object file")

    monkeypatch.setattr("patchcl_qupath.models.openvino_model.load_openvino", fail)
    monkeypatch.setattr(engines, "device", lambda: torch.device("cpu"))
    assert engines.choose("auto", NucleusNetwork) is TORCH
    assert "libopenvino.so" in caplog.text
    assert not engines.multiplies_bfloat16.__wrapped__()
    with pytest.raises(ConfigError, match="pip install openvino"):
        engines.choose("openvino", NucleusNetwork)
    with pytest.raises(ConfigError, match="install it on all workers"):
        engines.check_installed(FLOAT32)


def test_a_machine_that_does_not_multiply_bfloat16_is_refused(monkeypatch):
    """A worker whose CPU is older than that of the machine that began the run."""
    pytest.importorskip("openvino")
    message = "does not compute in bfloat16, as others do: use --engine torch"
    monkeypatch.setattr(engines, "multiplies_bfloat16", lambda: True)
    engines.check_installed(BFLOAT16)
    monkeypatch.setattr(engines, "multiplies_bfloat16", lambda: False)
    engines.check_installed(FLOAT32)
    with pytest.raises(ConfigError, match=message):
        engines.start(BFLOAT16, random_network())


def test_kinds_of_engine_are_named_as_in_version_0_1():
    """A run that was stopped resumes only if its engine has the name that it had then."""
    names = ["torch", "openvino float32", "openvino bfloat16"]
    assert [str(kind) for kind in EngineKind] == [*names, "openvino int8", "torch cuda float16"]
    assert json.loads(json.dumps([*EngineKind])) == [*EngineKind]


def test_an_engine_is_kept_for_its_model_alone(engine):
    first, other = random_network("nucleus"), random_network("nucleus")
    with torch.no_grad():
        other.last.bias += 1
    stains = NORMALISER.apply(random_rgb(16, 16))
    kept = engines.of(engine, first, "first")
    assert engines.of(engine, random_network("nucleus"), "first") is kept
    assert (engines.of(engine, other, "other")(stains) != kept(stains)).any()
    for number in range(10):
        engines.of(engine, first, str(number))
    assert engines.of(engine, first, "first") is not kept  # the oldest make room
