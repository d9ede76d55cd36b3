from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from raypipe.driver.results import LocalResult, Results


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.setenv("HOME", str(tmp_path))
    return Results(None, log_every=3)


def log(results: Results, steps: range) -> None:
    for step in steps:
        results.log({"step": step, "loss": 1.0 / (step + 1)})


def test_every_third_step_and_the_last_are_rows(results: Results) -> None:
    log(results, range(6))
    results.log_last()
    assert [row["step"] for row in results.rows] == [0, 3, 5]
    results.log_last()
    assert len(results.rows) == 3


def test_an_evaluation_joins_its_steps_row(results: Results) -> None:
    log(results, range(2))
    results.log_evaluation({"loss": 9.0})
    assert results.rows[-1] == {"step": 1, "loss": 0.5, "valid_loss": 9.0}
    log(results, range(2, 4))
    results.log_evaluation({"loss": 8.0})
    assert [row["step"] for row in results.rows] == [0, 1, 3]
    assert results.rows[-1]["valid_loss"] == 8.0


def test_files_and_result(results: Results) -> None:
    log(results, range(4))
    results.log_evaluation({"loss": 9.0})
    results.write("a drawing")
    results.write(None)  # what is drawn stays
    found = results.result("local")
    assert isinstance(found, LocalResult)
    assert found.metrics == {"step": 3, "loss": 0.25, "valid_loss": 9.0}
    rows = list(csv.DictReader((Path(found.path) / "metrics.csv").open()))
    assert [(row["step"], row["valid_loss"]) for row in rows] == [("0", ""), ("3", "9.0")]
    assert (Path(found.path) / "schedule.txt").read_text() == "a drawing\n"
    assert sorted(path.name for path in Path(found.path).iterdir()) == ["metrics.csv", "schedule.txt"]
    assert found.metrics_dataframe["step"].tolist() == [0, 3]


def test_rays_result_has_the_same_attributes(results: Results) -> None:
    from ray.train import Result

    log(results, range(1))
    found = results.result("ray")
    local: Any = results.result("local")
    assert isinstance(found, Result)
    for name in vars(local):
        assert hasattr(found, name), name
    assert found.metrics == local.metrics
    assert found.metrics_dataframe.equals(local.metrics_dataframe)


def test_nothing_is_made_before_it_is_opened(results: Results, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    assert results.open() == results.open()
    assert len(list((tmp_path / "ray_results").iterdir())) == 1
