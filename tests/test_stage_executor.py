from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from raypipe.errors import CutError, StageError
from raypipe.observe.events import Recorder
from raypipe.schedule import Schedule, build
from raypipe.stage.executor import Activity, execute
from raypipe.stage.program import Message, compile_program
from raypipe.tensors import TensorSpec
from raypipe.transport.memory import MemoryHub


class Adding:
    """Forwards add one to what came, backwards double it; chunk 0 starts from the microbatch's number."""

    def __init__(self, chunks: int, fails_at: str = "", error: Exception | None = None) -> None:
        self.chunks, self.fails_at, self.error = chunks, fails_at, error
        self.in_flight, self.log = 0, []  # type: ignore[var-annotated]

    def specs(self, message: Message) -> Sequence[TensorSpec]:
        return [TensorSpec((1,), torch.float32)]

    def forward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        self.note(f"{chunk}F{microbatch}", received)
        self.in_flight += 1
        return [(received[0] if chunk else torch.full((1,), float(microbatch))) + 1]

    def backward(self, chunk: int, microbatch: int, received: Sequence[Tensor]) -> Sequence[Tensor]:
        self.note(f"{chunk}B{microbatch}", received)
        self.in_flight -= 1
        return [received[0] * 2 if chunk < self.chunks - 1 else torch.ones(1)]

    def note(self, action: str, received: Sequence[Tensor]) -> None:
        if action == self.fails_at and self.error is not None:
            raise self.error
        self.log.append((action, received[0].item() if received else None))


def run(schedule: Schedule, **options: Any) -> tuple[list[Adding], list[Recorder], list[Activity]]:
    """All stages in one thread, each until it waits."""
    hub = MemoryHub(schedule.stages)
    programs = [compile_program(schedule, stage) for stage in range(schedule.stages)]
    computers = [Adding(schedule.chunks, **options) for _ in programs]
    recorders = [Recorder([item.action for item in program.items]) for program in programs]
    activities = [Activity() for _ in programs]
    ranks = {stage: stage for stage in range(schedule.stages)}
    works = {
        p.stage: execute(
            p, computers[p.stage], hub.transport(p.stage), ranks, recorders[p.stage], activities[p.stage], 7
        )
        for p in programs
    }
    waiting: dict[int, Any] = {}
    while works:
        for stage, work in list(works.items()):
            if stage not in waiting or waiting[stage].ready():
                try:
                    waiting[stage] = next(work)
                except StopIteration:
                    del works[stage]
    return computers, recorders, activities


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_every_action_gets_what_its_neighbour_made(name: str) -> None:
    schedule = build(name, 3, 4)
    computers, recorders, _ = run(schedule)
    for stage, computer in enumerate(computers):
        assert [action for action, _ in computer.log] == [str(action) for action in schedule.programs[stage]]
        for action, received in computer.log:
            chunk, letter, microbatch = int(action[0]), action[1], int(action[2])
            starts = (letter, chunk) in (("F", 0), ("B", 2))
            wanted = microbatch + chunk if letter == "F" else 2.0 ** (1 - chunk)
            assert received == (None if starts else wanted)
        trace = recorders[stage].trace()
        assert (trace.times[:, 0] <= trace.times[:, 1]).all()
        assert trace.peak_in_flight == (4 if name == "gpipe" else min(4, 3 - stage))


def test_an_error_says_where_it_was_and_comes_once() -> None:
    with pytest.raises(StageError, match=r"stage 1, action 1F2, microbatch 2, step 7 failed") as caught:
        run(build("1f1b", 2, 4), fails_at="1F2", error=ZeroDivisionError("mine"))
    assert isinstance(caught.value.cause, ZeroDivisionError)
    with pytest.raises(CutError, match="ours"):
        run(build("1f1b", 2, 4), fails_at="0B0", error=CutError("ours"))


def test_a_waiting_rank_names_the_one_it_waits_for() -> None:
    program, activity, hub = compile_program(build("gpipe", 2, 1), 1), Activity(), MemoryHub(2)
    recorder = Recorder([item.action for item in program.items])
    work = execute(program, Adding(2), hub.transport(1), {0: 0, 1: 1}, recorder, activity, 3)
    next(work)
    assert (activity.progress().waits_for, activity.progress().action, activity.progress().step) == (0, "1F0", 3)
    hub.transport(0).send(1, [torch.ones(1)])
    with pytest.raises(StopIteration):
        next(work)
    assert (activity.progress().waits_for, activity.progress().action) == (None, "1B0")
