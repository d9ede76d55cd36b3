from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from raypipe.model.call import Caller
from raypipe.model.microbatch import Microbatch
from raypipe.model.weights import LossRule, Rule
from raypipe.stage.losses import Losses


def cut(labels: list[list[int]]) -> tuple[Tensor, list[Microbatch]]:
    """Logits [rows, 2, 5] and their labels, two rows a microbatch."""
    logits = torch.randn(len(labels), 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    pieces = zip(logits.split(2), torch.tensor(labels).split(2), strict=True)  # a layout's own pieces are detached
    batches = [{"logits": some, "labels": theirs} for some, theirs in pieces]
    return logits, [Microbatch(batch, 2 * number, 2) for number, batch in enumerate(batches)]


def loss_of(batch: Any) -> Tensor:
    return F.cross_entropy(batch["logits"].flatten(0, 1), batch["labels"].flatten())


@pytest.mark.parametrize("rule", [LossRule(Rule.TARGETS), LossRule(lambda batch: float((batch["labels"] >= 0).sum()))])
def test_the_batchs_loss_and_gradient(rule: LossRule) -> None:
    logits, microbatches = cut([[1, -100], [-100, -100], [2, 3], [0, 4], [-100] * 2, [-100] * 2])
    whole = F.cross_entropy(logits.flatten(0, 1), torch.cat([m.batch["labels"] for m in microbatches]).flatten())
    (wanted,) = torch.autograd.grad(whole, logits)
    losses = Losses(rule, Caller(), microbatches)
    for number, microbatch in enumerate(microbatches):
        loss = losses.forward(number, lambda batch=microbatch.batch: loss_of(batch))
        assert loss is not None
        assert loss.isnan() == (number == 2)  # no valid target: it weighs nothing
        losses.backward(number, loss)
    assert losses.loss() == pytest.approx(whole.item(), rel=1e-6)
    assert losses.evaluated() == (losses.loss(), 5)
    assert losses.total() == (5 if rule.weight is Rule.TARGETS else 1)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad / losses.total(), wanted)


def test_samples_and_sum() -> None:
    _, microbatches = cut([[0, 1]] * 6)
    for rule, gradient, weight in ((Rule.SAMPLES, 2 / 6, 6), (Rule.SUM, 1.0, 1)):
        losses = Losses(LossRule(rule), Caller(), microbatches)
        for number in range(3):
            loss = losses.forward(number, lambda: torch.tensor(2.0, requires_grad=True))
            assert loss is not None
            losses.backward(number, loss)
            assert loss.grad is not None
            assert loss.grad.item() == pytest.approx(gradient)
        assert losses.loss() == pytest.approx(2.0 if rule is Rule.SAMPLES else 6.0)
        assert losses.evaluated()[1] == weight


def test_a_batch_without_targets_is_refused() -> None:
    _, microbatches = cut([[-100, -100]] * 2)
    losses = Losses(LossRule(Rule.TARGETS), Caller(), microbatches)
    losses.forward(0, lambda: loss_of(microbatches[0].batch))
    assert "no microbatch of the batch has a valid target" in (losses.refusal() or "")
    weightless = Losses(LossRule(lambda batch: 0.0), Caller(), microbatches)
    weightless.forward(0, lambda: loss_of(microbatches[0].batch))
    assert (weightless.divisor, weightless.refusal()) == (0.0, losses.refusal())
    assert losses.evaluated()[1] == 0


def test_a_loss_without_gradient_is_refused() -> None:
    _, microbatches = cut([[0, 1]] * 2)
    losses = Losses(LossRule(Rule.SAMPLES), Caller(), microbatches)
    assert losses.forward(0, lambda: torch.tensor(2.0)) is None
    assert losses.refusal() is None
    with pytest.raises(ValueError, match="the loss does not require a gradient"):
        losses.total()


def test_backwards_start_from_the_weight_in_its_unit_times_the_scale() -> None:
    _, microbatches = cut([[0, 1]] * 2 + [[3, -100], [-100, -100]])
    for rule, share, rest in ((LossRule(Rule.TARGETS, unit=8.0), 1 / 8, 5 / 8), (LossRule(Rule.SAMPLES), 2 / 4, 1.0)):
        losses = Losses(rule, Caller(), microbatches, scale=1024.0)
        for number in range(2):
            loss = losses.forward(number, lambda number=number: loss_of(microbatches[number].batch))
            assert loss is not None
        loss.retain_grad()
        losses.backward(1, loss)
        assert loss.grad is not None
        assert loss.grad.item() == share * 1024
        assert losses.total() == rest


def test_a_loss_that_is_not_finite_is_found_if_it_counts() -> None:
    _, microbatches = cut([[0, 1]] * 6)
    values = iter([2.0, float("nan"), float("inf")])
    weights = iter([1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    losses = Losses(LossRule(lambda batch: next(weights)), Caller(), microbatches)
    for number in range(3):
        assert losses.non_finite() is None
        losses.forward(number, lambda: torch.tensor(next(values), requires_grad=True))
    assert losses.non_finite() == (2, float("inf"))
