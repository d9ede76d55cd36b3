from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from raypipe.errors import BatchError
from raypipe.model.microbatch import Microbatch
from raypipe.model.weights import LossRule, Rule, refuse_batch_norm

PIECE = Microbatch({"mask": torch.tensor([1, 1, 0])}, 0, 3)


def test_each_rule_weighs_in_its_way():
    assert LossRule(Rule.TARGETS).weigh(PIECE, (17.0, 34.0)) == 17.0
    assert LossRule(Rule.SAMPLES).weigh(PIECE) == 3.0
    assert LossRule(Rule.SUM).weigh(PIECE) == 1.0
    assert LossRule(lambda batch: batch["mask"].sum()).weigh(PIECE) == 2.0


def test_the_total_divides_means_and_leaves_sums():
    assert LossRule(Rule.TARGETS).total([3.0, 0.0, 2.0]) == 5.0
    assert LossRule(Rule.SUM).total([1.0, 1.0]) == 1.0
    with pytest.raises(BatchError, match="no microbatch of the batch has a valid target"):
        LossRule(Rule.TARGETS).total([0.0, 0.0])


def test_words_and_callables_are_taken_and_nothing_else():
    assert LossRule.given("sum") == LossRule(Rule.SUM)
    assert LossRule.given(len).weight is len
    for wrong in ("tokens", 3, None):
        with pytest.raises(ValueError, match="microbatch_weight is"):
            LossRule.given(wrong)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_is_a_finite_number_from_0_up(weight):
    with pytest.raises(BatchError, match="microbatch_weight returned"):
        LossRule(lambda batch: weight).weigh(PIECE)


def test_targets_without_a_loss_function_are_refused():
    with pytest.raises(BatchError, match="no loss function"):
        LossRule.given("targets").weigh(PIECE)


def test_what_an_executor_has_to_do():
    assert [
        r.needs_denominators for r in (LossRule(Rule.TARGETS), LossRule(Rule.SAMPLES), LossRule(Rule.SAMPLES, True))
    ] == [
        True,
        False,
        True,
    ]
    assert [LossRule(r).known_before_forward for r in Rule] == [False, True, True]
    assert pickle.loads(pickle.dumps(LossRule(Rule.SAMPLES, watched=True))).watched


def test_all_loss_functions_must_follow_the_weights():
    targets, watched, plain = LossRule(Rule.TARGETS), LossRule(Rule.SAMPLES, True), LossRule(Rule.SAMPLES)
    rows = [(4.0, 8.0), (2.0, 4.0), (0.0, 0.0)]
    targets.check([4.0, 2.0, 0.0], rows)
    with pytest.raises(BatchError, match="averages over 4 of 9 targets in microbatch 0"):
        targets.check([2.0, 2.0], [(2.0, 4.0), (2.0, 5.0)])
    with pytest.raises(BatchError, match="microbatch 0, whose weight is 3 of 6"):
        watched.check([3.0, 3.0], [(4.0,), (2.0,)])
    plain.check([3.0, 3.0], [(4.0,), (2.0,)])
    with pytest.raises(BatchError, match="different numbers of loss functions"):
        targets.check([4.0, 2.0], [(4.0,), (2.0, 2.0)])


def test_batch_norm_over_microbatches_is_refused_unless_wanted():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.InstanceNorm2d(4))
    with pytest.raises(ValueError, match="1 is a BatchNorm2d"):
        refuse_batch_norm(model, 2, None)
    refuse_batch_norm(model, 1, None)
    refuse_batch_norm(model, 2, "microbatch")
    refuse_batch_norm(model.eval(), 2, None)
    with pytest.raises(ValueError, match="the model is a BatchNorm1d"):
        refuse_batch_norm(nn.BatchNorm1d(4, track_running_stats=False).eval(), 2, None)
    with pytest.raises(ValueError, match="batch_norm is 'batch'"):
        refuse_batch_norm(model, 2, "batch")
