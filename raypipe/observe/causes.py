"""Where each stage's step went, by cause, to the nanosecond.

A stage's step is cut into intervals: computing; getting on between actions, sending; waiting for an input. A wait
after the sender has finished is exposed communication. A wait before that is put down to what the sender did
meanwhile: where the sender itself waited for a message, for a batch or for the driver, so does whoever waits for it.
What remains, time in which somebody computes, is dependency as far as the prediction has it at this very action, and
straggler beyond.

Source: the idea that a wait is charged to its root cause is that of the delay analysis of Böhme, Geimer, Wolf and
Arnold, "Identifying the Root Causes of Wait States in Large-Scale Parallel Applications", 2010.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from raypipe.observe.runs import Run
from raypipe.schedule import Schedule
from raypipe.schedule.dry_run import dry_run, number_messages

__all__ = ["Attributed", "Cause", "Times", "attribute"]


class Cause(enum.IntEnum):
    """What a stage's time went into; its number is the place in ``Times``."""

    COMPUTE = 0
    DEPENDENCY = 1
    COMMUNICATION = 2
    STRAGGLER = 3
    DATA = 4
    DRIVER = 5
    OPTIMIZER = 6

    def __str__(self) -> str:
        return "exposed communication" if self is Cause.COMMUNICATION else self.name.lower()


# Somewhere up the chain a stage computes.
_COMPUTED = (Cause.COMPUTE, Cause.DEPENDENCY, Cause.STRAGGLER)


class Times(NamedTuple):
    """Nanoseconds of one stage's step by cause; their sum is the step.

    Attributes:
        compute: its own actions.
        dependency: waiting for another stage's computing as the schedule has it, until the pipeline's last action.
        communication: waiting for a message whose sender had finished, sending, and getting on between actions.
        straggler: waiting for another stage's computing for longer than predicted.
        data: from the step's start to the first action.
        driver: from the end of the step before to the start of this one.
        optimizer: after the last action: reducing and clipping gradients, the update, the report.
    """

    compute: int
    dependency: int
    communication: int
    straggler: int
    data: int
    driver: int
    optimizer: int


class Attributed(NamedTuple):
    """What ``attribute`` found.

    Attributes:
        times: of each stage.
        inherent: for each stage and action the part of its wait that is dependency; last the wait for the pipeline's
            last action.
    """

    times: tuple[Times, ...]
    inherent: tuple[tuple[int, ...], ...]


def attribute(schedule: Schedule, runs: Sequence[Run], inherent: Sequence[Sequence[int]] | None = None) -> Attributed:
    """Puts every nanosecond of every stage's step down to a cause.

    Args:
        schedule: that was run.
        runs: of each stage, on one clock.
        inherent: what the prediction has found, as ``Attributed.inherent``; None for the prediction itself, in which
            every wait for computing is dependency.
    """
    numbered = number_messages(schedule.programs)
    giver_of = {
        number: (stage, position) for stage, row in enumerate(numbered.gives) for position, number in enumerate(row)
    }
    lines = [_Line(run) for run in runs]
    last = max(range(len(runs)), key=lambda stage: runs[stage].rows[-1].end)
    over = runs[last].rows[-1].end
    waited: list[list[int]] = [[] for _ in runs]
    for _, stage, position in dry_run(schedule.programs).steps:
        line, run, need = lines[stage], runs[stage], numbered.needs[stage][position]
        row = run.rows[position]
        line.add(row.turned, Cause.COMMUNICATION if position else Cause.DATA)
        giver, place = giver_of[need] if need >= 0 else (stage, position)
        dependency = 0
        if giver != stage:
            allowed = None if inherent is None else inherent[stage][position]
            # Without a common end of the steps, the wait for the last action comes before the next first one.
            skew = inherent[stage][-1] if inherent is not None and position == 0 and run.ended < over else 0
            dependency = line.wait(min(row.start, runs[giver].rows[place].end), lines[giver], allowed, skew)
        waited[stage].append(dependency)
        line.add(row.start, Cause.COMMUNICATION)
        line.add(row.end, Cause.COMPUTE)
    for stage, (line, run) in enumerate(zip(lines, runs, strict=True)):
        dependency = 0
        # A stage that was through before the pipeline's last action has not waited for it.
        if stage != last and run.ended >= over:
            dependency = line.wait(over, lines[last], None if inherent is None else inherent[stage][-1])
        waited[stage].append(dependency)
        line.add(run.ended, Cause.OPTIMIZER)
    return Attributed(tuple(line.times() for line in lines), tuple(map(tuple, waited)))


class _Line:
    """One stage's step as intervals, one after the other, each with its cause."""

    def __init__(self, run: Run) -> None:
        self._before_is_known = run.gap is not None
        self._starts: list[int] = []
        self._causes: list[Cause] = []
        self._now = run.began - (run.gap or 0)
        self._sums = [0] * len(Cause)
        self.add(run.began, Cause.DRIVER)

    def times(self) -> Times:
        """All intervals by cause."""
        return Times(*self._sums)

    def add(self, until: int, cause: Cause) -> None:
        """Puts the time from the last interval's end to ``until`` down to ``cause``."""
        if until <= self._now:
            return
        self._sums[cause] += until - self._now
        if not self._causes or self._causes[-1] is not cause:
            self._starts.append(self._now)
            self._causes.append(cause)
        self._now = until

    def wait(self, until: int, sender: _Line, allowed: int | None, skew: int = 0) -> int:
        """Puts the time to ``until``, in which this stage waits for ``sender``, down to what that one did.

        Args:
            until: when the wait, or the action of the sender, ended.
            sender: the other stage, as far as that action.
            allowed: how much time of computing is dependency; None for all of it.
            skew: how much of the time in which the sender was still in its step before is.

        Returns:
            What is dependency.
        """
        found = 0
        for start, end, cause in sender._between(self._now, until):
            length = end - start
            if cause is None:
                inherent = min(length, skew)
                rest = Cause.STRAGGLER if sender._before_is_known else Cause.DRIVER
            elif cause in _COMPUTED:
                inherent = length if allowed is None else min(length, allowed)
                allowed = None if allowed is None else allowed - inherent
                rest = Cause.STRAGGLER
            else:
                inherent, rest = 0, cause
            found += inherent
            self.add(start + inherent, Cause.DEPENDENCY)
            self.add(end, rest)
        return found

    def _between(self, start: int, end: int) -> Iterator[tuple[int, int, Cause | None]]:
        """The intervals from ``start`` to ``end``, which has been reached; no cause for what was before the first."""
        at = bisect_right(self._starts, start) - 1
        while start < end:
            until = self._starts[at + 1] if at + 1 < len(self._starts) else end
            until = min(until, end)
            yield start, until, self._causes[at] if at >= 0 else None
            start, at = until, at + 1
