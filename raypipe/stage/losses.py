"""What the last stage knows of a step's loss: each microbatch's own, what it weighs, and so the whole batch's.

The batch's loss is sum(w_i L_i) / T. Where T is known before the first backward, gradients are divided there; else they
are divided once, at the step's end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from raypipe.errors import BatchError
from raypipe.model.call import Caller
from raypipe.model.denominators import Denominators
from raypipe.model.microbatch import Microbatch
from raypipe.model.weight_queue import run_backward
from raypipe.model.weights import LossRule
from raypipe.stage.tally import Tally

__all__ = ["Losses"]


class Losses:
    """Collects the losses of one step.

    Args:
        rule: by which microbatches weigh.
        caller: finds the loss in the model's outputs.
        microbatches: of the step (of all replicas' parts, this replica's).
        when_known: called with this object once every microbatch's forward is done.
        whole: the weights of all microbatches of the batch, where these are one replica's share; read where the rule
            knows weights before a forward.
        scale: what every backward's start is multiplied by.
    """

    def __init__(
        self,
        rule: LossRule,
        caller: Caller,
        microbatches: Sequence[Microbatch],
        when_known: Callable[[Losses], None] = lambda losses: None,
        whole: Sequence[float] | None = None,
        scale: float = 1.0,
    ) -> None:
        self._scale = scale
        self._rule, self._caller, self._microbatches = rule, caller, microbatches
        self._when_known = when_known
        self._losses: dict[int, Tensor] = {}
        self._weights: dict[int, float] = {}
        self._denominators: dict[int, tuple[float, ...]] = {}
        self._trains = False
        self.divisor: float | None = None
        """What gradients are divided by in each backward, or None where that is left to the step's end."""
        if rule.known_before_forward:
            weights = [rule.weigh(microbatch) for microbatch in microbatches] if whole is None else whole
            self.divisor = rule.total(weights) if any(weights) else 0.0

    def forward(self, number: int, run: Callable[[], Any]) -> Tensor | None:
        """Runs a microbatch's forward and finds its loss; None where nothing that is trained is on its way."""
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
        self._trains |= loss.requires_grad
        if len(self._losses) == len(self._microbatches):
            self._when_known(self)
        return loss if loss.requires_grad else None

    def backward(self, number: int, loss: Tensor) -> None:
        """A microbatch's backward, as far as the tensors that this stage received.

        One that weighs nothing gives zeros without being run: its loss may be NaN, and NaN times 0 is NaN.
        """
        weight = self._weights[number]
        if weight:
            share = weight / (self._rule.unit if self.divisor is None else self.divisor)
            run_backward([loss], [torch.full_like(loss, share * self._scale)], (), keep=False, accumulate=True)
        else:
            for leaf in _leaves_of(loss):
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

    def refusal(self) -> str | None:
        """Why the batch cannot be trained on, once every forward is done; None where it can.

        Its gradients are then thrown away, and the weights stay as they were.
        """
        try:
            self._rule.total(self._ordered_weights())
        except BatchError as error:
            return str(error)
        return self.refusal_of_terms()

    def refusal_of_terms(self) -> str | None:
        """Why no weight is right for all terms of the loss, once every forward is done; None where one is."""
        weights = self._ordered_weights()
        try:
            self._rule.check(weights, [self._denominators.get(number, ()) for number in range(len(weights))])
        except BatchError as error:
            return str(error)
        return None

    @property
    def trains(self) -> bool:
        """Whether a gradient can come from any loss so far."""
        return self._trains

    def total(self) -> float:
        """What gradients are still to be divided by beside the scale, once every forward is done.

        Raises:
            ValueError: no gradient can come from any loss.
        """
        if not self._trains:
            raise ValueError(
                "the loss does not require a gradient, so nothing can be trained on it: it was detached, or made under "
                "torch.no_grad, or depends on no parameter that requires a gradient"
            )
        return self._rule.total(self._ordered_weights()) / self._rule.unit if self.divisor is None else 1.0

    def tally(self) -> Tally:
        """What is told to all ranks, once every forward is done."""
        weights = self._ordered_weights()
        rows = [self._denominators.get(number, ()) for number in range(len(weights))]
        weighed = [row for row, weight in zip(rows, weights, strict=True) if weight]  # of one length, or refused
        columns = range(max(map(len, weighed or rows)))
        averaged = tuple(math.fsum(row[column] for row in rows if column < len(row)) for column in columns)
        refused = self.refusal_of_terms() is not None
        return Tally(math.fsum(weights), self._trains, averaged, refused, self.non_finite() is None)

    def loss(self, total: float | None = None) -> float:
        """The batch's loss, once every forward is done; with the whole batch's ``total``, what a share adds to it."""
        weights = self._ordered_weights()
        weighted = [w * float(self._losses[number]) for number, w in enumerate(weights) if w]
        return sum(weighted) / (self._rule.total(weights) if total is None else total)

    def non_finite(self) -> tuple[int, float] | None:
        """The first microbatch that counts and whose loss is NaN or infinite, and the loss; of those done so far."""
        for number, loss in sorted(self._losses.items()):
            if self._weights[number] and not math.isfinite(value := float(loss)):
                return number, value
        return None

    def evaluated(self) -> tuple[float, float]:
        """The whole batch's loss and its weight among batches; NaN and 0 for a batch without a valid target."""
        weights = self._ordered_weights()
        return (self.loss(), self._rule.total(weights)) if any(weights) else (math.nan, 0.0)

    def _ordered_weights(self) -> list[float]:
        return [self._weights[number] for number in range(len(self._microbatches))]


def _leaves_of(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward from ``loss`` would give a gradient to."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
