"""The engine for GPUs, with the CPU as its device; and on a GPU where there is one."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_network import NORMALISER, random_rgb, untrained
from torch import nn

from patchcl_qupath.models import cuda, engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.network import NucleusNetwork, device, folded

CPU = torch.device("cpu")
STAINS = NORMALISER.apply(random_rgb(32, 24))


@pytest.fixture(params=["pretended", "GPU"])
def gpu(request):
    """A device of torch that the engine is to use: the CPU, and a GPU if there is one."""
    if request.param == "GPU" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return CPU if request.param == "pretended" else torch.device("cuda")


def network(kind="nucleus"):
    """An untrained network: the random weights of others exaggerate rounding up to 1."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = untrained(kind).eval()
    with torch.no_grad():
        made.last.weight *= 10
    return made


def on_cpu(kind="nucleus"):
    return engines._torch_on_cpu(folded(network(kind)))


@pytest.fixture(autouse=True)
def small_window(monkeypatch):
    """A window that a CPU computes in no time; 128 columns are more than any test has."""
    monkeypatch.setattr(cuda, "_WINDOW", (96, 128))


def start(gpu, kind="nucleus", dtype=torch.float32, by_products=False):
    method = cuda._Method(dtype, by_products)
    return cuda.CudaEngine(network(kind), fallback=on_cpu(kind), method=method, device=gpu)


