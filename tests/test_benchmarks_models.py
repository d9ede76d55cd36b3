"""An emulated layer sleeps once for each gradient, however a backward is taken apart."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import Sleeps, first_mean, sleepers
from raypipe.model.split_backward import SplitBackward
from raypipe.model.weight_queue import WeightQueue

F, I, W = 1.0, 2.0, 3.0  # noqa: E741


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    log: list[float] = []
    monkeypatch.setattr("benchmarks.models.time.sleep", log.append)
    return log


def test_a_whole_backward_sleeps_for_both(slept: list[float]) -> None:
    first_mean(sleepers(2, Sleeps(F, I, W), width=4)(torch.zeros(1, 1)), torch.zeros(1)).backward()
    assert slept[:2] == [F, F]
    assert sorted(slept[2:]) == [I, I, W, W]


def test_the_peers_halves_sleep_for_one_each(slept: list[float]) -> None:
    chunk = pickle.loads(pickle.dumps(sleepers(3, Sleeps(F, I, W), width=4)))[1:]
    x = torch.zeros(1, 4, requires_grad=True)
    y = chunk(x)
    slept.clear()
    (gradient,), groups = stage_backward_input([y], [torch.ones_like(y)], [x], chunk.parameters())
    assert slept == [I, I]
    assert torch.equal(gradient, torch.ones(1, 4))
    stage_backward_weight(chunk.parameters(), groups)
    assert slept == [I, I, W, W]
    assert all(p.grad is not None for p in chunk.parameters())


def test_raypipes_halves_sleep_for_one_each(slept: list[float]) -> None:
    model, queue = sleepers(2, Sleeps(F, I, W), width=4), WeightQueue()
    with SplitBackward(queue):
        loss = first_mean(model(torch.zeros(1, 1)), torch.zeros(1))
    slept.clear()
    with SplitBackward(queue):
        loss.backward()
    assert slept == [I, I]  # the first layer's too: an embedding stands before it
    queue.drain()
    assert slept == [I, I, W, W]
    assert all(p.grad is not None for p in model.parameters())


def test_a_chunk_has_its_share_of_a_stages_sleeps() -> None:
    assert Sleeps(F, I, W).shared(2) == (F / 2, I / 2, W / 2)
    assert Sleeps(F, I, W).backward == I + W
