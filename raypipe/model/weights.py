"""How much each microbatch counts in the loss and the gradient of its batch.

A batch's loss is an average over something: its samples, or the targets that are not padding, or what class weights
make of them. With L_i the loss of microbatch i and w_i what L_i averaged over, the batch's own loss is
sum(w_i L_i) / sum(w_i), and its gradient likewise. ``Denominators`` sees the w_i of PyTorch's loss functions.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypipe.errors import BatchError
from raypipe.model.microbatch import Microbatch

__all__ = ["LossRule", "Rule", "refuse_batch_norm"]

_RELATIVE = 1e-5  # of float32 sums of class weights


class Rule(enum.Enum):
    """What a microbatch weighs."""

    TARGETS = "targets"
    """What its loss functions averaged over, known after its forward."""
    SAMPLES = "samples"
    """Its samples."""
    SUM = "sum"
    """One, and nothing is divided: the batch's loss is the sum of theirs."""


@dataclass(frozen=True, slots=True)
class LossRule:
    """The rule of a training run.

    Attributes:
        weight: the rule, or the user's own ``weight(microbatch) -> float``, called with a microbatch's batch.
        watched: under SAMPLES, whether the loss functions' denominators must follow the samples in each batch.
        unit: under TARGETS, where the total is known late, what weights are counted in meanwhile: backwards start from
            w / unit. About a batch's total, so that gradients have the size they end with; it changes no sum.
    """

    weight: Rule | Callable[[Any], float]
    watched: bool = False
    unit: float = 1.0

    @classmethod
    def given(cls, microbatch_weight: str | Callable[[Any], float]) -> LossRule:
        """The rule that the user asked for.

        Raises:
            ValueError: it is neither one of the words nor a callable.
        """
        words = [rule.value for rule in Rule]
        if isinstance(microbatch_weight, str) and microbatch_weight in words:
            return cls(Rule(microbatch_weight))
        if isinstance(microbatch_weight, str) or not callable(microbatch_weight):
            raise ValueError(
                f"microbatch_weight is {microbatch_weight!r}, but must be one of {words}, "
                "a callable weight(microbatch) -> float, or None for the rule that a probe finds"
            )
        return cls(microbatch_weight)

    @property
    def needs_denominators(self) -> bool:
        """Whether the forward that computes the loss must run under ``Denominators``."""
        return self.weight is Rule.TARGETS or self.watched

    @property
    def known_before_forward(self) -> bool:
        """Whether ``weigh`` needs no denominators, so that a batch's total is known before its first forward."""
        return self.weight is not Rule.TARGETS

    def weigh(self, microbatch: Microbatch, denominators: Sequence[float] = ()) -> float:
        """A microbatch's weight. One of weight 0 is left out: its own loss may be NaN.

        Raises:
            BatchError: no loss function that averages was seen, or the user's weight is no number from 0 up.
        """
        if self.weight is Rule.SUM:
            return 1.0
        if self.weight is Rule.SAMPLES:
            return float(microbatch.samples)
        if self.weight is Rule.TARGETS:
            if not denominators:
                raise BatchError(
                    "microbatch_weight is 'targets', but no loss function with reduction 'mean' ran in the forward of "
                    "this microbatch: give 'samples', 'sum' or a callable"
                )
            return denominators[0]
        weight = float(self.weight(microbatch.batch))
        if not (weight >= 0 and math.isfinite(weight)):
            raise BatchError(f"microbatch_weight returned {weight}, but a weight is a finite number, 0 or more")
        return weight

    def total(self, weights: Sequence[float]) -> float:
        """What the sum of weighted losses and gradients is divided by.

        Raises:
            BatchError: no microbatch weighs anything, so that the batch's loss would be NaN.
        """
        if self.weight is Rule.SUM:
            return 1.0
        total = math.fsum(weights)
        if total <= 0:
            raise BatchError("no microbatch of the batch has a valid target, so its loss would be NaN: leave it out")
        return total

    def check(self, weights: Sequence[float], denominators: Sequence[Sequence[float]]) -> None:
        """Checks that every loss function of the batch averages in the proportion of the weights.

        Args:
            weights: one for each microbatch.
            denominators: of each microbatch, one for each loss function.

        Raises:
            BatchError: two loss functions average over different things, and no weight fits both.
        """
        if not self.needs_denominators:
            return
        whole = math.fsum(weights)
        counts = {len(row) for row, weight in zip(denominators, weights, strict=True) if weight}
        if len(counts) > 1:
            raise BatchError("microbatches ran different numbers of loss functions: give microbatch_weight")
        for column in zip(*denominators, strict=False):
            total = math.fsum(column)
            for number, (part, weight) in enumerate(zip(column, weights, strict=True)):
                if abs(part * whole - total * weight) > _RELATIVE * total * whole:
                    raise BatchError(
                        f"a loss function averages over {part:g} of {total:g} targets in microbatch {number}, whose "
                        f"weight is {weight:g} of {whole:g}, so that no weight is right for all terms of the loss: "
                        "give microbatch_weight, let the model average over samples, or use microbatches=1"
                    )


def refuse_batch_norm(model: nn.Module, microbatches: int, batch_norm: str | None, replicas: int = 1) -> None:
    """Refuses BatchNorm over microbatches, unless the user wants their own statistics for them.

    Raises:
        ValueError: a BatchNorm would use the statistics of a microbatch, or ``batch_norm`` is unknown.
    """
    if batch_norm not in (None, "microbatch"):
        raise ValueError(f"batch_norm is {batch_norm!r}, but must be 'microbatch' or None")
    if microbatches < 2 or batch_norm == "microbatch":
        return
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name or 'the model'} is a {type(module).__name__}, whose statistics over a microbatch are not those "
                "over the batch: give batch_norm='microbatch' to accept that, freeze it by .eval(), or use "
                f"microbatches=1{' and data_parallel=1' if replicas > 1 else ''}"
            )
