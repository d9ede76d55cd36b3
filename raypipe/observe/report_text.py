"""A report as text for a person: headline, drawings, tables, and a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raypipe.observe.causes import Cause, Times
from raypipe.observe.timeline import draw_two

if TYPE_CHECKING:
    from raypipe.observe.report import Report

__all__ = ["largest_cause", "report_text"]

_AS_PREDICTED = 0.01  # a smaller share of the predicted step is no difference worth a cause


def report_text(report: Report, width: int = 100) -> str:
    """The whole text; ``width`` is that of the drawings."""
    drawings = draw_two("predicted", report.predicted.spans, report.measured, report.schedule.stages, width)
    parts = [
        _headline(report),
        drawings,
        "where each stage's step went, in ms\n" + _table(_stages(report)),
        "predicted and measured, in ms\n" + _table(_predicted_and_measured(report)),
        "what made the step longer or shorter, along its critical path, in ms\n" + _table(_difference(report)),
        f"{largest_cause(report)}.",
    ]
    return "\n\n".join(parts)


def largest_cause(report: Report) -> str:
    """One sentence: what most of the difference is or, where there is next to none, most of the time not computing."""
    total, predicted = report.difference.total, report.predicted_ns
    if predicted and abs(total) >= _AS_PREDICTED * predicted:
        longer = "more" if total > 0 else "less"
        cause, lost = max(_causes(report), key=lambda item: item[1] if total > 0 else -item[1])
        return (
            f"the step took {_ms(abs(total))} ms {longer} than predicted ({total / predicted:+.1%}); the largest cause "
            f"is {cause}: {_signed(lost)} ms"
        )
    idle = {cause: sum(times[cause] for times in report.stages) for cause in Cause if cause is not Cause.COMPUTE}
    cause_of_idle = max(idle, key=lambda cause: idle[cause])
    whole = sum(map(sum, report.stages))
    if not idle[cause_of_idle]:
        return "the step went as predicted, and every stage computed all the time"
    return (
        f"the step went as predicted; the largest part of the time in which stages do not compute is {cause_of_idle}: "
        f"{_ms(idle[cause_of_idle])} ms, {idle[cause_of_idle] / whole:.1%} of all stages' time"
    )


def _headline(report: Report) -> str:
    predicted, measured = report.predicted_ns, report.step_ns
    change = f" ({measured / predicted - 1:+.1%})" if predicted else ""
    return (
        f"{report.schedule.headline()}: a step of {_ms(measured)} ms, predicted {_ms(predicted)} ms{change}; bubble "
        f"{report.bubble:.1%}, predicted {report.predicted.bubble:.1%}"
    )


def _stages(report: Report) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [("", *map(str, Cause), "step")]
    for stage, times in enumerate(report.stages):
        rows.append((f"stage {stage}", *(_share(time, sum(times)) for time in times), _ms(sum(times))))
    if len(report.stages) > 1:
        sums = Times(*map(sum, zip(*report.stages, strict=True)))
        rows.append(("all", *(_share(time, sum(sums)) for time in sums), _ms(sum(sums))))
    return rows


def _predicted_and_measured(report: Report) -> list[Sequence[str]]:
    """The makespan, and of each stage what it computes and what it idles in it."""
    rows: list[Sequence[str]] = [("", "predicted", "measured", "change")]

    def add(name: str, predicted: int, measured: int) -> None:
        rows.append((name, _ms(predicted), _ms(measured), _signed(measured - predicted)))

    add("makespan", report.predicted_ns, report.makespan_ns)
    for stage, (plan, times) in enumerate(zip(report.predicted_stages, report.stages, strict=True)):
        add(f"stage {stage} computing", plan.compute, times.compute)
        add(f"stage {stage} idle", report.predicted_ns - plan.compute, report.makespan_ns - times.compute)
    return rows


def _difference(report: Report) -> list[Sequence[str]]:
    rows = [(cause, _signed(lost)) for cause, lost in _causes(report) if lost]
    return [*rows, ("sum", _signed(report.difference.total))]


def _causes(report: Report) -> list[tuple[str, int]]:
    lost = report.difference
    return [
        *((f"compute on stage {stage}", slower) for stage, slower in enumerate(lost.compute)),
        (str(Cause.COMMUNICATION), lost.communication),
        (str(Cause.DATA), lost.data),
        (str(Cause.DRIVER), lost.driver),
        (str(Cause.OPTIMIZER), lost.optimizer),
        ("another path was predicted to be critical", lost.another_path),
    ]


def _ms(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.3f}"


def _signed(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:+.3f}"


def _share(part: int, whole: int) -> str:
    return f"{_ms(part)} ({part / whole if whole else 0:5.1%})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()

    return "\n".join(map(line, rows))
