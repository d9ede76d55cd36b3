"""What the last stage knows of a step's loss: each microbatch's own, what it weighs, and so the whole batch's.

The batch's loss is sum(w_i L_i) / T. Where T is known before the first backward, gradients are divided there; else they
are divided once, at the step's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.microbatch import Microbatch
from raypipe.model.weights import LossRule

__all__ = ["Losses"]


class Losses:
    """Collects the losses of one step.

    Args:
        rule: by which microbatches weigh.
        caller: finds the loss in the model's outputs.
        microbatches: of the step (of all replicas' parts, this replica's).
    """

    def __init__(self, rule: LossRule, caller: Caller, microbatches: Sequence[Microbatch]) -> None:
        self._rule, self._caller, self._microbatches = rule, caller, microbatches
        self._losses: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._denominators: dict[int, tuple[float, ...]] = {}
        known = rule.known_before_forward
        self.divisor = rule.total([rule.weigh(microbatch) for microbatch in microbatches]) if known else None
        """What gradients are divided by in each backward, or None where that is left to the step's end."""

    def forward(self, number: int, run: Callable[[], Any]) -> Tensor | None:
        """Runs a microbatch's forward and finds its loss; None where it weighs nothing and is left out."""
        microbatch = self._microbatches[number]
        if self._rule.needs_denominators:
            with Denominators() as seen:
                loss = self._caller.loss_of(run(), microbatch.batch)
            self._denominators[number] = seen.values()
        else:
            loss = self._caller.loss_of(run(), microbatch.batch)
        weight = self._rule.weigh(microbatch, self._denominators.get(number, ()))
        self._weights[number] = weight
        self._losses[number] = loss.detach()
        return loss if weight and loss.requires_grad else None

    def gradient(self, number: int, loss: Tensor) -> Tensor:
        """The gradient that a microbatch's backward starts from."""
        weight = self._weights[number]
        return torch.full_like(loss, weight if self.divisor is None else weight / self.divisor)

    def total(self) -> float:
        """What gradients are still to be divided by, once every forward is done."""
        if self.divisor is not None:
            return 1.0
        return self._rule.total(self._ordered_weights())

    def loss(self) -> float:
        """The whole batch's loss, once every forward is done.

        Raises:
            BatchError: the terms of the loss average over different things.
        """
        weights = self._ordered_weights()
        self._rule.check(weights, [self._denominators.get(number, ()) for number in range(len(weights))])
        weighted = [w * float(self._losses[number]) for number, w in enumerate(weights) if w]
        return sum(weighted) / self._rule.total(weights)

    def evaluated(self) -> tuple[float, float]:
        """The whole batch's loss and its weight among batches; NaN and 0 for a batch without a valid target."""
        weights = self._ordered_weights()
        return (self.loss(), self._rule.total(weights)) if any(weights) else (math.nan, 0.0)

    def _ordered_weights(self) -> list[float]:
        return [self._weights[number] for number in range(len(self._microbatches))]
