"""``schedule="auto"``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import batches_of_tokens, gpt, piped, trainer_of

from raypipe.accounting import costs_of
from raypipe.model.cost import CallTime
from raypipe.model.partition import Chunk
from raypipe.plan import Plan
from raypipe.schedule import Auto


class Wide(nn.Module):
    """Most of its time is in products, so that halves of backwards are what they should be."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return x.square().mean()


def planned(schedule: object, **options: object) -> Plan:
    batch = {"x": torch.randn(64, 512, 256)}
    with trainer_of(Wide(), 4, schedule=schedule, microbatches=8, example=batch, **options) as trainer:
        return trainer.plan()


def test_the_fastest_by_measured_times_is_taken() -> None:
    plan = planned(Auto(latency=0.0, bandwidth=1e15))
    choice = plan.choice
    assert choice is not None
    assert plan.schedule == choice.schedule
    makespans = {(t.schedule.name, t.schedule.chunks): t.found.makespan for t in choice.tried}
    assert makespans[plan.schedule.name, plan.schedule.chunks] == min(makespans.values())
    assert {("1f1b", 4), ("interleaved_1f1b", 8), ("zbv", 8)} <= makespans.keys()
    times = [chunk.time for chunk in plan.partition.chunks]
    assert all(t is not None and t.weight > 0 and t.input > 0 and t.backward > 0 and t.forward > 0 for t in times)
    assert "chosen among" in str(plan)


def test_the_bubble_is_that_of_the_choice_with_its_messages() -> None:
    plan = planned(Auto(candidates=("1f1b",), latency=1.0))
    assert plan.choice is not None
    assert plan.choice.simulation.bubble > 0.9
    assert f"predicted bubble {plan.choice.simulation.bubble:.1%}" in str(plan)


def test_a_memory_limit_bars_what_would_not_fit() -> None:
    free = planned(Auto(candidates=("gpipe", "1f1b", "v_min")))
    assert free.choice is not None
    peaks = {tried.schedule.name: tried.peak_bytes for tried in free.choice.tried}
    assert peaks["gpipe"] > peaks["1f1b"]
    bound = planned(Auto(candidates=("gpipe", "1f1b"), memory_bytes=peaks["1f1b"]))
    assert bound.schedule.name == "1f1b"
    assert bound.choice is not None
    assert [tried.fits for tried in bound.choice.tried] == [False, True]
    with pytest.raises(ValueError, match="no schedule of 2 fits in memory: the smallest peak is that of 1f1b"):
        planned(Auto(candidates=("gpipe", "1f1b"), memory_bytes=1000))


def test_what_cannot_be_cut_into_so_many_chunks_is_left_out() -> None:
    plan = planned("auto", balance=[2, 2, 2, 2])
    assert plan.choice is not None
    assert {tried.schedule.chunks for tried in plan.choice.tried} == {4}
    with pytest.raises(ValueError, match="more than the 8 units"):
        planned("auto", chunks=9)


def test_it_trains_as_any_other_schedule() -> None:
    model, batches = gpt(layers=6), batches_of_tokens(2)

    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)  # type: ignore[arg-type]

    found = piped(model, batches, 2, schedule="auto", microbatches=4, optimizer=sgd)
    wanted = piped(model, batches, 1, schedule="gpipe", microbatches=4, optimizer=sgd)
    assert found.losses == wanted.losses
    assert all(torch.equal(found.state[key], tensor) for key, tensor in wanted.state.items())


def test_costs_are_times_where_they_were_measured_else_flops() -> None:
    chunks = [Chunk(("a",), (), 10, 4, 20), Chunk(("b",), (), 30, 0, 90)]
    costs = costs_of(chunks)
    assert (costs.forward, costs.backward, costs.weight) == ((0.5, 1.5), (1.0, 4.5), (0.5, 2.25))
    timed = [Chunk(("a",), (), 10, 4, 20, CallTime(1.0, 2.0, 1.5, 0.7)), Chunk(("b",), (), 30, 0, 90, CallTime(3, 4))]
    costs = costs_of(timed, latency=0.5)
    assert (costs.forward, costs.input, costs.weight, costs.latency) == ((1.0, 3), (1.5, 0.0), (0.7, 0.0), 0.5)
