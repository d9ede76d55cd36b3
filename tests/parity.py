"""One step of a model, unsplit or through a trainer: its loss, and the gradient of each parameter, or None."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from training import trainer_of

from raypipe.model.call import Caller

__all__ = [
    "COVERING",
    "EVERY",
    "Case",
    "Step",
    "assert_exact",
    "assert_same_step",
    "batch_step",
    "cuts_of",
    "split_step",
]

Gradients = dict[str, Tensor | None]

EVERY = tuple(itertools.product((1, 2, 3, 4), ("gpipe", "1f1b"), (1, 2, 4)))
"""Every (stages, schedule, microbatches)."""

COVERING = (
    ((1, "1f1b", 4), (2, "gpipe", 2), (4, "1f1b", 1)),
    ((1, "gpipe", 2), (3, "1f1b", 4), (4, "gpipe", 2)),
    ((2, "1f1b", 4), (3, "gpipe", 1), (4, "gpipe", 4)),
    ((2, "1f1b", 1), (3, "1f1b", 2), (4, "1f1b", 4)),
)
"""Some of them for one model, others for the next: together each pair of values comes."""


@dataclass(frozen=True)
class Case:
    """A model, a batch, and how the trainer is told to run it."""

    model: nn.Module
    batch: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    most_stages: int = 4


@dataclass(frozen=True)
class Step:
    """What one step found."""

    loss: float
    gradients: Gradients


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is given, and changes nothing."""

    def __init__(self, named: Any, kept: Gradients) -> None:
        self.named, self.kept = list(named), kept
        super().__init__(self.named, lr=0.0)

    def step(self, closure: Any = None) -> Any:
        if any(isinstance(parameter, FakeTensor) for _, parameter in self.named):
            return  # the plan looks at what an optimizer keeps
        for name, parameter in self.named:
            self.kept[name] = None if parameter.grad is None else parameter.grad.clone()


def split_step(case: Case, stages: int, schedule: str, microbatches: int, **more: Any) -> Step:
    """One step through a trainer on the local backend, which leaves the model as it was."""
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    kept: Gradients = {}
    options = {"schedule": schedule, "microbatches": microbatches, **case.options, **more}
    with trainer_of(case.model, stages, optimizer=lambda named: Keeping(named, kept), **options) as trainer:
        loss = trainer.train_step(case.batch)["loss"]
    assert all(torch.equal(before[name], tensor) for name, tensor in case.model.state_dict().items())
    return Step(loss, kept)


def batch_step(case: Case) -> Step:
    """The same on the unsplit model, in train mode as a trainer has it."""
    caller = Caller(case.options.get("forward"), case.options.get("loss"))
    model, batch = copy.deepcopy(case.model), copy.deepcopy(case.batch)
    if not model.training:
        model.train()
    loss = caller.loss_of(caller.outputs(model, batch), batch)
    loss.backward()
    return Step(loss.item(), {name: p.grad for name, p in model.named_parameters()})


def assert_same_step(found: Step, wanted: Step, where: str = "") -> None:
    """Loss to 1e-6, gradients to 1e-5 of their size, and none where the unsplit model has none."""
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6, abs=1e-9), where
    biggest = max(float(g.norm()) for g in wanted.gradients.values() if g is not None)
    for name, gradient in wanted.gradients.items():
        own = found.gradients.get(name)
        if gradient is None:
            assert own is None, f"{name} has a gradient {where}"
            continue
        assert own is not None, f"{name} has no gradient {where}"
        # Relative to its own size, down to what is rounding error beside the others.
        bound = 1e-5 * max(float(gradient.norm()), 1e-2 * biggest)
        assert float((own - gradient).norm()) <= bound, f"{name} {where}"


def cuts_of(number: int) -> tuple[tuple[int, str, int], ...]:
    """The cuts that the case of this number is tried with."""
    return COVERING[number % len(COVERING)]


def assert_exact(make: Callable[[], Case], cuts: Any, **more: Any) -> None:
    """Every one of the cuts gives the unsplit model's step."""
    case = make()
    wanted = batch_step(case)
    assert any(g is not None and bool(g.any()) for g in wanted.gradients.values())
    for stages, schedule, microbatches in cuts:
        where = f"in {stages} stages, {schedule}, {microbatches} microbatches"
        stages = min(stages, case.most_stages)
        assert_same_step(split_step(case, stages, schedule, microbatches, **more), wanted, where)
