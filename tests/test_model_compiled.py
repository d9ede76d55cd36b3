"""Compiled units: each kind once, eager where the inside has to be seen, never for ever."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from training import trainer_of

from raypipe.errors import ResourcesError
from raypipe.model.compiled import compile_units, compiled_again, eagerly
from raypipe.model.intercept import install
from raypipe.model.recompute import recomputed
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),  # of the compiler's own imports
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # dynamo asks, and hides it
]
W = 8
_COMPILE = torch.compile


def _aot(compiled: Any, call: Any, **_: Any) -> Any:
    return functools.partial(compiled, backend="aot_eager")(call)


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Dynamo without inductor, which needs seconds a kind; the graphs that it made."""
    graphs: list[torch.fx.GraphModule] = []

    def eager(graph: torch.fx.GraphModule, given: Any, **_: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = _COMPILE
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


def test_running_again_is_inside_of_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments alone are kept, and with weights and states of the generator that is all."""
    monkeypatch.setattr(torch, "compile", functools.partial(_aot, _COMPILE))
    one, other = Block(4 * W), Block(4 * W)
    other.load_state_dict(one.state_dict())
    compile_units(units_of(one), ["0"])
    assert compiled_again(one) is not None
    assert compiled_again(other) is None
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    x, y = (torch.rand(3, W, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        made = recomputed(one.__call__, (x,), {"scale": 2.0})
    weights = {tuple(p.shape) for p in one.parameters()}
    assert [shape for shape in kept if shape not in weights] == [(3, W)]
    wanted = other(y, scale=2.0)
    for result in (made, wanted):
        result.square().sum().backward()
    torch.testing.assert_close(made, wanted)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(one.inner.weight.grad, other.inner.weight.grad)


def test_a_unit_with_an_object_is_compiled_and_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Taking(Block):
        def forward(self, x: Tensor, *, scale: Any = 1.0) -> Tensor:
            return super().forward(x)

    block, kept = Taking(4 * W), list[tuple[int, ...]]()
    compile_units(units_of(block), ["0"])
    with saved_tensors_hooks(lambda tensor: kept.append(tuple(tensor.shape)), lambda _: None):
        recomputed(block.__call__, (torch.rand(3, W),), {"scale": object()})
    assert (3, 4 * W) in kept


def test_a_loss_inside_a_unit_stays_in_sight(backend: list[Any]) -> None:
    """What its cross-entropy averages over weighs the microbatch."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(W, 5)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(self.out(x), y)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = nn.ModuleList([Block(), Block()]), Head()

        def forward(self, x: Tensor, y: Tensor) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.head(x, y)

    with trainer_of(Model(), 1, compile=True, microbatches=1) as trainer:
        trainer.train_step({"x": torch.rand(6, W), "y": torch.arange(6) % 5})
    assert len(backend) == 2  # the first block is given what needs no gradient


def test_without_a_compiler_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ResourcesError, match=r"^compile=True needs a C\+\+ compiler .* leave compile out$"):
        compile_units(units_of(Block()))
