"""The traces of the last steps, from which a report is made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from raypipe.observe.events import Trace
from raypipe.observe.report import Report
from raypipe.schedule import Schedule

__all__ = ["History"]

KEPT = 8
"""Steps: enough for medians that one slow step does not move."""


class History:
    """Remembers what the ranks reported of the last steps."""

    def __init__(self) -> None:
        self._steps: deque[list[Trace]] = deque(maxlen=KEPT)
        self._follows = self._interrupted = False

    def add(self, traces: Sequence[Trace]) -> None:
        """Takes one step's traces, by stage."""
        self._steps.append(list(traces))
        self._follows, self._interrupted = not self._interrupted, False

    def interrupt(self) -> None:
        """Something else than a step comes: what it takes is no part of the next step."""
        self._interrupted = True

    def report(self, schedule: Callable[[int], Schedule]) -> Report:
        """The last step, held against what the steps right before it that ran the same programs predict.

        Args:
            schedule: gives the schedule of a number of microbatches.

        Raises:
            ValueError: no step was taken.
        """
        if not self._steps:
            raise ValueError("report has no step to report on; call fit or train_step first")
        *before, last = self._steps
        programs = [trace.actions for trace in last]
        earlier: list[list[Trace]] = []
        for traces in reversed(before):
            if [trace.actions for trace in traces] != programs:
                break
            earlier.insert(0, traces)
        microbatches = 1 + max(action.microbatch for actions in programs for action in actions)
        return Report.of(schedule(microbatches), last, earlier=earlier, follows=self._follows)
