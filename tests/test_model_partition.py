from __future__ import annotations

import itertools
from pipes import Pipe, Stack, assert_exact, batch
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raypipe.errors import CutError
from raypipe.model.partition import check_balance
from raypipe.model.split import lightest_split


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8), st.integers(1, 8), st.sets(st.integers(1, 7)))
@settings(max_examples=80, deadline=None)
def test_the_heaviest_part_is_as_light_as_can_be(costs: list[int], parts: int, forbidden: set[int]) -> None:
    places = [place for place in range(1, len(costs)) if place not in forbidden]
    parts = min(parts, len(places) + 1)
    lengths = lightest_split(costs, parts, forbidden)
    assert sum(lengths) == len(costs)
    assert len(lengths) == parts
    assert min(lengths) > 0

    def heaviest(edges: tuple[int, ...]) -> int:
        all_edges = (0, *edges, len(costs))
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(all_edges))

    best = min(heaviest(edges) for edges in itertools.combinations(places, parts - 1))
    cuts = tuple(itertools.accumulate(lengths))[:-1]
    assert not forbidden.intersection(cuts)
    assert heaviest(cuts) == best


def chain(model: Any, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(x)
    return x @ model.blocks[0].weight


def test_chunks_say_what_they_hold() -> None:
    cut = Pipe(Stack(chain), batch(), 2, balance=[1, 3]).cut
    assert [chunk.units for chunk in cut.chunks] == [("blocks.0",), ("blocks.1", "blocks.2", "blocks.3")]
    assert cut.cuts == (1,)
    assert cut.shared == {"blocks.0.weight": (0, 1)}
    assert "blocks.0.bias" not in cut.chunks[1].parameters
    assert cut.chunks[0].flops == 2 * 4 * 8 * 8
    assert cut.chunks[1].flops == 4 * cut.chunks[0].flops
    assert [chunk.boundary_bytes for chunk in cut.chunks] == [4 * 8 * 4, 0]


def test_flops_balance() -> None:
    sizes = iter([64, 8, 8, 8])

    def make() -> nn.Module:
        width = next(sizes)
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x)
        return x

    assert [len(chunk.units) for chunk in Pipe(Stack(run, make), batch(), 2).cut.chunks] == [1, 3]


@pytest.mark.parametrize(
    ("balance", "sentence"),
    [
        ([4], r"has 1 entries for 2 chunks"),
        ([2, 3], r"sums to 5, but the model has 4 unit calls \(blocks.0, blocks.1, blocks.2, blocks.3\)"),
        ([0, 4], r"whole numbers of at least 1"),
        ([True, 3], r"whole numbers of at least 1"),
    ],
)
def test_a_wrong_balance_is_said(balance: list[int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pipe(Stack(chain), batch(), 2, balance=balance)


def test_too_many_stages_are_said() -> None:
    with pytest.raises(ValueError, match=r"stages=5 is more than the 4 units .* use at most 4 stages"):
        Pipe(Stack(chain), batch(), 5)


def test_the_argument() -> None:
    assert check_balance("parameters") == "parameters"
    assert check_balance([1, 2]) == [1, 2]
    assert check_balance("time") == "time"
    assert check_balance("memory") == "memory"
    with pytest.raises(ValueError, match=r"balance='speed' is unknown; use 'flops', 'parameters', 'time', 'memory' or"):
        check_balance("speed")
    with pytest.raises(TypeError, match="balance is a float"):
        check_balance(1.5)


def two_at_once(model: Any, x: Tensor) -> Tensor:
    for first, second in zip(model.blocks[::2], model.blocks[1::2], strict=True):
        x = checkpoint(lambda x, a=first, b=second: b(a(x)), x, use_reentrant=False)
    return x


def test_the_balance_keeps_together_what_must_not_be_parted() -> None:
    heavy_first = iter([64, 8, 8, 8, 8, 8])

    def make() -> nn.Module:
        width = next(heavy_first)
        return nn.Sequential(nn.Linear(8, width), nn.Linear(width, 8))

    model = Stack(two_at_once, make, blocks=6)
    assert Pipe(model, batch(), 2).cut.cuts == (2,)
    assert_exact(model, batch(), chunks=(1, 2, 3))


def test_a_balance_that_parts_it_is_refused_with_one_that_does_not() -> None:
    model = Stack(two_at_once, blocks=6)
    places = r"this model can be cut before blocks.2, blocks.4 into at most 3 chunks, for example with balance="
    with pytest.raises(CutError, match=rf"a cut before blocks.1 would part one call .*; {places}\[2, 4\]"):
        Pipe(model, batch(), 2, balance=[1, 5])
    with pytest.raises(
        CutError, match=rf"^4 chunks are wanted, but {places}\[2, 2, 2\]; .* before blocks.1 would part"
    ):
        Pipe(model, batch(), 4)
    assert_exact(model, batch(), chunks=(3,), balance=[2, 2, 2])
