from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from raypipe.driver.metrics import average, step_metrics, tokens_in
from raypipe.observe.events import Trace
from raypipe.schedule import Action
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.spec import Gradients
from raypipe.topology import Topology


def report(
    times: list[list[float]], loss: float | None = None, divisor: float | None = None, **more: Any
) -> TrainReport:
    actions = tuple(Action.parse(text) for text in ("0F0", "0B0"))
    trace = Trace(actions, np.array(times), times[0][0], times[-1][-1], more.get("peak", 1))
    return TrainReport(4, 8, 2, loss, divisor, np.array(more.get("norms", [])), more.get("lr", ()), trace)


def test_one_steps_metrics() -> None:
    """Two stages of 10 s, busy for 4 s and 6 s; norms 3 and 4, still to be divided by 2."""
    reports = [
        report([[0, 0, 2], [2, 8, 10]], norms=[6.0], peak=2),
        report([[0, 2, 4], [4, 4, 8]], 1.5, 2.0, norms=[8.0], lr=(0.1, 0.2)),
    ]
    metrics = step_metrics(reports, Gradients((("a",), ("b",)), ("a", "b")))
    assert metrics["step"] == 4
    assert metrics["loss"] == 1.5
    assert metrics["grad_norm"] == pytest.approx(5.0)
    assert metrics["lr"] == 0.1
    assert (metrics["samples"], metrics["microbatches"]) == (8, 2)
    assert metrics["seconds"] == 10
    assert metrics["bubble"] == pytest.approx(0.5)
    assert metrics["peak_in_flight"] == (2, 1)


def test_replicas_add_up_to_one_step() -> None:
    """Two replicas of two stages: losses add up, peaks are the most of a stage, the norm is counted by its owners."""
    quiet = [[0.0, 0.0, 2.0], [2.0, 2.0, 4.0]]
    reports = [
        report(quiet, norms=[6.0], peak=2),
        report(quiet, 0.5, 2.0, norms=[8.0], lr=(0.1,)),
        report(quiet, norms=[], peak=3),
        report(quiet, 0.25, 2.0, norms=[]),
    ]
    metrics = step_metrics(reports, Gradients((("a",), ("b",), (), ()), ("a", "b")), Topology(2, 2))
    assert metrics["loss"] == 0.75
    assert metrics["grad_norm"] == pytest.approx(5.0)
    assert (metrics["samples"], metrics["microbatches"], metrics["peak_in_flight"]) == (8, 2, (3, 1))
    assert metrics["bubble"] == pytest.approx(0.0)


def test_one_rank_of_a_tensor_group_tells_the_loss_and_the_norms() -> None:
    reports = [
        report([[0, 0, 2], [2, 2, 10]], 1.5, norms=[3.0, 4.0], peak=2),
        report([[0, 0, 9], [9, 9, 10]], 1.5, norms=[], peak=7),
    ]
    metrics = step_metrics(reports, Gradients((("a", "b"), ()), ("a", "b")), Topology(1, tensor=2))
    assert metrics["loss"] == 1.5
    assert metrics["grad_norm"] == pytest.approx(5.0)
    assert metrics["peak_in_flight"] == (7,)


def test_an_evaluation_averages_losses_by_weight_and_metrics_by_samples() -> None:
    reports = [ForwardReport(8, 1.0, 80.0, {"accuracy": 0.5}), ForwardReport(2, 4.0, 40.0, {"accuracy": 1.0})]
    assert average(reports) == {"loss": pytest.approx(2.0), "samples": 10, "accuracy": pytest.approx(0.6)}


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"tokens": torch.zeros(4, 6, dtype=torch.uint8), "targets": torch.zeros(4, 6)}, 24),
        ((torch.rand(4, 3), torch.zeros(4, dtype=torch.long)), None),
        ({"ids": np.zeros((2, 5), dtype=np.int32)}, 10),
        ({"x": torch.rand(4, 3)}, None),
    ],
)
def test_tokens(batch: Any, tokens: int | None) -> None:
    assert tokens_in(batch) == tokens


def test_under_fp16_a_step_says_whether_it_was_skipped() -> None:
    plain = report([[0, 0, 2], [2, 8, 10]], 1.5, 2.0, norms=[6.0])
    owned = Gradients((("a",),), ("a",))
    assert "skipped" not in step_metrics([plain], owned)
    taken = dataclasses.replace(plain, loss_scale=1024.0)
    skipped = dataclasses.replace(taken, non_finite="stage 0, the gradient of a")
    keys = ("loss_scale", "skipped", "non_finite")
    assert [step_metrics([taken], owned)[key] for key in keys] == [1024.0, False, None]
    assert [step_metrics([skipped], owned)[key] for key in keys] == [1024.0, True, "stage 0, the gradient of a"]
