"""docs/schedules.md is true: its grids, its numbers, its Python."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from raypipe.schedule import Costs, Schedule, build, names

PAGE = (Path(__file__).parents[1] / "docs" / "schedules.md").read_text()
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def makespan(
    name: str,
    stages: int,
    microbatches: int,
    forward: float = 1,
    input: float = 1,
    weight: float = 1,
    latency: float = 0,
) -> float:
    schedule = build(name, stages, microbatches)
    share = stages / schedule.chunks
    costs = Costs(forward * share, (input + weight) * share, input * share, weight * share, latency)
    return schedule.simulate(costs).makespan


def row_of(name: str) -> str:
    """The line of the table of numbers."""
    schedule = build(name, 8, 32)
    peak = max(schedule.simulate().peak_in_flight) * schedule.stages / schedule.chunks
    even = [makespan(name, p, m) for p, m in ((4, 8), (8, 32))]
    others = [
        makespan(name, 8, 32, latency=0.1),
        makespan(name, 8, 32, forward=1.25, input=1.5),
        makespan(name, 8, 32, input=1.5),
    ]
    numbers = [f"{number:.5g}" for number in (*even, peak, *others)]
    return f"| `{name}` | {' | '.join(numbers)} |"


@pytest.mark.parametrize("name", names())
def test_each_schedule_has_its_grid(name: str) -> None:
    section = PAGE.partition(f"### `{name}`\n")[2].partition("\n### ")[0]
    assert f"```text\n{build(name, 4, 8)}\n```" in section
    assert "Source: " in section


@pytest.mark.parametrize("name", names())
def test_each_schedule_has_its_numbers(name: str) -> None:
    assert row_of(name) in PAGE


def test_no_other_schedule_has_a_section() -> None:
    assert PAGE.count("\n### `") == len(names())


def test_the_python_runs_and_prints_what_stands_below_it() -> None:
    found = BLOCK.findall(PAGE)
    values: dict[str, Any] = {"__name__": "schedules"}
    compared = 0
    for number, (language, text) in enumerate(found):
        if language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(text, values)
            assert found[number + 1] == ("text", printed.getvalue())
            compared += 1
    assert compared == 4
    assert isinstance(values["mine"], Schedule)
