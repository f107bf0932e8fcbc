"""A batch in halves: gradients and statistics are those of both, whatever the number of threads."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.training.halves import Halves


@pytest.fixture
def network() -> NucleusNetwork:
    torch.manual_seed(0)
    return NucleusNetwork((4, 6, 8))


def batch(count: int) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def learn(network: nn.Module, x: Tensor) -> float:
    """Take the gradient of some loss."""
    loss = network(x).square().mean()
    loss.backward()
    return float(loss.detach())


def gradients(network: nn.Module) -> list[Tensor]:
    found = [weight.grad for weight in network.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def test_gradients_are_those_of_both_halves(network: NucleusNetwork) -> None:
    x = batch(4)
    alone = [deepcopy(network), deepcopy(network)]
    losses = [learn(each, half) for each, half in zip(alone, x.chunk(2), strict=True)]
    with Halves(network) as halves:
        assert halves.each(learn, x) == pytest.approx(losses, rel=1e-5)
        halves.join()
    for found, first, second in zip(gradients(network), *map(gradients, alone), strict=True):
        torch.testing.assert_close(found, first + second)


def test_batch_statistics_are_the_mean_of_both_halves(network: NucleusNetwork) -> None:
    x = batch(4) * torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None, None, None]
    alone = [deepcopy(network), deepcopy(network)]
    for each, half in zip(alone, x.chunk(2), strict=True):
        learn(each, half)
    with Halves(network) as halves:
        for _ in range(2):  # from the same mean in both halves, the second time
            halves.each(learn, x)
            halves.join()
        found = network.down[0].norm.running_var
    first, second = (each.down[0].norm.running_var for each in alone)
    assert not torch.allclose(first, second)
    once = (first + second) / 2
    untouched = torch.ones_like(once)
    torch.testing.assert_close(found, once + 0.9 * (once - untouched))


def test_halves_learn_from_the_same_weights(network: NucleusNetwork) -> None:
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with Halves(network) as halves:
        for _ in range(3):
            optimizer.zero_grad()
            same = torch.cat([batch(2), batch(2)])
            first, second = halves.each(learn, same)
            assert first == second
            halves.join()
            optimizer.step()
    assert learn(network.train(), batch(2)) < 0.9 * first


def test_one_thread_finds_the_same_as_two(network: NucleusNetwork) -> None:
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        learning = deepcopy(network)
        torch.set_num_threads(count)
        try:
            with Halves(learning) as halves:
                halves.each(learn, batch(4))
                halves.join()
            assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)
        found.append(gradients(learning))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def test_a_single_item_is_one_half(network: NucleusNetwork) -> None:
    alone = deepcopy(network)
    loss = learn(alone, batch(1))
    with Halves(network) as halves:
        assert halves.each(learn, batch(1)) == pytest.approx([loss], rel=1e-5)
        halves.join()
    for found, expected in zip(gradients(network), gradients(alone), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(network.state_dict(), alone.state_dict())


def test_a_whole_batch_has_one_mean(network: NucleusNetwork) -> None:
    alone = deepcopy(network)
    loss = learn(alone, batch(4))
    with Halves(network, whole=True) as halves:
        assert halves.each(learn, batch(4)) == pytest.approx([loss], rel=1e-5)
        halves.join()
    for found, expected in zip(gradients(network), gradients(alone), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(network.state_dict(), alone.state_dict())


def test_an_error_in_a_half_is_raised(network: NucleusNetwork) -> None:
    threads = torch.get_num_threads()
    with Halves(network) as halves, pytest.raises(RuntimeError, match="channels"):
        halves.each(learn, torch.zeros(4, 2, 32, 32))
    assert torch.get_num_threads() == threads
