"""Schedules in the CSV of ``torch.distributed.pipelining``: one row a stage, one action a cell."""

from __future__ import annotations

import csv
import io
import re

from ..errors import ScheduleError
from .action import Action, Programs

__all__ = ["read_csv", "write_csv"]

_NOT_OURS = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD)[0-9]*")
_OVERLAP = re.compile(r"\((.*)\)OVERLAP_F_B")


def write_csv(programs: Programs) -> str:
    """The programs as CSV text that torch reads (its compute-only format), each row with its own number of cells."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([str(action) for action in program] for program in programs)
    return text.getvalue()


def read_csv(text: str) -> Programs:
    """The programs in CSV text of either of torch's formats, with communication or without.

    Programs keep what is computed. So empty cells (idle slots) are skipped, and also sends and receives, which raypipe
    derives from the programs, and ``UNSHARD``, ``RESHARD`` and ``REDUCE_GRAD``. A pair that torch overlaps, such as
    ``(2F3;5B0)OVERLAP_F_B``, becomes its actions one after the other.

    Raises:
        ScheduleError: a cell that is no action; the sentence names line and cell.
    """
    rows = list(csv.reader(io.StringIO(text.removeprefix("\ufeff"))))
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    return tuple(
        tuple(
            action
            for column, cell in enumerate(row, start=1)
            for action in _actions(cell, line, column)
            if action.op.computes
        )
        for line, row in enumerate(rows, start=1)
    )


def _actions(cell: str, line: int, column: int) -> list[Action]:
    """The actions of one cell."""
    cell = cell.strip()
    overlap = _OVERLAP.fullmatch(cell)
    texts = overlap[1].split(";") if overlap else [cell]
    try:
        return [Action.parse(text) for text in texts if text and not _NOT_OURS.fullmatch(text)]
    except ValueError as error:
        raise ScheduleError(f"line {line}, cell {column} of the schedule's CSV: {error}") from None
