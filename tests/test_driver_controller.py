from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.data import Cursor, Draw, unpack
from raypipe.driver.controller import AHEAD, Controller, data_error
from raypipe.driver.gang import Pending
from raypipe.driver.status import GroupStatus
from raypipe.errors import StageError
from raypipe.observe.events import Trace
from raypipe.schedule import Action
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.spec import Gradients
from raypipe.topology import Topology

TRACE = Trace((Action.parse("0F0"),), np.array([[0.0, 0.0, 1.0]]), 0.0, 1.0, 1)


@dataclass
class ToyGang:
    """One rank that writes down what it was asked; a batch of -1 fails."""

    log: list[str] = field(default_factory=list)
    open: int = 0
    most: int = 0
    failure: GroupStatus | None = None
    turns: list[int] = field(default_factory=list)

    def put(self, value: Any) -> Any:
        return unpack(value)

    def train_step(self, step: int, batch: Any) -> Pending:
        return self._submitted(f"train {step}", Pending(step, "train", (batch,)))

    def forward_step(self, step: int, batch: Any, kind: str, replica: int = 0) -> Pending:
        self.turns.append(replica)
        return self._submitted(f"{kind} {int(batch)}", Pending(step, kind, (batch,)))

    def state(self) -> list[Any]:
        return []

    def wait(self, pending: Pending) -> list[Any]:
        self.open -= 1
        self.log.append(f"took {pending.kind} {pending.step}")
        (batch,) = pending.calls
        if pending.kind == "train":
            if int(batch) < 0:
                raise StageError(0, "0F0", pending.step, ValueError("told to fail"))
            return [TrainReport(pending.step, 1, 1, float(batch), 1.0, np.zeros(0), (), TRACE)]
        return [ForwardReport(1, float(batch), 1.0, {})]

    def drop(self, pending: Pending) -> None:
        pass

    def close(self) -> None:
        self.log.append("closed")

    def _submitted(self, text: str, pending: Pending) -> Pending:
        self.log.append(text)
        self.open += 1
        self.most = max(self.most, self.open)
        return pending


def draws(count: int, *, fails_at: int | None = None, first: int = 0) -> Iterator[Draw]:
    for step in range(first, first + count):
        if step == fails_at:
            raise ZeroDivisionError("my own")
        last = step == first + count - 1
        yield Draw(torch.tensor(step), step, 0, Cursor(0, 0, step + 1), last, last)


@pytest.fixture
def gang() -> ToyGang:
    return ToyGang()


@pytest.fixture
def controller(gang: ToyGang) -> Controller:
    return Controller(gang, Gradients(((),), ()), lambda batch: None)


def test_one_step_is_queued_while_one_runs(gang: ToyGang, controller: Controller) -> None:
    steps: list[int] = []
    controller.train(draws(4), lambda metrics: steps.append(metrics["step"]))
    assert steps == [0, 1, 2, 3]
    assert gang.log[:4] == ["train 0", "train 1", "took train 0", "train 2"]
    assert gang.most == AHEAD + 1
    assert gang.open == 0
    assert controller.step == 4


def test_a_pause_finds_the_pipeline_empty(gang: ToyGang, controller: Controller) -> None:
    paused: list[tuple[int, int]] = []
    controller.train(
        draws(5),
        lambda metrics: None,
        pause_after=lambda draw: draw.step == 1,
        on_pause=lambda draw: paused.append((draw.step, gang.open)),
    )
    assert paused == [(1, 0), (4, 0)]


def test_steps_go_on_where_the_last_run_ended(controller: Controller) -> None:
    controller.train(draws(2), lambda metrics: None)
    controller.train(draws(2, first=2), lambda metrics: None)
    assert controller.train_step(torch.tensor(7.0))["step"] == 4


def test_the_datas_exception_comes_after_the_steps_before_it(gang: ToyGang, controller: Controller) -> None:
    steps: list[int] = []
    with pytest.raises(StageError) as caught:
        controller.train(draws(5, fails_at=3), lambda metrics: steps.append(metrics["step"]))
    assert steps == [0, 1, 2]
    assert (caught.value.stage, caught.value.action, caught.value.step) == (0, "data", 3)
    assert gang.open == 0


def test_what_is_queued_is_taken_before_a_batch_is_refused(gang: ToyGang) -> None:
    """Whoever refuses it: also a schedule that is not for so few microbatches."""

    def admit(batch: Any) -> None:
        if int(batch) == 2:
            raise ValueError("not for so few")

    controller, steps = Controller(gang, Gradients(((),), ()), admit), list[int]()
    with pytest.raises(ValueError, match="not for so few"):
        controller.train(draws(4), lambda metrics: steps.append(metrics["step"]))
    assert (steps, gang.open, controller.step) == ([0, 1], 0, 2)


def test_replicas_take_turns_at_batches_and_each_has_one_to_run(gang: ToyGang) -> None:
    refused: list[int] = []
    controller = Controller(
        gang,
        Gradients(((),), ()),
        lambda batch: refused.append(int(batch)),
        topology=Topology(1, 3),
        admit_whole=lambda batch: None,
    )
    assert controller.evaluate(map(torch.tensor, range(1, 8)))["loss"] == pytest.approx(4.0)
    assert gang.turns == [0, 1, 2, 0, 1, 2, 0]
    assert gang.most == AHEAD + 3
    assert refused == []  # what a share must have is asked of training alone


def test_a_failed_step_comes_out_as_it_is(gang: ToyGang, controller: Controller) -> None:
    failing = (Draw(torch.tensor(-1), step, 0, Cursor(), False, False) for step in range(3))
    with pytest.raises(StageError, match="told to fail"):
        controller.train(failing, lambda metrics: None)


def test_what_raypipe_itself_refuses_stays_a_sentence() -> None:
    with pytest.raises(AttributeError) as caught:
        unpack(3)  # type: ignore[arg-type]
    assert data_error(caught.value, 0) is caught.value
    assert isinstance(data_error(ValueError("made by hand"), 2), StageError)


def test_forwards_are_in_order_and_one_ahead(gang: ToyGang, controller: Controller) -> None:
    metrics = controller.evaluate(torch.tensor(float(n)) for n in range(3))
    assert metrics == {"loss": 1.0, "samples": 3}
    assert gang.log[:3] == ["evaluate 0", "evaluate 1", "took evaluate 0"]
    with pytest.raises(ValueError, match="empty"):
        controller.evaluate([])


def test_the_datas_exception_in_an_evaluation(controller: Controller) -> None:
    def data() -> Iterator[Any]:
        yield torch.tensor(1.0)
        raise ZeroDivisionError("my own")

    with pytest.raises(StageError, match="action data"):
        controller.evaluate(data())
