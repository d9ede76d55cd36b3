"""A step as it was predicted and as it was measured, and where the difference went."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raypipe.observe.causes import Times, attribute
from raypipe.observe.difference import Difference, difference
from raypipe.observe.events import Trace
from raypipe.observe.report_text import largest_cause, report_text
from raypipe.observe.runs import measured_runs, nanoseconds, planned_runs
from raypipe.observe.timeline import check_traces, measured_spans, median_costs
from raypipe.schedule import Costs, Schedule, Simulation, Span
from raypipe.schedule.costs import ByChannel

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """One step of every stage, predicted and measured. ``print`` shows drawings, tables and the largest cause.

    Where the ranks share one thread (``backend="local"``) they take turns, and a turn of another rank shows as exposed
    communication: such a step was not run in parallel.
    """

    schedule: Schedule
    """What was run."""
    costs: Costs
    """Of the prediction, in seconds."""
    predicted: Simulation
    """The schedule played against them."""
    measured: tuple[Span, ...]
    """All actions; seconds since the first of them started."""
    predicted_stages: tuple[Times, ...]
    """For each stage the predicted makespan by cause: compute, dependency, exposed communication."""
    stages: tuple[Times, ...]
    """For each stage the measured step by cause, from the end of the step before where that is known."""
    difference: Difference
    """By what the measured step was longer than the predicted makespan, along the critical path."""

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        traces: Sequence[Trace],
        *,
        costs: Costs | None = None,
        earlier: Sequence[Sequence[Trace]] = (),
        follows: bool = True,
        latency: float | ByChannel | None = None,
    ) -> Report:
        """The report of a step.

        Args:
            schedule: that was run.
            traces: of the step, by stage.
            costs: of the prediction, in seconds; without them the medians of ``earlier``, else of ``traces``.
            earlier: the traces of steps before this one, so that the prediction does not know the step that it is held
                against.
            follows: whether the last of them was right before it; the time that the driver took in between then shows.
            latency: seconds of every channel, or ``{(source stage, target stage): seconds}``, in the place of that of
                the costs.

        Raises:
            ValueError: traces of another schedule, times that run backwards, or costs that are not of this schedule.
        """
        check_traces(schedule, traces)
        costs = costs or median_costs(earlier or [traces])
        if latency is not None:
            costs = dataclasses.replace(costs, latency=latency)
        predicted = schedule.simulate(costs)
        planned = planned_runs(schedule.programs, predicted)
        runs = measured_runs(traces, earlier[-1] if earlier and follows else None)
        expected = attribute(schedule, planned)
        return cls(
            schedule=schedule,
            costs=costs,
            predicted=predicted,
            measured=measured_spans(traces),
            predicted_stages=expected.times,
            stages=attribute(schedule, runs, expected.inherent).times,
            difference=difference(schedule, costs, planned, runs),
        )

    @property
    def makespan_ns(self) -> int:
        """From the first action's start to the last one's end, as measured."""
        return nanoseconds(max(span.end for span in self.measured))

    @property
    def predicted_ns(self) -> int:
        """The predicted makespan; a step that goes as predicted takes just that."""
        return nanoseconds(self.predicted.makespan)

    @property
    def step_ns(self) -> int:
        """The measured step along its critical path: with the driver, the data and the optimizer."""
        return self.predicted_ns + self.difference.total

    @property
    def bubble(self) -> float:
        """Share of the stages' time (stages times measured makespan) in which nothing was computed, 0 to 1."""
        whole = len(self.stages) * self.makespan_ns
        return max(0.0, 1.0 - sum(times.compute for times in self.stages) / whole) if whole else 0.0

    @property
    def changes(self) -> tuple[Times, ...]:
        """For each stage by how much each cause takes longer than predicted, in nanoseconds; negative: less."""
        pairs = zip(self.stages, self.predicted_stages, strict=True)
        return tuple(Times(*(now - plan for now, plan in zip(*pair, strict=True))) for pair in pairs)

    @property
    def largest(self) -> str:
        """One sentence that names the largest cause."""
        return largest_cause(self)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data for JSON: times in whole nanoseconds, an action as (stage, text, start, end)."""
        return {
            "schedule": self.schedule.headline(),
            "unit": "ns",
            "predicted": {
                "step": self.predicted_ns,
                "makespan": self.predicted_ns,
                "bubble": self.predicted.bubble,
                "stages": [times._asdict() for times in self.predicted_stages],
                "actions": _rows(self.predicted.spans),
            },
            "measured": {
                "step": self.step_ns,
                "makespan": self.makespan_ns,
                "bubble": self.bubble,
                "stages": [times._asdict() for times in self.stages],
                "actions": _rows(self.measured),
            },
            "difference": {
                **self.difference._asdict(),
                "compute": list(self.difference.compute),
                "total": self.difference.total,
                "stages": [times._asdict() for times in self.changes],
            },
            "largest": self.largest,
        }

    def write(self, path: str | Path) -> None:
        """Writes ``to_dict()`` to a ``.json``, or the text to a ``.txt``.

        Raises:
            ValueError: another suffix.
            FileNotFoundError: there is no such folder.
        """
        suffix = Path(path).suffix
        if suffix not in (".json", ".txt"):
            raise ValueError(f"a report cannot be written to {str(path)!r}; give a path that ends in .json or .txt")
        if not Path(path).parent.is_dir():
            raise FileNotFoundError(
                f"a report cannot be written to {str(path)!r}, as the folder {str(Path(path).parent)!r} is missing; "
                "make it first, or give a path in a folder that is there"
            )
        text = json.dumps(self.to_dict()) if suffix == ".json" else str(self)
        Path(path).write_text(f"{text}\n", encoding="utf-8")

    def __str__(self) -> str:
        return report_text(self)


def _rows(spans: Sequence[Span]) -> list[list[int | str]]:
    return [[span.stage, str(span.action), nanoseconds(span.start), nanoseconds(span.end)] for span in spans]
