"""The unit in which microbatches' weights are counted while a batch's total is not known yet.

Where microbatches weigh what their loss functions averaged over, the total is known after the last forward, and
gradients are divided by it at the step's end. Backwards that start from a weight itself (hundreds of tokens) overflow
float16 at once. So they start from the weight over what a batch weighs about, and end with about their own size; where
all batches weigh the same, as unpadded text does, with exactly the numbers of a loop that divides by the microbatches.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from raypipe.model.microbatch import BatchLayout
from raypipe.model.shorten import telling_samples
from raypipe.model.trial_run import Observe
from raypipe.model.weights import LossRule, Rule

__all__ = ["with_unit"]


def with_unit(rule: LossRule, observe: Observe, batch: Any, layout: BatchLayout) -> LossRule:
    """The rule with its unit: what a batch of so many samples weighs, told from a few of them.

    It is one number for a whole run, and for all replicas: their gradients are summed before anything is divided.

    Args:
        rule: by which microbatches weigh; one that knows the total beforehand needs no unit.
        observe: runs the model's forward.
        batch: an example of a whole batch.
        layout: the batch's.
    """
    if rule.weight is not Rule.TARGETS:
        return rule
    chosen = layout.select(batch, telling_samples(batch, layout))
    try:
        seen = observe(chosen).denominators
    except Exception:  # a model that cannot run a few samples (a given rule was not probed) is not refused for that
        return rule
    weight = seen[0] * layout.samples(batch) / layout.samples(chosen) if seen else 0.0
    return replace(rule, unit=weight) if weight > 0 and math.isfinite(weight) else rule
