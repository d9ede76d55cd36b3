"""A schedule played against costs: when each action runs, how much is idle, what is alive at the peak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING

from .action import Action, Op, Programs
from .dry_run import Message, dry_run, given_by, needed_by

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["Costs", "Simulation", "Span", "simulate"]


@dataclass(frozen=True)
class Costs:
    """How long actions and messages take, all in one unit of the caller's choice.

    Raises:
        TypeError: a cost that is neither a number nor a tuple of numbers (``latency``: no number).
        ValueError: a cost that is negative or not finite.
    """

    forward: float | tuple[float, ...] = 1.0
    """A forward: of every chunk, or a tuple with one number for each chunk. So the next three."""
    backward: float | tuple[float, ...] = 2.0
    """A whole backward (B)."""
    input: float | tuple[float, ...] = 1.0
    """A backward's input gradient alone (I)."""
    weight: float | tuple[float, ...] = 1.0
    """A backward's weight gradient alone (W)."""
    latency: float = 0.0
    """Added to each message between two stages; a stage's message to itself is free."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) and name != "latency" else (value,)
            if not all(isinstance(number, Real) for number in numbers):
                allowed = "a number" if name == "latency" else "a number, or a tuple with one for each chunk"
                raise TypeError(f"the cost {name} is {value!r}, but it must be {allowed}")
            if not all(math.isfinite(number) and number >= 0 for number in numbers):
                raise ValueError(f"the cost {name} is {value!r}, but costs are finite and not negative")

    def table(self, chunks: int) -> dict[Op, tuple[float, ...]]:
        """For each computing operation its cost on each of ``chunks`` chunks.

        Raises:
            ValueError: a tuple whose length is not ``chunks``.
        """
        given = {Op.FORWARD: self.forward, Op.BACKWARD: self.backward, Op.INPUT: self.input, Op.WEIGHT: self.weight}
        for op, cost in given.items():
            if isinstance(cost, tuple) and len(cost) != chunks:
                raise ValueError(
                    f"the cost {op.name.lower()} has {len(cost)} numbers, but there are {chunks} chunks; give one each"
                )
        return {op: cost if isinstance(cost, tuple) else (cost,) * chunks for op, cost in given.items()}


@dataclass(frozen=True, slots=True)
class Span:
    """An action on a stage from ``start`` to ``end``, planned or measured."""

    stage: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """What ``simulate`` found; times are in the unit of the costs and count from 0."""

    makespan: float
    """When the last action ends."""
    bubble: float
    """Share of the stages' time (stages times makespan) in which nothing is computed, 0 to 1."""
    stage_bubbles: tuple[float, ...]
    """The same for each stage alone."""
    peak_in_flight: tuple[int, ...]
    """For each stage, the most microbatches at one time whose forward has started and whose backward (W where it is
    apart) has not ended. A stage with several chunks counts a microbatch once for each chunk that holds it."""
    spans: tuple[Span, ...]
    """All actions; those of one stage are in its order."""


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Plays ``schedule`` against ``costs``.

    A stage runs its program in order, each action as soon as the one before has ended and what it waits for is there.
    Messages take no time of a stage. Linear in the number of actions.

    Args:
        schedule: any schedule; it has been checked, so it comes to its end.
        costs: how long things take; ``Costs()`` where none are given.

    Raises:
        ValueError: costs by chunk whose number is not that of the chunks.
    """
    costs = costs or Costs()
    spans = tuple(_spans(schedule, costs))
    makespan = max(span.end for span in spans)
    busy = [0.0] * schedule.stages
    for span in spans:
        busy[span.stage] += span.end - span.start
    stage_bubbles = tuple(max(0.0, 1.0 - time / makespan) if makespan else 0.0 for time in busy)
    return Simulation(
        makespan=makespan,
        bubble=sum(stage_bubbles) / schedule.stages,
        stage_bubbles=stage_bubbles,
        peak_in_flight=_peaks(schedule.programs),
        spans=spans,
    )


def _spans(schedule: Schedule, costs: Costs) -> Iterator[Span]:
    """The spans in the order of the dry run, in which whatever an action waits for comes before it."""
    table = costs.table(schedule.chunks)
    free = [0.0] * schedule.stages
    given: dict[Message, tuple[int, float]] = {}
    for _, stage, index in dry_run(schedule.programs).steps:
        action = schedule.programs[stage][index]
        start = free[stage]
        need = needed_by(action, schedule.chunks)
        if need is not None:
            source, ended = given[need]
            start = max(start, ended if source == stage else ended + costs.latency)
        end = free[stage] = start + table[action.op][action.chunk]
        give = given_by(action)
        if give is not None:
            given[give] = stage, end
        yield Span(stage, action, start, end)


def _peaks(programs: Programs) -> tuple[int, ...]:
    # A stage runs one action at a time, so its peak follows from its order alone. Forward-only, nothing is kept.
    peaks = []
    for program in programs:
        alive = peak = 0
        keeps = any(action.op is not Op.FORWARD for action in program)
        for action in program:
            if action.op is Op.FORWARD:
                alive = alive + 1 if keeps else 1
                peak = max(peak, alive)
            elif action.op is not Op.INPUT:
                alive -= 1
        peaks.append(peak)
    return tuple(peaks)
