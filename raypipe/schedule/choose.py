"""The best of several schedules for given costs and memory, and why it is that one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TypeAlias

from .costs import Costs
from .schedule import Schedule
from .simulate import Simulation

__all__ = ["Choice", "Limit", "Tried", "choose"]

Limit: TypeAlias = float | Sequence[float] | None
"""Bytes that activations may take: of every stage, or a sequence with one number for each; None: without limit."""


@dataclass(frozen=True)
class Tried:
    """A schedule that was played.

    Attributes: ``schedule``; ``found``, its simulation; ``fits``, whether every stage's peak is within its limit.
    """

    schedule: Schedule
    found: Simulation
    fits: bool

    @property
    def peak_bytes(self) -> float:
        """The peak of the stage that keeps the most."""
        return max(self.found.peak_bytes)


@dataclass(frozen=True)
class Choice:
    """The schedule that was chosen, and all that were tried; ``print`` shows them as a table.

    Attributes: ``best``, the one that was chosen; ``tried``, all in the order given.
    """

    best: Tried
    tried: tuple[Tried, ...]

    @property
    def schedule(self) -> Schedule:
        """The schedule that was chosen."""
        return self.best.schedule

    @property
    def simulation(self) -> Simulation:
        """How it goes."""
        return self.best.found

    def why(self) -> str:
        """One sentence."""
        others = [one for one in self.tried if one is not self.best]
        fit = [one for one in others if one.fits]
        dropped = len(others) - len(fit)
        over = f"; {dropped} of {len(self.tried)} schedules would not fit" if dropped else ""
        name, makespan = self.schedule.headline(), self.simulation.makespan
        if not fit:
            return f"{name} is the only one{' that fits' if dropped else ''}{over}"
        equal = [one for one in fit if one.found.makespan == makespan]
        if not equal:
            second = min(one.found.makespan for one in fit)
            return f"{name} has the least makespan, {makespan:.4g}; the next has {second:.4g}{over}"
        if all(one.peak_bytes > self.best.peak_bytes for one in equal):
            return f"{name} has the least makespan, {makespan:.4g}, and of those that have it the least memory{over}"
        return f"{name} has the least makespan, {makespan:.4g}, and came first of those that are equal{over}"

    def __str__(self) -> str:
        rows = [("", "schedule", "makespan", "bubble", "peak bytes", "fits")]
        for one in self.tried:
            rows.append(
                (
                    "->" if one is self.best else "",
                    one.schedule.headline(),
                    f"{one.found.makespan:.4g}",
                    f"{one.found.bubble:.1%}",
                    f"{one.peak_bytes:.4g}",
                    "yes" if one.fits else "no",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.why()}."])


def choose(candidates: Sequence[Schedule], costs_of: Callable[[Schedule], Costs], memory_bytes: Limit = None) -> Choice:
    """Plays each schedule and takes the one with the least makespan of those that fit.

    Of equal makespans it takes the one whose fullest stage keeps less, then the one that was given first.

    Args:
        candidates: at least one.
        costs_of: what a schedule costs; it may be called for schedules of different sizes.
        memory_bytes: the limit of ``Simulation.peak_bytes``.

    Raises:
        TypeError: a limit that is no number.
        ValueError: no candidate, none that fits, a limit that is negative, or limits of another number of stages.
    """
    if not candidates:
        raise ValueError("there is no schedule to choose from; give at least one candidate")
    tried, excess = [], []
    for schedule in candidates:
        limits = _limits(memory_bytes, schedule)
        found = schedule.simulate(costs_of(schedule))
        over = max(peak - limit for peak, limit in zip(found.peak_bytes, limits, strict=True))
        tried.append(Tried(schedule, found, over <= 0))
        excess.append(over)
    fitting = [one for one in tried if one.fits]
    if not fitting:
        raise ValueError(_none_fits(tried, excess, memory_bytes))
    best = min(fitting, key=lambda one: (one.found.makespan, one.peak_bytes))  # the first of equal ones
    return Choice(best, tuple(tried))


def _limits(memory_bytes: Limit, schedule: Schedule) -> tuple[float, ...]:
    if memory_bytes is None:
        return (math.inf,) * schedule.stages
    if isinstance(memory_bytes, Sequence) and not isinstance(memory_bytes, str):
        limits = tuple(memory_bytes)
        if len(limits) != schedule.stages:
            raise ValueError(
                f"memory_bytes has {len(limits)} numbers, but {schedule.headline()}; give one for each stage, or one "
                "number for all"
            )
    else:
        limits = (memory_bytes,) * schedule.stages  # type: ignore[assignment]
    for limit in limits:
        if not isinstance(limit, Real):
            raise TypeError(f"memory_bytes is {memory_bytes!r}, but it must be a number, one for each stage, or None")
        if not limit >= 0:
            raise ValueError(f"memory_bytes is {memory_bytes!r}, but a limit is not negative; give None for no limit")
    return limits


def _none_fits(tried: Sequence[Tried], excess: Sequence[float], memory_bytes: Limit) -> str:
    at = min(range(len(tried)), key=lambda place: excess[place])
    closest = tried[at]
    stage = max(
        range(closest.schedule.stages),
        key=lambda s: closest.found.peak_bytes[s] - _limits(memory_bytes, closest.schedule)[s],
    )
    peak, limit = closest.found.peak_bytes[stage], _limits(memory_bytes, closest.schedule)[stage]
    which = f"none of the {len(tried)} schedules fits" if len(tried) > 1 else "the only schedule does not fit"
    return (
        f"{which} in memory: the smallest peak is that of {closest.schedule.headline()}, {peak:.4g} bytes on stage "
        f"{stage} of {limit:.4g} allowed; give more memory or stages, cut the batch into more microbatches, or recompute "
        "activations"
    )
