"""What the last stages of all replicas tell together about a step's losses, and what all ranks make of it.

Each replica's last stage sees the losses of its share alone. The divisor is of the whole batch; a batch is refused, or
found not to train anything, as a whole too. So each tells a vector of one length, and everybody comes to the same end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raypipe.errors import BatchError
from raypipe.model.weights import LossRule
from raypipe.topology import Topology

__all__ = ["Tally", "Tellers", "refusal_of", "tellers_of"]

MOST_TERMS = 64
"""Loss functions of one forward that can be told of; the message has one length, so that it can be posted ahead."""
_LENGTH = 5 + MOST_TERMS


@dataclass(frozen=True, slots=True)
class Tellers:
    """Who tells all ranks what gradients are divided by.

    Attributes: ``ranks``; ``length``, how many numbers each of them tells; ``divisor``, made of what all of them told,
    in order of ``ranks``: 0 for a batch that is refused.
    """

    ranks: tuple[int, ...] = ()
    length: int = 0
    divisor: Callable[[Sequence[Sequence[float]]], float] = lambda told: 1.0

    @classmethod
    def of(cls, given: int | Tellers | None) -> Tellers:
        """One rank that knows the divisor itself, or none."""
        if isinstance(given, Tellers):
            return given
        return cls() if given is None else cls((given,), 1, lambda told: told[0][0])


@dataclass(frozen=True, slots=True)
class Tally:
    """What one replica's last stage knows once its forwards are done.

    Attributes:
        weight: the sum of its microbatches' weights.
        trains: whether a gradient can come from any of its losses.
        averaged: what each of its loss functions averaged over in all of its microbatches, where that is watched.
        refused: whether its own microbatches' terms already contradict each other.
        finite: whether all of its losses that count are finite.
    """

    weight: float
    trains: bool
    averaged: tuple[float, ...] = ()
    refused: bool = False
    finite: bool = True

    def vector(self) -> list[float]:
        """As numbers, of the same length for every tally."""
        known = self.averaged[:MOST_TERMS]
        flags = [float(self.trains), float(self.refused), float(self.finite)]
        head = [self.weight, *flags, float(len(self.averaged))]
        return [*head, *known, *[0.0] * (MOST_TERMS - len(known))]

    @classmethod
    def read(cls, vector: Sequence[float]) -> Tally:
        """From ``vector()``."""
        weight, trains, refused, finite, count, *averaged = (float(number) for number in vector)
        refused = refused or count > MOST_TERMS
        return cls(weight, bool(trains), tuple(averaged[: int(count)]), bool(refused), bool(finite))


def refusal_of(rule: LossRule, tallies: Sequence[Tally]) -> str | None:
    """Why the whole batch cannot be trained on; None where it can.

    Args:
        rule: by which microbatches weigh.
        tallies: of all replicas, in order.
    """
    weights = [tally.weight for tally in tallies]
    try:
        rule.total(weights)
    except BatchError as error:
        return str(error)
    try:
        if any(tally.refused for tally in tallies):
            raise BatchError
        rule.check(weights, [tally.averaged for tally in tallies])
    except BatchError:
        return (
            f"the loss functions of the batch average over different things, or are more than {MOST_TERMS}, so that no "
            "weight is right for all terms of the loss: give microbatch_weight, let the model average over samples, or "
            "use data_parallel=1"
        )
    return None


def tellers_of(rule: LossRule, topology: Topology, last: int, *, always: bool = False) -> Tellers:
    """Who tells the divisor, and how it comes of what they tell.

    In one pipeline that is the last stage, where forwards alone show it; it tells the divisor itself. Of several
    replicas it is the last stage of each, which tells its ``Tally``.

    Args:
        rule: by which microbatches weigh.
        topology: the grid of ranks.
        last: a rank that holds the last chunk.
        always: whether it tells where all ranks know the divisor too: that a loss is not finite.
    """
    if topology.replicas == 1:
        return Tellers.of(last if rule.needs_denominators or always else None)
    return Tellers(topology.copies(last), _LENGTH, lambda told: _divisor(rule, [Tally.read(each) for each in told]))


def _divisor(rule: LossRule, tallies: Sequence[Tally]) -> float:
    """What gradients are still to be divided by; 0 where they are to be thrown away, NaN where a loss is not finite."""
    if refusal_of(rule, tallies) is not None or not any(tally.trains for tally in tallies):
        return 0.0
    if not all(tally.finite for tally in tallies):
        return math.nan
    return 1.0 if rule.known_before_forward else rule.total([tally.weight for tally in tallies]) / rule.unit
