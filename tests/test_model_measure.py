from __future__ import annotations

import copy
import time
from typing import Any

import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import GPT, batches_of_tokens, gpt, trainer_of

from raypipe.model.call import Caller
from raypipe.model.measure import measure, runnable_copy
from raypipe.model.record import record
from raypipe.model.twin import Twin
from raypipe.options import Options
from raypipe.planning import make_plan


class Slow(nn.Module):
    """Takes so many seconds forward, and in the backward."""

    def __init__(self, forward: float = 0.0, backward: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.seconds, self.back, self.calls = forward, backward, 0

    def extra_repr(self) -> str:
        return f"{self.seconds}, {self.back}"

    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(self.seconds)
        time.sleep(self.seconds)
        y = x * self.weight
        if self.back:
            y.register_hook(lambda gradient: time.sleep(self.back))
        return y


CALLS: list[float] = []


def times_of(model: nn.Module, batch: Any, caller: Caller) -> Any:
    recording = record(Twin(model), lambda fake: caller.outputs(fake, copy.deepcopy(batch)))
    CALLS.clear()
    return measure(runnable_copy(model), None, caller, batch, recording, 1)


def test_forward_backward_and_the_loss_are_told_apart() -> None:
    model = nn.Sequential(Slow(0.03), Slow(0.0, 0.03), Slow())

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(0.03)
        return (outputs - targets).square().mean()

    first, second, third = times_of(model, (torch.rand(4, 8), torch.rand(4, 8)), Caller(None, loss))
    assert 0.03 <= first.forward > first.backward
    assert 0.03 <= second.backward > second.forward
    assert 0.03 <= third.forward > third.backward


def test_equal_calls_are_measured_once() -> None:
    model = nn.Sequential(Slow(0.001), Slow(0.002), Slow(0.001), Slow(0.001))
    one, two, three, four = times_of(model, (torch.rand(4, 8), torch.rand(4, 8)), Caller(None, nn.functional.mse_loss))
    # The first gets an input without a gradient, so it is no equal of the third.
    assert CALLS == [0.001] * 4 + [0.002] * 4 + [0.001] * 4
    assert three.forward <= four.forward + 0.01
    assert two.forward >= 0.002
    assert one.forward >= 0.001


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8)).eval()
    before, state, threads = copy.deepcopy(model.state_dict()), torch.get_rng_state(), torch.get_num_threads()
    batch = (torch.rand(4, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(4, 8))
    options = Options(2, loss=nn.functional.mse_loss, microbatches=1, balance="time")
    plan = make_plan(model, options, batch)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [type(module) for module in model] == [nn.Linear, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    assert not any(module.training for module in model.modules())
    assert all(stage.time is not None for stage in plan.stages)


def test_the_slow_unit_gets_a_stage_of_its_own() -> None:
    model = nn.Sequential(Slow(), Slow(0.02), Slow(), Slow(), Slow())
    options = Options(2, loss=nn.functional.mse_loss, microbatches=2, balance="time")
    plan = make_plan(model, options, (torch.rand(4, 8), torch.rand(4, 8)))
    assert plan.stages[0].units in (("0", "1"), ("0",))
    assert "forward ms" in str(plan)
    assert max(stage.time.forward for stage in plan.stages if stage.time) >= 0.02


def test_tied_weights_and_dropout_are_no_matter() -> None:
    model = gpt(tied=True, dropout=0.1, layers=4)
    plan = make_plan(model, Options(3, microbatches=4, balance="time"), batches_of_tokens(1)[0])
    assert sum(len(stage.units) for stage in plan.stages) == plan.calls
    assert all(stage.time is not None and stage.time.backward > 0 for stage in plan.stages)


def test_reentrant_checkpoints_can_be_timed() -> None:
    class Again(Slow):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=True)  # type: ignore[no-any-return]

    model = nn.Sequential(Slow(), Again(0.01))
    _, again = times_of(model, (torch.rand(4, 8), torch.rand(4, 8)), Caller(None, nn.functional.mse_loss))
    assert again.backward >= 0.01  # its forward runs again there
    assert model[1].weight.grad is None


def test_a_callable_is_timed_unit_by_unit() -> None:
    for build in (gpt, lambda: gpt(tied=True), lambda: FAMILIES["gpt2"].build(), lambda: FAMILIES["t5"].build()):
        model = build()
        assert isinstance(model, nn.Module)
        given = FAMILIES["t5"].batch(4) if "T5" in type(model).__name__ else FAMILIES["gpt2"].batch(4)
        batch = batches_of_tokens(1)[0] if isinstance(model, GPT) else given
        with trainer_of(build, 2, example=batch, balance="time", microbatches=2) as trainer:  # type: ignore[arg-type]
            plan = trainer.plan()
            times = [stage.time for stage in plan.stages]
            assert all(time is not None and time.forward > 0 and time.backward > 0 for time in times)
            trainer.train_step(batch)
