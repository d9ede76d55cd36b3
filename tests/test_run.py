from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raypipe.data import Cursor, Feed, open_source
from raypipe.driver.controller import Controller
from raypipe.driver.local import LocalGang
from raypipe.driver.results import Results
from raypipe.options import Options
from raypipe.planning import make_plan
from raypipe.run import Run, start

BATCHES = [(torch.rand(4, 4), torch.rand(4, 4)) for _ in range(5)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run_of(evaluate: Any = None, **options: Any) -> tuple[Run, Results]:
    given = {"loss": nn.functional.mse_loss, "backend": "local", "quiet": True, "log_every": 2, **options}
    plan = make_plan(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), Options(2, **given), BATCHES[0])
    gang = start(plan)
    assert isinstance(gang, LocalGang)
    results = Results(None, 2)
    return Run(Controller(gang, plan.gradients(), plan.admission()), plan, results, evaluate, None), results


def feed(epochs: int = 1) -> Feed:
    return Feed(open_source(BATCHES), start=Cursor(), epochs=epochs, steps=None)


def test_the_cursor_is_that_of_the_steps_that_were_done() -> None:
    run, results = run_of()
    with feed(2) as batches:
        run.fit(batches)
    assert run.cursor == Cursor(2, 0, 0)
    assert [row["step"] for row in results.rows] == [0, 2, 4, 6, 8, 9]


def test_evaluation_is_due_every_so_many_steps_and_not_at_the_end() -> None:
    asked: list[int] = []
    run, results = run_of(lambda: {"loss": float(asked.append(1) or len(asked))}, evaluate_every=2)
    with feed() as batches:
        run.fit(batches)
    assert [(row["step"], row.get("valid_loss")) for row in results.rows] == [
        (0, None),
        (1, 1.0),
        (2, None),
        (3, 2.0),
        (4, None),
    ]


def test_a_failure_leaves_the_rows_and_the_cursor_of_what_was_done(home: Path) -> None:
    def evaluate() -> dict[str, Any]:
        raise KeyboardInterrupt

    run, _ = run_of(evaluate, evaluate_every=3)
    with feed() as batches, pytest.raises(KeyboardInterrupt):
        run.fit(batches)
    assert run.cursor == Cursor(0, 0, 3)
    (rows,) = home.rglob("metrics.csv")
    assert [line.split(",")[1] for line in rows.read_text().splitlines()] == ["step", "0", "2"]


def test_the_drawing_has_both_timelines() -> None:
    run, _ = run_of()
    with feed() as batches:
        result = run.fit(batches)
    text = (Path(result.path) / "schedule.txt").read_text()
    assert text.count("makespan") == 2
    assert text == run.drawn() + "\n"
