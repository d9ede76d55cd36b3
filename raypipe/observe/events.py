"""What a rank did and when: one row of three times an action, in a buffer that is made once a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from raypipe.schedule import Action

__all__ = ["Recorder", "Trace"]

FROM, START, END = range(3)


@dataclass(frozen=True, slots=True)
class Trace:
    """The measured times of one rank's program in one step.

    Attributes:
        actions: of the program, in order.
        times: float64 of shape [actions, 3]: when the rank turned to the action, when its input was there and the
            computing started, when it ended; seconds of the host's monotonic clock.
        started: when the step began on this rank.
        ended: when it was over, optimizer included.
        peak_in_flight: the most microbatches whose forward was done and whose backward was not.
    """

    actions: tuple[Action, ...]
    times: NDArray[np.float64]
    started: float
    ended: float
    peak_in_flight: int

    @property
    def busy(self) -> float:
        """Seconds in which an action was computed; waiting for its input is never counted."""
        return float((self.times[:, END] - self.times[:, START]).sum())

    @property
    def waiting(self) -> float:
        """Seconds in which the rank waited for an action's input."""
        return float((self.times[:, START] - self.times[:, FROM]).sum())


class Recorder:
    """Writes the times of a program's actions.

    Args:
        actions: of the program, in order.
        started: when the step began on this rank; None: now.
    """

    def __init__(self, actions: Sequence[Action], started: float | None = None) -> None:
        self._actions = tuple(actions)
        self._times = [(0.0, 0.0, 0.0)] * len(self._actions)
        self.started = monotonic() if started is None else started
        self._peak = 0

    def write(self, index: int, turned: float, start: float, end: float, in_flight: int) -> None:
        """Writes action ``index``; ``in_flight`` is the number of microbatches alive after it began."""
        self._times[index] = turned, start, end
        if in_flight > self._peak:
            self._peak = in_flight

    def trace(self) -> Trace:
        """What was written."""
        return Trace(self._actions, np.array(self._times).reshape(-1, 3), self.started, monotonic(), self._peak)
