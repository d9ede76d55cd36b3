from __future__ import annotations

from typing import Any

import torch

from raypipe.model.microbatch import find_layout
from raypipe.model.trial_run import Observed
from raypipe.model.unit_weight import with_unit
from raypipe.model.weights import LossRule, Rule

BATCH = {"labels": torch.tensor([[1, 2, 3, 4]] * 6 + [[1, 2, -100, -100]] * 2)}
LAYOUT = find_layout(BATCH)


def observe(batch: Any, **_: Any) -> Observed:
    return Observed(1.0, (float((batch["labels"] >= 0).sum()),))


def test_the_unit_is_what_a_batch_weighs_about() -> None:
    full = {"labels": BATCH["labels"].clamp(min=0)}
    assert with_unit(LossRule(Rule.TARGETS), observe, full, LAYOUT).unit == 32
    assert 16 < with_unit(LossRule(Rule.TARGETS), observe, BATCH, LAYOUT).unit < 32


def test_where_none_is_needed_or_known_it_is_one() -> None:
    for rule in (LossRule(Rule.SAMPLES), LossRule(Rule.SUM), LossRule(lambda batch: 2.0)):
        assert with_unit(rule, observe, BATCH, LAYOUT) is rule

    def fails(batch: Any, **_: Any) -> Observed:
        raise ValueError("a contrastive loss needs more samples")

    for run in (fails, lambda batch, **_: Observed(1.0), lambda batch, **_: Observed(1.0, (0.0,))):
        assert with_unit(LossRule(Rule.TARGETS), run, BATCH, LAYOUT) == LossRule(Rule.TARGETS)
