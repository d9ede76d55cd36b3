"""Rows of measurements, their judgement, and the page that shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

__all__ = ["BEGIN", "END", "Row", "Subject", "counted", "measured", "page", "render", "spread"]

BEGIN = "<!-- measured: begin (python -m benchmarks writes between these lines) -->"
END = "<!-- measured: end -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One line: what was done, what came out, what is allowed, and whether it is (None: shown only)."""

    work: str
    measured: str
    bar: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Subject:
    """What one file measured: rows for the table, and texts (title, body) such as profiles to stand below it."""

    title: str
    rows: Sequence[Row]
    texts: Sequence[tuple[str, str]] = field(default_factory=tuple)


def spread(values: Sequence[float], unit: str = "") -> str:
    """``median (min..max)``; the unit ``%`` shows shares of 1 as percent."""
    scale, digits = (100.0, ".2f") if unit == "%" else (1.0, ".3f")
    low, middle, high = (format(scale * f(values), digits) for f in (min, median, max))
    return f"{middle}{_spaced(unit)} ({low}..{high})"


def measured(work: str, values: Sequence[float], bar: float | None = None, unit: str = "") -> Row:
    """A row that is judged by its median: at most ``bar``.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError(f"nothing was measured for {work!r}; run at least one round")
    if bar is None:
        return Row(work, spread(values, unit), "shown", None)
    shown = f"{100 * bar:g}" if unit == "%" else f"{bar:g}"
    return Row(work, spread(values, unit), f"at most {shown}{_spaced(unit)}", median(values) <= bar)


def counted(work: str, found: object, expected: object) -> Row:
    """A row that is judged by equality."""
    return Row(work, str(found), f"exactly {expected}", found == expected)


def render(subjects: Sequence[Subject], machine: str) -> str:
    """The machine, one table a subject, and the texts."""
    lines = [machine, ""]
    for subject in subjects:
        lines += [
            f"### {subject.title}",
            "",
            "| work | measured: median (min..max) | bar | met |",
            "| --- | --- | --- | --- |",
        ]
        words = {True: "yes", False: "**no**", None: "–"}
        lines += [f"| {row.work} | {row.measured} | {row.bar} | {words[row.met]} |" for row in subject.rows]
        lines.append("")
        for title, body in subject.texts:
            lines += [f"{title}:", "", "```", body.rstrip(), "```", ""]
    return "\n".join(lines)


def page(path: Path, text: str) -> None:
    """Writes ``text`` between the two marker lines of a page; what people wrote around them stays.

    Raises:
        ValueError: the page has not exactly one pair of markers.
    """
    before = path.read_text()
    if before.count(BEGIN) != 1 or before.count(END) != 1 or before.index(BEGIN) > before.index(END):
        raise ValueError(
            f"{path} has not one pair of marker lines; put {BEGIN!r} and {END!r} around the place of the table"
        )
    head, tail = before[: before.index(BEGIN)], before[before.index(END) + len(END) :]
    path.write_text(f"{head}{BEGIN}\n\n{text.rstrip()}\n\n{END}{tail}")


def _spaced(unit: str) -> str:
    return f" {unit}" if unit else ""
