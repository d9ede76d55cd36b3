"""The best of several schedules for given costs and memory, and why it is that one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

from .costs import Costs
from .schedule import Schedule
from .simulate import Simulation

__all__ = ["Choice", "Limit", "Tried", "choose"]

Limit: TypeAlias = float | Sequence[float] | None
"""Bytes that may be kept: of every stage, or a sequence with one number for each; None: without limit."""


@dataclass(frozen=True)
class Tried:
    """A schedule that was played.

    Attributes: ``schedule``; ``found``, its simulation; ``bytes``, each stage's peak; ``fits``, whether all are within
    their limits.
    """

    schedule: Schedule
    found: Simulation
    bytes: tuple[float, ...]
    fits: bool

    @property
    def peak_bytes(self) -> float:
        """The peak of the stage that keeps the most."""
        return max(self.bytes)


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
        rows = [("", "schedule", "makespan", "bubble", "peak memory", "fits")]
        for one in self.tried:
            rows.append(
                (
                    "->" if one is self.best else "",
                    one.schedule.headline(),
                    f"{one.found.makespan:.4g}",
                    f"{one.found.bubble:.1%}",
                    _short(one.peak_bytes),
                    "yes" if one.fits else "no",
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{self.why()}."])


def choose(
    candidates: Sequence[Schedule],
    costs_of: Callable[[Schedule], Costs],
    memory_bytes: Limit = None,
    bytes_of: Callable[[Schedule], Sequence[float]] | None = None,
) -> Choice:
    """Plays each schedule and takes the one with the least makespan of those that fit.

    Of equal makespans it takes the one whose fullest stage keeps less, then the one that was given first.

    Args:
        candidates: at least one.
        costs_of: what a schedule costs; it may be called for schedules of different sizes.
        memory_bytes: the limit of each stage's peak.
        bytes_of: each stage's peak, where it is more than the simulation's activations (weights, optimizer).

    Raises:
        TypeError: a limit that is no number.
        ValueError: no candidate, none that fits, a limit that is negative, or limits of another number of stages.
    """
    if not candidates:
        raise ValueError("there is no schedule to choose from; give at least one candidate")
    tried, closest, smallest = [], "", math.inf
    for schedule in candidates:
        limits = _limits(memory_bytes, schedule)
        found = schedule.simulate(costs_of(schedule))
        peaks = found.peak_bytes if bytes_of is None else tuple(bytes_of(schedule))
        over = [peak - limit for peak, limit in zip(peaks, limits, strict=True)]
        tried.append(Tried(schedule, found, peaks, max(over) <= 0))
        if max(over) < smallest:
            smallest, stage = max(over), over.index(max(over))
            peak, limit = _short(peaks[stage]), _short(limits[stage])
            closest = f"that of {schedule.headline()}, {peak} on stage {stage}, where the limit is {limit}"
    fitting = [one for one in tried if one.fits]
    if not fitting:
        raise ValueError(
            f"no schedule of {len(tried)} fits in memory: the smallest peak is {closest}; allow more memory, use more "
            "stages, or cut the batch into more microbatches"
        )
    best = min(fitting, key=lambda one: (one.found.makespan, one.peak_bytes))  # the first of equal ones
    return Choice(best, tuple(tried))


def _limits(memory_bytes: Limit, schedule: Schedule) -> tuple[float, ...]:
    if memory_bytes is None:
        return (math.inf,) * schedule.stages
    limits = tuple(memory_bytes) if isinstance(memory_bytes, Sequence) else (memory_bytes,) * schedule.stages
    for limit in limits:
        _check_limit(limit, memory_bytes)
    if len(limits) != schedule.stages:
        raise ValueError(
            f"memory_bytes has {len(limits)} numbers, but {schedule.headline()}; give one for each stage, or one "
            "number for all"
        )
    return limits


def _check_limit(limit: Any, given: object) -> None:
    if not isinstance(limit, Real):
        raise TypeError(f"memory_bytes is {given!r}, but it must be a number, one for each stage, or None")
    if not float(limit) >= 0:
        raise ValueError(f"memory_bytes is {given!r}, but a limit is not negative; give None for no limit")


def _short(size: float) -> str:
    """Bytes in three digits: ``1.5 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
