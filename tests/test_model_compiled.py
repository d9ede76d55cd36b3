"""Compiled units: each kind once, eager where the inside has to be seen, never for ever."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raypipe.errors import ResourcesError
from raypipe.model.compiled import compile_units, eagerly
from raypipe.model.intercept import install
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of the compiler's own imports
W = 8


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Dynamo without inductor, which needs seconds a kind; the graphs that it made."""
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, given: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, *, options: compiled(call, backend=eager))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self, width: int = W) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(W, width), nn.Linear(width, W)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(x))) * scale


def units_of(*units: nn.Module) -> dict[str, nn.Module]:
    named = {str(number): unit for number, unit in enumerate(units)}
    install(named)
    return named


def test_equal_units_share_their_code(backend: list[Any]) -> None:
    blocks = [Block() for _ in range(5)]
    x = torch.rand(4, W)
    wanted = [block(x) for block in blocks]
    compile_units(units_of(*blocks))
    for block, value in zip(blocks, wanted, strict=True):
        assert torch.equal(block(x), value)
    assert len(backend) == 1


def test_kinds_do_not_use_up_each_others_limit(backend: list[Any]) -> None:
    blocks = [Block(width) for width in range(1, 13)]
    compile_units(units_of(*blocks))
    for block in blocks:
        block(torch.rand(4, W))
    assert len(backend) == 12 > torch._dynamo.config.recompile_limit


def test_lengths_do_not_compile_for_ever(backend: list[Any]) -> None:
    block = Block()
    compile_units(units_of(block))
    for length in range(2, 30):
        block(torch.rand(length, W))
    assert len(backend) == 2  # the first length, then any
    for number in range(30):
        block(torch.rand(4, W), scale=1.0 + number)
    assert len(backend) <= torch._dynamo.config.recompile_limit


def test_eager_meanwhile(backend: list[Any]) -> None:
    block = Block()
    compile_units(units_of(block))
    with eagerly(block):
        block(torch.rand(4, W))
    assert not backend
    block(torch.rand(4, W))
    assert len(backend) == 1
    with eagerly(other := Block()):
        other(torch.rand(4, W))


def test_the_mode_that_parts_backwards_does_not_see_it(backend: list[Any]) -> None:
    block, x, queue = Block(), torch.rand(4, W), WeightQueue()
    compile_units(units_of(block))
    block(x)
    with SplitBackward(queue):
        made = block(x).sum()
    with SplitBackward(queue):
        made.backward()
    assert len(backend) == 1
    assert not len(queue)
    assert block.inner.weight.grad is not None


def test_a_unit_around_a_unit_stays_eager(backend: list[Any]) -> None:
    inner = Block()
    compile_units(units_of(inner, nn.Sequential(inner, nn.Linear(W, W))))
    inner(torch.rand(4, W))
    assert len(backend) == 1


def test_without_a_compiler_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ResourcesError, match=r"^compile=True needs a C\+\+ compiler .* leave compile out$"):
        compile_units(units_of(Block()))
