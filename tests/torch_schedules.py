"""torch.distributed.pipelining as an oracle: its orders, its validation and its dry run with communication."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

from torch.distributed.pipelining import schedules as theirs
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from raypipe.schedule import Costs, Programs, Schedule, Simulation


def texts(programs: Programs) -> list[list[str]]:
    return [[str(action) for action in program] for program in programs]


def torchs_order(name: str, stages: int, microbatches: int, chunks: int = 2) -> list[list[str]]:
    """What torch computes on each rank, in order; the actions of an overlapped pair one after the other."""
    with contextlib.redirect_stdout(io.StringIO()):
        ranks = get_schedule_ops(name, stages, microbatches, chunks)
    return [[str(action) for action in _flat(rank)] for rank in ranks]


def _flat(rank: list[Any]) -> Iterator[Any]:
    for action in rank:
        if action is not None:
            yield from action.sub_actions or (action,)


def accepted_by_torch(schedule: Schedule) -> bool:
    """Whether torch finds the schedule valid, and one that its blocking sends and receives carry to the end."""
    orders = {
        stage: [theirs._Action.from_str(str(action)) for action in program]
        for stage, program in enumerate(schedule.programs)
    }
    stage_of = theirs._validate_schedule(orders, schedule.stages, schedule.chunks, schedule.microbatches)
    assert tuple(stage_of[chunk] for chunk in range(schedule.chunks)) == schedule.placement
    # It empties the lists that it is given.
    copies = {rank: list(order) for rank, order in orders.items()}
    carried = theirs._add_send_recv(copies, schedule.stage_of, schedule.chunks)
    played = theirs._simulate_comms_compute(carried, schedule.stage_of, schedule.chunks)
    computed = {rank: [a for a in row if a is not None and a.is_compute_op] for rank, row in played.items()}
    return computed == orders


def whole(schedule: Schedule, forward: float = 1.0, input: float = 1.0, weight: float = 1.0) -> Simulation:
    """The schedule simulated at the costs of a whole stage, which its chunks share."""
    held = schedule.chunks // schedule.stages
    return schedule.simulate(Costs(forward / held, (input + weight) / held, input / held, weight / held))


def extra(schedule: Schedule, forward: float = 1.0, input: float = 1.0, weight: float = 1.0) -> float:
    """How much longer than a stage's work a step takes; for most schedules it is what a stage idles."""
    work = schedule.microbatches * (forward + input + weight)
    return whole(schedule, forward, input, weight).makespan - work


def idle_between(schedule: Schedule, forward: float = 1.0, input: float = 1.0, weight: float = 1.0) -> float:
    """The most that a stage idles between its own first action and its own last one."""
    spans = whole(schedule, forward, input, weight).spans
    idle = []
    for stage in range(schedule.stages):
        own = [span for span in spans if span.stage == stage]
        idle.append(own[-1].end - own[0].start - schedule.microbatches * (forward + input + weight))
    return max(idle)
