"""Which steps a report is made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training import batches_of_tokens, gpt, trainer_of

from raypipe.observe.events import Trace
from raypipe.observe.history import KEPT, History
from raypipe.schedule import build


def step(microbatches: int, began: float, forward: float = 1.0) -> list[Trace]:
    """One stage that does one action after the other, backwards twice as long as forwards."""
    program = build("1f1b", 1, microbatches).programs[0]
    now, rows = began, []
    for action in program:
        end = now + forward * (1 if action.op.value == "F" else 2)
        rows.append((now, now, end))
        now = end
    return [Trace(program, np.array(rows), began, now, 1)]


def schedule_of(microbatches: int):  # type: ignore[no-untyped-def]
    return build("1f1b", 1, microbatches)


def test_the_last_step_is_held_against_those_before_it() -> None:
    history = History()
    for number in range(KEPT + 3):
        history.add(step(2, 10.0 * number, forward=9.0 if number < 4 else 1.0))
    history.add(step(2, 10.0 * (KEPT + 3), forward=1.5))
    report = history.report(schedule_of)
    assert report.predicted.makespan == pytest.approx(6.0)  # of the steps that are still remembered
    assert max(span.end for span in report.measured) == pytest.approx(9.0)


def test_steps_of_other_programs_predict_nothing() -> None:
    history = History()
    for number, (microbatches, forward) in enumerate(((2, 9.0), (2, 9.0), (3, 1.0), (2, 1.0), (2, 2.0))):
        history.add(step(microbatches, 100.0 * number, forward))
    assert history.report(schedule_of).predicted.makespan == pytest.approx(6.0)
    history.add(step(5, 900.0, 3.0))
    report = history.report(schedule_of)
    assert (report.schedule.microbatches, report.predicted.makespan) == (5, pytest.approx(45.0))


def test_what_comes_between_two_steps_is_not_put_down_to_the_driver() -> None:
    history = History()
    history.add(step(2, 0.0))
    history.add(step(2, 10.0))
    assert history.report(schedule_of).difference.driver == 4 * 10**9
    history.interrupt()
    history.add(step(2, 100.0))
    report = history.report(schedule_of)
    assert (report.difference.driver, report.predicted.makespan) == (0, pytest.approx(6.0))
    history.add(step(2, 110.0))
    assert history.report(schedule_of).difference.driver == 4 * 10**9


def test_an_evaluation_is_no_part_of_the_step_after_it() -> None:
    first, second, valid = batches_of_tokens(3)
    with trainer_of(gpt(), 2, microbatches=4) as trainer:
        trainer.train_step(first)
        trainer.train_step(second)
        assert trainer.report().difference.driver > 0
        trainer.evaluate([valid])
        trainer.train_step(first)
        assert trainer.report().difference.driver == 0


def test_without_a_step_there_is_none() -> None:
    with pytest.raises(ValueError, match="report has no step to report on; call fit or train_step first"):
        History().report(schedule_of)


def test_a_trainers_report_adds_up_and_is_written(tmp_path: Path) -> None:
    """Also when its ranks are gone."""
    with trainer_of(gpt(layers=6), 2, schedule="zbv", microbatches=4) as trainer:
        with pytest.raises(ValueError, match="no step to report on"):
            trainer.report()
        for batch in batches_of_tokens(3):
            trainer.train_step(batch)
    report = trainer.report(tmp_path / "step.json")
    found = json.loads((tmp_path / "step.json").read_text())
    assert found["predicted"]["step"] + found["difference"]["total"] == found["measured"]["step"]
    assert len(found["measured"]["actions"]) == 2 * 2 * 4 * 3
    assert "zbv" in str(report)
    with pytest.raises(ValueError, match=r"ends in \.json or \.txt"):
        trainer.report(tmp_path / "step.html")
