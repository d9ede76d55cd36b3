"""A step's measured times beside the schedule that was planned, on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from raypipe.observe.events import END, START, Trace
from raypipe.schedule import Costs, Op, Schedule, Span, draw_spans

__all__ = [
    "bubble",
    "check_traces",
    "draw_planned_and_measured",
    "draw_two",
    "mean_costs",
    "measured_spans",
    "median_costs",
    "origins",
]


def measured_spans(traces: Sequence[Trace]) -> tuple[Span, ...]:
    """When each action was computed.

    Args:
        traces: of one step, by stage.

    Returns:
        All actions, those of one stage in its order; seconds since the first of them started.

    Raises:
        ValueError: nothing was measured.
    """
    spans = [
        Span(stage, action, float(times[START]) - origin, float(times[END]) - origin)
        for stage, (trace, origin) in enumerate(zip(traces, origins(traces), strict=True))
        for action, times in zip(trace.actions, trace.times, strict=True)
    ]
    if not spans:
        raise ValueError(f"{len(traces)} traces hold no action; give those of a step that was run")
    first = min(span.start for span in spans)
    return tuple(Span(span.stage, span.action, span.start - first, span.end - first) for span in spans)


def bubble(traces: Sequence[Trace]) -> float:
    """The share of the stages' time (stages times makespan) in which nothing was computed, 0 to 1.

    The makespan is from the first action's start to the last one's end, over all stages; so it compares with
    ``Simulation.bubble``.

    Args:
        traces: of one step, by stage.

    Raises:
        ValueError: nothing was measured.
    """
    return _bubble(measured_spans(traces), len(traces))


def mean_costs(traces: Sequence[Trace]) -> Costs:
    """What an action of each chunk takes, in seconds: the median over its microbatches.

    A median, so that one slow microbatch, such as a run's first, does not count. An operation that a chunk did not run
    costs nothing, and so does a message.

    Args:
        traces: of one step, by stage.

    Raises:
        ValueError: nothing was measured.
    """
    return median_costs([traces])


def median_costs(steps: Sequence[Sequence[Trace]]) -> Costs:
    """The same over several steps.

    Args:
        steps: for each the traces of its stages; their numbers of microbatches may differ.

    Raises:
        ValueError: nothing was measured.
    """
    seconds: dict[tuple[Op, int], list[float]] = {}
    for span in (span for traces in steps for span in measured_spans(traces)):
        seconds.setdefault((span.action.op, span.action.chunk), []).append(span.end - span.start)
    if not seconds:
        raise ValueError("there are no steps to take costs from; give the traces of at least one")
    chunks = range(1 + max(chunk for _, chunk in seconds))

    def of(op: Op) -> tuple[float, ...]:
        return tuple(median(seconds.get((op, chunk), [0.0])) for chunk in chunks)

    return Costs(forward=of(Op.FORWARD), backward=of(Op.BACKWARD), input=of(Op.INPUT), weight=of(Op.WEIGHT))


def draw_planned_and_measured(
    schedule: Schedule, traces: Sequence[Trace], width: int = 100, costs: Costs | None = None
) -> str:
    """The schedule played against the measured costs, and below it what was measured, on the same axis of milliseconds.

    What the second has and the first has not is the cost of messages, of waiting, and of actions of uneven length.

    Args:
        schedule: that was run.
        traces: of one step, by stage.
        width: columns of the drawing, at least 40.
        costs: to play it against, in seconds; where there are none, ``mean_costs`` of these traces.

    Raises:
        ValueError: traces of another schedule, or too small a width.
    """
    check_traces(schedule, traces)
    planned = schedule.simulate(costs or mean_costs(traces)).spans
    return draw_two("planned", planned, measured_spans(traces), schedule.stages, width)


def draw_two(title: str, planned: Sequence[Span], measured: Sequence[Span], stages: int, width: int = 100) -> str:
    """Planned and measured spans, one below the other on the same axis of milliseconds.

    Args:
        title: what the upper one is called.
        planned: in seconds from 0.
        measured: likewise.
        stages: the number of rows of each.
        width: columns of the drawing, at least 40.

    Raises:
        ValueError: too small a width.
    """
    until = max(span.end for span in (*planned, *measured)) * 1e3

    def draw(title: str, spans: Sequence[Span]) -> str:
        makespan = max(span.end for span in spans)
        share = _bubble(spans, stages)
        scaled = [Span(span.stage, span.action, span.start * 1e3, span.end * 1e3) for span in spans]
        line = f"{title}: makespan {makespan * 1e3:.4g} ms, bubble {share:.1%}"
        return draw_spans(scaled, stages, width, line, "ms", until=until)

    return f"{draw(title, planned)}\n\n{draw('measured', measured)}"


def check_traces(schedule: Schedule, traces: Sequence[Trace]) -> None:
    """Holds that the traces are of a step of this schedule.

    Raises:
        ValueError: they are not.
    """
    if tuple(trace.actions for trace in traces) != schedule.programs:
        raise ValueError(
            f"the traces of {len(traces)} ranks are not of {schedule.headline()}; "
            "give one for each stage, of a step that ran this schedule"
        )


def _bubble(spans: Sequence[Span], stages: int) -> float:
    """Of spans that count from 0."""
    makespan = max(span.end for span in spans)
    busy = sum(span.end - span.start for span in spans)
    return max(0.0, 1.0 - busy / (stages * makespan)) if makespan else 0.0


def origins(traces: Sequence[Trace]) -> list[float]:
    """What to take from each trace's times so that they count from one moment.

    All ranks of a step exchange messages, so their times overlap. Where they do not, the ranks ran on hosts whose
    clocks count from different moments; each is then taken to have begun the step at the same one.
    """
    one_clock = max((t.started for t in traces), default=0.0) <= min((t.ended for t in traces), default=0.0)
    return [0.0 if one_clock else trace.started for trace in traces]
