"""Which units run again, told from a recording."""

from __future__ import annotations

from pipes import WIDTH
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import batches_of_tokens, gpt

from raypipe.accounting import observed
from raypipe.model.build import make_skeleton
from raypipe.model.call import Caller
from raypipe.model.recomputing import Recomputed, charge, check_recompute, recomputed_units
from raypipe.model.recording import Recording
from raypipe.model.saved import Saved
from raypipe.model.twin import Twin


def looked_at(model: nn.Module, batch: Any) -> tuple[Recording, Saved]:
    twin = Twin(make_skeleton(model).model)
    caller = Caller() if isinstance(batch, dict) else Caller(None, nn.functional.mse_loss)
    recording, saved = observed(twin, caller, batch, training=True)
    assert saved is not None
    return recording, saved


def found(model: nn.Module, batch: Any = None, recompute: Any = "full") -> Recomputed:
    batch = (torch.rand(4, WIDTH), torch.rand(4, WIDTH)) if batch is None else batch
    return recomputed_units(recompute, *looked_at(model, batch))


def test_full_is_every_unit_that_saves_more_than_its_arguments() -> None:
    made = found(gpt(), batches_of_tokens(1)[0])
    assert made.units == ("blocks.0", "blocks.1", "blocks.2", "norm")
    assert set(made.whole) == {"embedding", "position", "head"}
    assert set(made.whole.values()) == {"saves no more than its arguments"}


def test_a_callable_chooses() -> None:
    asked: list[str] = []

    def choose(name: str) -> bool:
        asked.append(name)
        return name.endswith("1")

    made = found(gpt(), batches_of_tokens(1)[0], choose)
    assert made == Recomputed(("blocks.1",), {})
    assert asked == ["embedding", "position", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    with pytest.raises(TypeError, match=r"recompute\('embedding'\) returned 1, but must return True or False"):
        found(gpt(), batches_of_tokens(1)[0], lambda name: 1)


def test_none_and_nothing_to_train() -> None:
    recording, saved = looked_at(gpt(), batches_of_tokens(1)[0])
    assert recomputed_units("none", recording, saved) == recomputed_units("full", recording, None) == Recomputed()


class Mlp(nn.Module):
    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.inner, self.outer, self.way = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), way
        self.kept: Any = None
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made = self.outer(torch.tanh(self.inner(self.norm(x))))
        if self.way == "leaves":
            self.kept = made.mean()
        elif self.way == "in place":
            x += 1
        return x + made


class Chain(nn.Module):
    def __init__(self, *ways: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(map(Mlp, ways))

    def forward(self, x: Tensor) -> Tensor:
        extra = 0
        for block in self.blocks:
            before = x
            x = checkpoint(block, x, use_reentrant=False) if block.way == "checkpoint" else block(x)
            if block.way == "changed later":
                before += 1
            if block.way == "leaves":
                extra = extra + block.kept
        return x + extra


def test_units_with_effects_are_left_whole() -> None:
    ways = ("", "leaves", "in place", "", "changed later", "", "checkpoint", "")
    made = found(Chain(*ways))
    assert made.units == tuple(f"blocks.{number}" for number, way in enumerate(ways) if not way)
    assert made.whole == {
        "blocks.1": "leaves tensors where others find them",
        "blocks.2": "changes an argument in place",
        "blocks.4": "gets an argument that is changed in place later",
        "blocks.6": "runs inside a checkpoint of the model's own",
    }


def test_running_statistics_of_ones_own() -> None:
    class Own(nn.Module):
        mean: Tensor
        var: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH))
            self.register_buffer("var", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(nn.functional.batch_norm(x, self.mean, self.var, training=True).tanh())

    assert found(nn.Sequential(Own(), Own())).whole == dict.fromkeys("01", "changes its buffer mean")


def test_compiled_units_cannot_do_all_that_eager_ones_can() -> None:
    for way, model in (("a plain block", nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh())), ("with norm", Mlp())):
        recording, saved = looked_at(nn.Sequential(model, Chain("")), (torch.rand(4, WIDTH), torch.rand(4, 8)))
        names = [name for name in recording.names if name.startswith("0")]
        made = recomputed_units(lambda name: name.startswith("0"), recording, saved, compiled=True)
        assert ("running statistics" in str(made.whole)) == (way == "with norm"), names


def test_what_torch_func_hides_is_left_whole() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.func.grad(lambda y: self.inner(y).square().sum())(x)

    made = found(nn.Sequential(Slope(), Slope()))
    assert made.units == ()
    assert all("torch.func" in reason for reason in made.whole.values())


def test_a_forward_more_in_the_backward() -> None:
    recording, saved = looked_at(gpt(), batches_of_tokens(1)[0])
    before = [recording.events[number] for number in recording.calls]
    charge(recording, recomputed_units(lambda name: name == "blocks.1", recording, saved))
    for event, number in zip(before, recording.calls, strict=True):
        more = recording.events[number].backward_flops - event.backward_flops
        assert more == (event.flops if event.name == "blocks.1" else 0)
    assert max(event.flops for event in before) > 0


@pytest.mark.parametrize("wrong", ["some", True, None, 2])
def test_other_values_are_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"recompute is {wrong!r}, but must be 'none', 'full', or a"):
        check_recompute(wrong)
