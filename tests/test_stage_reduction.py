from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raypipe.stage import buckets
from raypipe.stage.holders import gradients_of
from raypipe.stage.protocol import RankWork
from raypipe.stage.reduction import Reduction
from raypipe.topology import Topology
from raypipe.transport.memory import MemoryHub, MemoryTransport

SHAPES = {"a": (3, 4), "b": (7,), "c": (2, 5), "d": (1,)}


def together(works: dict[int, RankWork[Any]]) -> None:
    """Runs the ranks' works in turns."""
    waiting: dict[int, Any] = {}
    while works:
        for rank, work in list(works.items()):
            if rank in waiting and not waiting[rank].ready():
                continue
            try:
                waiting[rank] = next(work)
            except StopIteration:
                del works[rank]


def ranks_with_gradients(count: int) -> list[dict[str, nn.Parameter]]:
    """Equal weights, own gradients; "d" has one on rank 1 alone, and none anywhere with one rank."""
    noise = torch.Generator().manual_seed(3)
    made = []
    for rank in range(count):
        held = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
        for name, parameter in held.items():
            if name != "d" or rank == 1:
                parameter.grad = torch.randn(parameter.shape, generator=noise)
        made.append(held)
    return made


def summed(ranks: list[dict[str, nn.Parameter]]) -> dict[str, torch.Tensor]:
    """In order of ranks."""
    totals: dict[str, torch.Tensor] = {}
    for held in ranks:
        for name, parameter in held.items():
            if parameter.grad is not None:
                totals[name] = totals[name] + parameter.grad if name in totals else parameter.grad.clone()
    return totals


@pytest.mark.parametrize("size", [60, 25 * 2**20], ids=["buckets", "one"])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_copy_has_the_sum_in_order_of_ranks(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "BUCKET_BYTES", size)
    gradients = gradients_of(Topology(1, count), [list(SHAPES)], {n: len(s) for n, s in SHAPES.items()})
    ranks, hub = ranks_with_gradients(count), MemoryHub(count)
    wanted = summed(ranks)
    made = [Reduction(rank, held, gradients, sharded=False) for rank, held in enumerate(ranks)]
    together({rank: each.sum(hub.transport(rank)) for rank, each in enumerate(made)})
    for held in ranks:
        assert all(torch.equal(held[name].grad, wanted[name]) for name in SHAPES)  # type: ignore[arg-type]
    together({rank: each.spread(hub.transport(rank)) for rank, each in enumerate(made)})
    assert not any(p.any() for held in ranks for p in held.values())


@pytest.mark.parametrize("size", [60, 25 * 2**20], ids=["buckets", "one"])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_an_owner_alone_has_the_sum_and_all_get_its_weights(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With five ranks and four parameters one owns nothing."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", size)
    sizes = {name: nn.Parameter(torch.zeros(shape)).numel() for name, shape in SHAPES.items()}
    gradients = gradients_of(Topology(1, count), [list(SHAPES)], sizes, sharded=True)
    ranks, hub = ranks_with_gradients(count), MemoryHub(count)
    wanted = summed(ranks)
    made = [Reduction(rank, held, gradients, sharded=True) for rank, held in enumerate(ranks)]
    together({rank: each.sum(hub.transport(rank)) for rank, each in enumerate(made)})
    for rank, held in enumerate(ranks):
        assert {name for name, p in held.items() if p.grad is not None} == set(gradients.owned[rank])
        for name in gradients.owned[rank]:
            assert torch.equal(held[name].grad, wanted[name])  # type: ignore[arg-type]
            with torch.no_grad():
                held[name].sub_(wanted[name])
    together({rank: each.spread(hub.transport(rank)) for rank, each in enumerate(made)})
    assert all(torch.equal(held[name], -wanted[name]) for held in ranks for name in SHAPES)


def test_a_message_is_under_way_while_the_one_before_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no third one, which would only hold memory."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 1)
    open_at_once, most = 0, 0
    reduce = MemoryTransport.all_reduce

    def counted(self: MemoryTransport, *args: Any) -> Any:
        nonlocal open_at_once, most
        open_at_once += self.rank == 0
        most = max(most, open_at_once)
        return reduce(self, *args)

    monkeypatch.setattr(MemoryTransport, "all_reduce", counted)
    gradients = gradients_of(Topology(1, 2), [list(SHAPES)], dict.fromkeys(SHAPES, 1))
    ranks, hub = ranks_with_gradients(2), MemoryHub(2)
    first, second = (Reduction(rank, held, gradients, sharded=False) for rank, held in enumerate(ranks))
    work, other = first.sum(hub.transport(0)), second.sum(hub.transport(1))
    handle = next(work)
    assert not handle.ready()
    assert most == 2
    together({1: other, 0: _after(work, handle)})
    assert open_at_once == len(SHAPES)


def _after(work: RankWork[Any], handle: Any) -> RankWork[Any]:
    yield handle
    yield from work
