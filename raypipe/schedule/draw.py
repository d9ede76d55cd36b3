"""Schedules as text: a grid of time slots, and a timeline to scale for planned and measured times alike."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from .action import Action, Op, Programs
from .dry_run import dry_run
from .span import Span

__all__ = ["draw_programs", "draw_spans"]

_IDLE = "."
_FILL = {Op.FORWARD: ">", Op.BACKWARD: "<", Op.INPUT: "i", Op.WEIGHT: "w"}
_WORD = {Op.FORWARD: "forward", Op.BACKWARD: "backward", Op.INPUT: "input gradient", Op.WEIGHT: "weight gradient"}
_COLOR = {Op.FORWARD: "34", Op.BACKWARD: "32", Op.INPUT: "36", Op.WEIGHT: "33"}
_MARK_COLOR = "1;31"
_CROP_SLOTS, _CROP_STAGES = 10, 6  # on each side of the first mark
_MIN_WIDTH = 40
_TICK_COLUMNS = 10  # at least, from tick to tick


def draw_programs(
    programs: Programs,
    *,
    marks: Sequence[tuple[int, int]] = (),
    crop: bool = False,
    width: int | None = None,
    color: bool = False,
) -> str:
    """The programs as a grid: one row a stage, one column a time slot, in which each action takes one slot.

    Args:
        programs: for each stage its actions; programs that deadlock are drawn too, what never runs at the end.
        marks: (stage, index in its program) of actions to draw as ``>2F0<``.
        crop: draw only the neighbourhood of the first mark.
        width: columns of the terminal, where the grid is to be broken into bands that fit; else one band.
        color: colour the actions by ANSI codes.

    Returns:
        The grid, without a newline at the end.
    """
    rows = _grid(programs)
    slots = max(map(len, rows), default=0)
    marked = set(marks)
    texts = {
        (stage, index): f">{action}<" if (stage, index) in marked else str(action)
        for stage, program in enumerate(programs)
        for index, action in enumerate(program)
    }
    cell = max(map(len, texts.values()), default=1)
    shown_stages, shown_slots = range(len(programs)), range(slots)
    if crop and marks:
        stage, index = marks[0]
        shown_stages = _around(stage, _CROP_STAGES, len(programs))
        shown_slots = _around(rows[stage].index(index), _CROP_SLOTS, slots)
    label = len(_label(len(programs) - 1, len(programs)))
    band = len(shown_slots) if width is None else max(1, (width - label + 1) // (cell + 1))

    def draw_cell(stage: int, slot: int) -> str:
        index = rows[stage][slot] if slot < len(rows[stage]) else None
        if index is None:
            return f"{_IDLE:<{cell}}"
        text = texts[stage, index]
        code = _MARK_COLOR if (stage, index) in marked else _COLOR.get(programs[stage][index].op, "0")
        return _paint(text, code, color) + " " * (cell - len(text))

    blocks = []
    for first in range(shown_slots.start, shown_slots.stop, max(1, band)):
        part = range(first, min(first + band, shown_slots.stop))
        lines = [
            (_label(stage, len(programs)) + " ".join(draw_cell(stage, slot) for slot in part)).rstrip()
            for stage in shown_stages
        ]
        if len(part) < slots:
            lines.insert(0, f"slots {part.start} to {part.stop - 1} of {slots}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def draw_spans(
    spans: Sequence[Span],
    stages: int,
    width: int = 100,
    title: str | None = None,
    unit: str = "",
    color: bool = False,
    until: float | None = None,
) -> str:
    """A timeline to scale: one row a stage, planned times and measured ones alike.

    A forward is drawn as ``0>>>``, a backward as ``0<<<``, its halves with ``i`` and ``w``: the microbatch's number
    where it fits, then the letter of its kind. Dots are idle time. Time counts from the first start.

    Args:
        spans: what ran when, in any order.
        stages: the number of rows.
        width: columns of the whole drawing, at least 40.
        title: a line above it.
        unit: the unit of the times, named below the axis.
        color: colour the actions by ANSI codes.
        until: the time at the right end, so that several timelines share one axis; without it the last action's end.

    Returns:
        The drawing, without a newline at the end.

    Raises:
        ValueError: no spans, a span on a stage that there is not, too small a width, or ``until`` before the last end.
    """
    _check_spans(spans, stages, width)
    origin = min(span.start for span in spans)
    makespan = max(span.end for span in spans) - origin
    if until is not None and until < makespan:
        raise ValueError(f"until is {until:g}, but the last action ends at {makespan:g}; give that or later")
    end = makespan if until is None else until
    if end < sys.float_info.min:  # no float resolves parts of it
        end = 0.0
    indent = len(_label(0, stages))
    columns = width - indent

    def column(moment: float) -> int:
        return round((moment - origin) / end * columns) if end else 0

    over = column(origin + makespan) if end else columns  # nobody idles after the last action
    rows = [[_IDLE] * over + [" "] * (columns - over) for _ in range(stages)]
    for span in sorted(spans, key=lambda span: span.start):
        first = min(column(span.start), columns - 1)
        last = max(column(span.end), first + 1)
        rows[span.stage][first:last] = _bar(span.action, last - first, color)
    lines = [] if title is None else [title]
    lines += [_label(stage, stages) + "".join(row).rstrip() for stage, row in enumerate(rows)]
    lines += [" " * (indent - 1) + line for line in _axis(end, columns)]
    kinds = [f"{_FILL[op]} {_WORD[op]}" for op in _FILL if any(span.action.op is op for span in spans)]
    lines.append(" " * indent + "   ".join([*kinds, f"{_IDLE} idle", *([f"time in {unit}"] if unit else [])]))
    return "\n".join(lines)


def _check_spans(spans: Sequence[Span], stages: int, width: int) -> None:
    if not spans:
        raise ValueError("there are no spans to draw; give at least one")
    if width < _MIN_WIDTH:
        raise ValueError(f"width is {width}, but a timeline needs at least {_MIN_WIDTH} columns")
    for span in spans:
        if not 0 <= span.stage < stages:
            raise ValueError(f"{span.action} ran on stage {span.stage}, but the stages are 0 to {stages - 1}")


def _grid(programs: Programs) -> list[list[int | None]]:
    """For each stage, by slot, the index of its action or None; what never runs stands behind all that does."""
    run = dry_run(programs)
    rows: list[list[int | None]] = [[] for _ in programs]
    for slot, stage, index in run.steps:
        rows[stage] += [None] * (slot - len(rows[stage])) + [index]
    end = max(map(len, rows), default=0)
    for stage, at in run.blocked.items():
        rows[stage] += [None] * (end - len(rows[stage]))
        rows[stage] += range(at, len(programs[stage]))
    return rows


def _around(center: int, reach: int, size: int) -> range:
    return range(max(0, center - reach), min(size, center + reach + 1))


def _label(stage: int, stages: int) -> str:
    return f"stage {stage:>{len(str(stages - 1))}} |"


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text


def _bar(action: Action, columns: int, color: bool) -> list[str]:
    """``columns`` characters; the number only where one letter of the kind fits behind it."""
    number = str(action.microbatch)
    text = (number if len(number) < columns else "").ljust(columns, _FILL[action.op])
    return [_paint(character, _COLOR[action.op], color) for character in text]


def _axis(end: float, columns: int) -> tuple[str, str]:
    """Two lines: ticks at round times, and their labels."""
    step = _round_up(end * _TICK_COLUMNS / columns) if end > 0 else 1.0
    ruler, labels = ["-"] * (columns + 1), ""
    for tick in range(math.floor(end / step * (1 + 1e-9)) + 1):
        column = round(tick * step / end * columns) if end > 0 else 0
        ruler[column] = "+"
        text = f"{tick * step:g}"
        place = min(column, columns + 1 - len(text))
        if len(labels) <= place:  # times such as 2e-279 have no room at every tick
            labels = f"{labels.ljust(place)}{text} "
    return "".join(ruler), labels.rstrip()


def _round_up(value: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))
