from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from raypipe.model.weight_queue import WeightQueue, run_backward


def weight(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(noise(seed))


def noise(seed: int) -> Tensor:
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(seed))


def test_what_waits_is_added_when_drained_and_once() -> None:
    one, two = weight(1), weight(2)
    queue = WeightQueue()
    for number in range(3):
        queue.add(get_gradient_edge(noise(number) @ one @ two), noise(9), [one, two])
    assert len(queue) == 3
    assert [id(p) for p in queue.parameters()] == [id(one), id(two)]
    assert one.grad is two.grad is None
    queue.drain()
    first = one.grad
    assert first is not None
    assert (len(queue), queue.parameters()) == (0, ())
    queue.drain()
    torch.testing.assert_close(first, sum(noise(n).T @ noise(9) @ two.T for n in range(3)))
    assert two.grad is not None


def test_an_empty_queue_drains_to_nothing() -> None:
    WeightQueue().drain()


def test_the_sums_are_in_the_order_of_a_whole_backward() -> None:
    """Floating-point addition does not associate, so another order shows in the bits."""
    parameter, gradients = weight(), [noise(n) * 10.0 ** (n % 3) for n in range(7)]
    whole = sum((noise(n) @ parameter).mul(g).sum() for n, g in enumerate(gradients))
    (wanted,) = torch.autograd.grad(whole, parameter)  # type: ignore[arg-type]
    queue = WeightQueue()
    edges = [get_gradient_edge(noise(n) @ parameter) for n in range(7)]
    for number in (3, 6, 0, 2, 5, 1, 4):  # whatever the order in which they were left
        queue.add(edges[number], gradients[number], [parameter])
    queue.drain()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, wanted)
    assert not torch.equal(wanted, torch.stack([noise(n).T @ g for n, g in enumerate(gradients)]).sum(0))


def test_only_those_that_wait_get_a_gradient() -> None:
    waits, other = weight(1), weight(2)
    queue = WeightQueue()
    queue.add(get_gradient_edge(waits @ other), noise(3), [waits])
    queue.drain()
    assert waits.grad is not None
    assert other.grad is None


def test_a_gradient_that_is_there_is_added_to_in_its_place() -> None:
    parameter = weight()
    parameter.grad = there = noise(5).clone()
    queue = WeightQueue()
    queue.add(get_gradient_edge(noise(1) @ parameter), noise(2), [parameter])
    queue.drain()
    assert parameter.grad is there
    assert torch.equal(there, noise(5) + noise(1).T @ noise(2))


@pytest.mark.parametrize("keep", [True, False])
def test_a_graph_that_is_kept_can_run_again(keep: bool) -> None:
    parameter = weight()
    edge = get_gradient_edge(noise(1) @ parameter)
    first, second = WeightQueue(), WeightQueue()
    first.add(edge, noise(2), [parameter], keep=keep)
    second.add(edge, noise(2), [parameter])
    first.drain()
    if keep:
        second.drain()
    else:
        with pytest.raises(RuntimeError, match="second time"):
            second.drain()


def test_backwards_inside_a_backward_are_passes_of_their_own() -> None:
    """Each adds to ``.grad`` when it ends, as it would do whole."""
    parameter, queue = weight(), WeightQueue()
    parts = [noise(n) * 10.0**n for n in range(3)]

    @torch.enable_grad()
    def leave(number: int) -> None:
        queue.add(get_gradient_edge(parameter * parts[number]), torch.ones(5, 5), [parameter])

    @torch.enable_grad()
    def outer(gradient: Tensor) -> None:
        leave(0)
        inner = torch.zeros((), requires_grad=True) * 1
        inner.register_hook(lambda _: leave(1))
        inner.backward()  # type: ignore[no-untyped-call]
        leave(2)

    start = torch.zeros((), requires_grad=True) * 1
    start.register_hook(outer)
    start.backward()  # type: ignore[no-untyped-call]
    queue.drain()
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, parts[1] + (parts[2] + parts[0]))


def test_run_backward_gives_what_autograd_gives() -> None:
    x, parameter = noise(1).requires_grad_(), weight()
    y = x @ parameter
    edge = get_gradient_edge(y)
    found = run_backward([edge], [noise(2)], [x], keep=True)
    assert torch.equal(found[0], torch.autograd.grad(y, x, noise(2), retain_graph=True)[0])  # type: ignore[arg-type]
    assert parameter.grad is None
