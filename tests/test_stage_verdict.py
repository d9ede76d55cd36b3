from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from raypipe.errors import NonFiniteError
from raypipe.model.call import Caller
from raypipe.model.microbatch import Microbatch
from raypipe.model.precision import Precision
from raypipe.model.weights import LossRule, Rule
from raypipe.stage.losses import Losses
from raypipe.stage.non_finite import NonFinite
from raypipe.stage.optimizer import Update
from raypipe.stage.tally import Tally
from raypipe.stage.verdict import Verdict
from raypipe.topology import Topology

RULE = LossRule(Rule.SAMPLES)


def verdict(precision: str = "fp32", replicas: int = 1, *, is_last: bool = True) -> Verdict:
    topology = Topology(2, replicas)
    spec = SimpleNamespace(topology=topology, rule=RULE, caller=Caller(precision=Precision(precision)))
    return Verdict(cast("Any", spec), 1, is_last=is_last)


def losses_of(*values: float, rule: LossRule = RULE) -> Losses:
    losses = Losses(rule, Caller(), [Microbatch({}, 2 * number, 2) for number in range(len(values))])
    for number, value in enumerate(values):
        losses.forward(number, lambda value=value: torch.tensor(value, requires_grad=True))  # type: ignore[misc]
    return losses


def update(**more: Any) -> Update:
    return Update(torch.zeros(0).double(), (), **more)


def test_the_last_stage_tells_what_it_knows_and_the_others_what_all_know() -> None:
    assert verdict().told(losses_of(1.0, 2.0)) == 1.0
    assert math.isnan(cast("float", verdict("fp16").told(losses_of(1.0, math.inf))))
    assert verdict(is_last=False).told(losses_of(1.0)) == 1.0
    told = verdict("fp16", replicas=2).told(losses_of(1.0, math.nan))
    assert Tally.read(cast("list[float]", told)) == Tally(4.0, True, (), False, False)


def test_a_loss_that_is_not_finite_is_an_error_unless_a_scale_may_help() -> None:
    assert verdict().is_early(losses_of(1.0, 2.0), 3)
    assert verdict("fp16").is_early(losses_of(1.0, math.nan), 3)
    assert not verdict(is_last=False).is_early(losses_of(1.0, math.nan), 3)
    with pytest.raises(NonFiniteError, match="step 3: the loss of microbatch 1 is nan"):
        verdict().is_early(losses_of(1.0, math.nan), 3)


def test_skipped_steps_halve_the_scale_and_name_the_place() -> None:
    judge, losses = verdict("fp16"), losses_of(1.0)
    found = NonFinite(0, "weight", math.inf)
    before = judge.scale
    assert judge.settle(update(non_finite=found), losses, 0, agreed=True) == "stage 0, the gradient of weight"
    assert judge.settle(update(), losses, 1, agreed=True) is None
    assert judge.settle(update(refused=True), losses, 2, agreed=True) is None
    assert judge.scale == before / 2
    place = judge.settle(update(non_finite=found), losses_of(1.0, math.inf), 3, agreed=True)
    assert place == "stage 1, the loss of microbatch 1"
    for step in range(27):
        judge.settle(update(non_finite=found), losses, step, agreed=True)
    with pytest.raises(NonFiniteError, match=r"not finite in 29 steps in a row, down to a loss scale of 6\.1e-05"):
        judge.settle(update(non_finite=found), losses, 28, agreed=True)


def test_without_a_scale_a_bad_gradient_is_an_error() -> None:
    with pytest.raises(NonFiniteError, match="the gradient of weight has the norm nan"):
        verdict().settle(update(non_finite=NonFinite(0, "weight")), losses_of(1.0), 0, agreed=True)
    assert verdict().scale == 1.0


def test_the_outcome_is_of_the_whole_batch() -> None:
    assert verdict(is_last=False).outcome(losses_of(1.0), update()) == (None, None, None)
    assert verdict().outcome(losses_of(1.0, 3.0), update()) == (2.0, 1.0, None)
    told = tuple(tuple(Tally(weight, True).vector()) for weight in (4.0, 12.0))
    share, divisor, refused = verdict(replicas=2).outcome(losses_of(1.0, 3.0), update(told=told))
    assert (share, divisor, refused) == (0.5, 1.0, None)  # 2 + 2 of 16 samples, whose losses are 1 and 3
