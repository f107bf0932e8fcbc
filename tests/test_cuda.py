"""The engine for GPUs, with the CPU as its device; and on a GPU where there is one."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_network import NORMALISER, random_rgb, untrained

from patchcl_qupath.models import cuda, engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.network import device, folded

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


def start(gpu, kind="nucleus", dtype=torch.float32):
    return cuda.CudaEngine(network(kind), fallback=on_cpu(kind), dtype=dtype, device=gpu)


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


def test_threads_with_tiles_of_any_size_share_the_device(gpu):
    engine, exact = start(gpu), on_cpu()
    tiles = [STAINS[: 4 * (1 + n % 16), : 4 * (1 + n % 7)] for n in range(60)]
    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(engine, tiles)]
    for tile, probabilities in zip(tiles, found, strict=True):
        np.testing.assert_allclose(probabilities, exact(tile), atol=1e-4)
    assert len(engine._idle) <= 3


def test_a_precision_that_is_too_low_is_not_used(caplog):
    large = network()
    with torch.no_grad():
        large.down[0].norm.weight *= 1e6  # too large for float16
        large.down[1].conv.weight *= 1e-6
    exact = engines._torch_on_cpu(folded(large))
    engine = cuda.cuda_engine(large, fallback=exact, dtype=torch.float16, device=CPU)
    np.testing.assert_allclose(engine(STAINS), exact(STAINS), atol=1e-4)
    (line,) = caplog.messages
    assert line.startswith("the GPU in float16 is off by ")


def test_a_device_that_is_wrong_in_any_precision_is_not_used(caplog):
    def other(pixels):
        return np.full((2, *pixels.shape[:2]), np.nan, np.float32)

    engine = cuda.cuda_engine(network(), fallback=other, dtype=torch.float16, device=CPU)
    assert engine is other
    assert len(caplog.messages) == 2


def test_a_device_that_cannot_be_used_is_replaced_by_the_cpu(caplog):
    """Meta tensors have shapes and no values: nothing can be copied back from there."""
    exact = on_cpu()
    meta = torch.device("meta")
    engine = cuda.cuda_engine(network(), fallback=exact, dtype=torch.float16, device=meta)
    assert engine is exact
    (line,) = caplog.messages
    assert line.startswith("the GPU cannot be used, the CPU is: ")


def test_a_small_memory_is_used_by_fewer_threads(gpu, monkeypatch, caplog):
    engine, exact = start(gpu), on_cpu()
    busy = threading.Semaphore(1)  # the memory is enough for one thread
    compute = engine._network.probabilities

    def probabilities(x):
        if not busy.acquire(blocking=False):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        try:
            return compute(x)
        finally:
            busy.release()

    monkeypatch.setattr(engine._network, "probabilities", probabilities)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(engine, [STAINS] * 50):
            np.testing.assert_allclose(found, exact(STAINS), atol=1e-4)
    assert engine._limit >= 1
    assert caplog.messages == []


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
    assert engines.choose("auto") is EngineKind.CUDA_FLOAT16
    assert engines.choose("torch") is EngineKind.TORCH