def stains(height, width):
    return NORMALISER.apply(random_rgb(height, width))


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.01), (torch.bfloat16, 0.05)]
)
def test_each_precision_computes_what_the_cpu_does(gpu, kind, dtype, tolerance):
    found, expected = start(gpu, kind, dtype)(STAINS), on_cpu(kind)(STAINS)
    assert found.shape == expected.shape == (4 if kind == "patchcl" else 2, 32, 24)
    assert found.dtype == np.float32
    assert expected.std() > 0.02
    assert np.abs(found - expected).max() < tolerance


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_convolutions_are_products_of_matrices_as_well(gpu, kind):
    engine = start(gpu, kind, by_products=True)
    found, expected = engine(STAINS), on_cpu(kind)(STAINS)
    assert np.abs(found - expected).max() < 1e-4
    assert not [m for m in engine._slots.get()._network.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
def test_input_of_any_size_has_the_values_of_the_cpu_up_to_its_border(gpu, kind):
    """Smaller than a window, as large, and of several windows."""
    engine, exact = start(gpu, kind), on_cpu(kind)
    rows, cols = engine.window
    for height, width in ((4, 4), (rows - 4, 40), (rows, cols), (rows + 4, 8), (200, 2 * cols)):
        found = engine(stains(height, width))
        np.testing.assert_allclose(found, exact(stains(height, width)), atol=1e-4)


@pytest.mark.parametrize("length", [1, 4, 96, 97, 144, 145, 1000])
def test_windows_cover_input_once_and_yield_no_halo(length):
    found = [*cuda.spans(length, window=96, halo=24)]
    assert [*itertools.chain(*(range(s.first, s.last) for s in found))] == [*range(length)]
    for span in found:
        assert span.end - span.begin <= 96
        assert span.begin % 4 == 0
        assert span.begin == 0 or span.first - span.begin == 24
        assert span.end == length or span.end - span.last == 24


@pytest.mark.parametrize("kind", ["patchcl", "nucleus"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tile_on_a_gpu_has_the_values_of_the_whole_to_the_bit(monkeypatch, kind, dtype):
    """With the window of runs; before values are rounded to multiples of 1/255."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    monkeypatch.undo()
    gpu = torch.device("cuda")
    engine = cuda.cuda_engine(network(kind), fallback=on_cpu(kind), dtype=dtype, device=gpu)
    assert isinstance(engine, cuda.CudaEngine)
    whole = stains(900, 1500)
    everything = engine(whole)
    halo, divisor = engine._halo, network(kind).divisor
    rng = np.random.default_rng(0)
    for _ in range(6):
        rows, cols = (np.sort(rng.choice(n // divisor, 2, False)) * divisor for n in (900, 1500))
        row0, row1, col0, col1 = *rows, *cols
        found = engine(whole[row0:row1, col0:col1])
        inner = np.s_[:, row0 and halo : -halo, col0 and halo : -halo]
        expected = everything[:, row0:row1, col0:col1]
        np.testing.assert_array_equal(found[inner], expected[inner])


def test_a_device_whose_values_depend_on_the_place_of_a_pixel_is_not_used(monkeypatch, caplog):
    caplog.set_level("INFO", logger="patchcl_qupath")  # which an earlier command may have set
    monkeypatch.setattr(cuda.CudaEngine, "is_the_same_anywhere", lambda _: False)
    exact = on_cpu()
    engine = cuda.cuda_engine(network(), fallback=exact, dtype=torch.float32, device=CPU)
    assert engine is exact
    *tried, last = caplog.messages
    assert tried == [
        f"the GPU in {name} depends on the place of a pixel: not used"
        for name in ("float32", "float32 by matrix products")
    ]
    assert last == "the GPU cannot be used, the CPU is: no precision passed the checks"


def test_dependence_on_the_place_is_found(monkeypatch):
    engine = start(CPU)
    monkeypatch.setattr(engine, "compute", lambda pixels: pixels.transpose(2, 0, 1))
    assert engine.is_the_same_anywhere()

    def of_blocks(pixels):
        found = pixels.transpose(2, 0, 1).copy()
        found[:, ::16, ::16] = np.nextafter(found[:, ::16, ::16], 9)  # in the last bit
        return found

    monkeypatch.setattr(engine, "compute", of_blocks)
    assert not engine.is_the_same_anywhere()


def test_threads_with_tiles_of_any_size_share_the_device(gpu):
    engine, exact = start(gpu), on_cpu()
    tiles = [STAINS[: 4 * (1 + n % 8), : 4 * (1 + n % 6)] for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(engine, tiles)]
    for tile, probabilities in zip(tiles, found, strict=True):
        np.testing.assert_allclose(probabilities, exact(tile), atol=1e-4)
    assert engine._slots.qsize() == 2


def test_a_precision_that_is_too_low_is_not_used(monkeypatch, caplog):
    large = network()
    with torch.no_grad():
        large.down[0].norm.weight *= 1e6  # too large for float16
        large.down[1].conv.weight *= 1e-6
    exact = engines._torch_on_cpu(folded(large))
    monkeypatch.setattr(cuda.CudaEngine, "is_the_same_anywhere", lambda _: True)
    engine = cuda.cuda_engine(large, fallback=exact, dtype=torch.float16, device=CPU)
    np.testing.assert_allclose(engine(STAINS), exact(STAINS), atol=1e-4)
    (line,) = caplog.messages
    assert line.startswith("the GPU in float16 is off by ")


def test_a_device_that_is_wrong_in_any_precision_is_not_used(caplog):
    def other(pixels):
        return np.full((2, *pixels.shape[:2]), np.nan, np.float32)

    engine = cuda.cuda_engine(network(), fallback=other, dtype=torch.float16, device=CPU)
    assert engine is other
    assert len(caplog.messages) == 3


def test_a_device_that_cannot_be_used_is_replaced_by_the_cpu(caplog):
    """Meta tensors have shapes and no values: nothing can be copied back from there."""
    exact = on_cpu()
    meta = torch.device("meta")
    engine = cuda.cuda_engine(network(), fallback=exact, dtype=torch.float16, device=meta)
    assert engine is exact
    (line,) = caplog.messages
    assert line.startswith("the GPU cannot be used, the CPU is: ")


def test_a_small_memory_is_used_by_one_thread_at_a_time(gpu, monkeypatch, caplog):
    made, slot = [], cuda._Slot

    def once(*args):
        if made:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        made.append(slot(*args))
        return made[0]

    monkeypatch.setattr(cuda, "_Slot", once)
    engine, exact = start(gpu), on_cpu()
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(engine, [STAINS] * 50):
            np.testing.assert_allclose(found, exact(STAINS), atol=1e-4)
    assert len(made) == engine._slots.qsize() == 1
    assert caplog.messages == []


def test_a_memory_that_is_too_small_is_not_used(monkeypatch, caplog):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(cuda, "_Slot", full)
    exact = on_cpu()
    assert cuda.cuda_engine(network(), fallback=exact, dtype=torch.float16, device=CPU) is exact
    (line,) = caplog.messages
    assert line.startswith("the GPU cannot be used, the CPU is: CUDA out of memory.")


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
    ],
)
def test_the_cpu_goes_on_where_the_device_fails(gpu, monkeypatch, caplog, error):
    engine = start(gpu)

    def fail(pixels):
        raise error

    monkeypatch.setattr(engine, "compute", fail)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(engine, [STAINS] * 20):
            np.testing.assert_array_equal(found, on_cpu()(STAINS))
    (line,) = caplog.messages
    assert line == f"the GPU failed, the CPU goes on: {str(error).splitlines()[0]}"


def test_a_worker_without_a_gpu_does_the_same_on_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    engine = engines.start(EngineKind.CUDA_FLOAT16, network())
    np.testing.assert_array_equal(engine(STAINS), on_cpu()(STAINS))
    (line,) = caplog.messages
    assert line.endswith("has no GPU, the CPU is used")


def test_a_gpu_is_the_default_where_there_is_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert device().type == "cuda"
    assert engines.choose("auto", NucleusNetwork) is EngineKind.CUDA_FLOAT16
    assert engines.choose("torch", NucleusNetwork) is EngineKind.TORCH
