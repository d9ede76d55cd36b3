"""Emulated accelerators: stages that sleep, so what is left over the ideal is the pipeline's own cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.floor import message_s, overshoot_s
from benchmarks.models import first_mean, sgd, sleepers
from benchmarks.ours import Steps, steps_of, trainer_of
from benchmarks.peer import Peer
from benchmarks.task import Task
from benchmarks.table import Row, Subject, measured
from raypipe.schedule import Costs, Op, build

__all__ = ["batch", "run", "run_8"]

FORWARD_S, BACKWARD_S, BOUNDARY_BYTES, MICROBATCHES = 0.020, 0.040, 256 * 1024, 16
FORMULA_BARS = {4: 1.08, 8: 1.15}
SIMULATED_BAR = 1.03
STEPS = 2
PEERS = ("1f1b", "gpipe")


class Floor(NamedTuple):
    """Seconds that the machine itself takes: for a message, and over a sleep of a forward and of a backward."""

    message: float
    late_f: float
    late_b: float

    def __str__(self) -> str:
        late = f"{1e3 * self.late_f:.2f} and {1e3 * self.late_b:.2f} ms"
        return f"a message takes {1e3 * self.message:.2f} ms, sleeps end {late} late"


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Four stages."""
    return _run(4, rounds, say)


def run_8(rounds: int, say: Callable[[str], None]) -> Subject:
    """Eight stages."""
    return _run(8, rounds, say)


def batch() -> tuple[Tensor, Tensor]:
    """Sixteen samples of one number: what a stage receives is made by the stage before it."""
    return torch.zeros(MICROBATCHES, 1), torch.zeros(MICROBATCHES)


def _run(stages: int, rounds: int, say: Callable[[str], None]) -> Subject:
    """Each round: two steps of raypipe in ``fit``, then two of each schedule of the peer.

    A step is the time from its start on rank 0 to the next one's start there: whatever a user waits for is in it.
    """
    model = functools.partial(sleepers, stages, FORWARD_S, BACKWARD_S, BOUNDARY_BYTES // 4)
    task = Task(model, batch, first_mean, sgd, MICROBATCHES, (1,) * stages)
    floor = Floor(message_s(BOUNDARY_BYTES), *overshoot_s(stages, (FORWARD_S, BACKWARD_S)))
    say(f"p={stages}: {floor}")
    ours: list[Steps] = []
    theirs: dict[str, list[float]] = {name: [] for name in PEERS}
    with Peer(task, PEERS) as peer, trainer_of(task, microbatch_weight="samples") as trainer:
        trainer.train_step(task.batch())
        for name in PEERS:
            peer.run(name, 1)
        for _ in range(rounds):
            ours.append(steps_of(trainer, STEPS))
            for name in PEERS:
                theirs[name] += peer.run(name, STEPS).periods
            torch_s = ", ".join(f"torch {name} {theirs[name][-1]:.3f} s" for name in PEERS)
            say(f"p={stages}: raypipe {ours[-1].periods[-1]:.3f} s, {torch_s}")
    return Subject(
        f"Emulated accelerators, {stages} stages", [*_rows(stages, floor, ours, theirs), *_parts(floor, ours)]
    )


def _rows(stages: int, floor: Floor, ours: list[Steps], theirs: dict[str, list[float]]) -> list[Row]:
    costs = Costs(forward=FORWARD_S + floor.late_f, backward=BACKWARD_S + floor.late_b, latency=floor.message)
    simulated = build("1f1b", stages, MICROBATCHES).simulate(costs).makespan
    formula = (MICROBATCHES + stages - 1) * (FORWARD_S + BACKWARD_S)
    periods = [period for steps in ours for period in steps.periods]
    what = f"p={stages}, m={MICROBATCHES}, stages sleep 20 and 40 ms: "
    return [
        measured(f"{what}1f1b over its simulation", [s / simulated for s in periods], SIMULATED_BAR),
        measured(f"{what}1f1b over (m+p-1)(F+B)", [s / formula for s in periods], FORMULA_BARS[stages]),
        *(measured(f"{what}torch's {name} over (m+p-1)(F+B)", [s / formula for s in theirs[name]]) for name in PEERS),
    ]


def _parts(floor: Floor, ours: list[Steps]) -> list[Row]:
    """What a step consists of beside the sleeps themselves."""
    forward = [1e3 * (s - FORWARD_S) for steps in ours for s in steps.action_s(Op.FORWARD)]
    backward = [1e3 * (s - BACKWARD_S) for steps in ours for s in steps.action_s(Op.BACKWARD)]
    handovers = [1e3 * s for steps in ours for s in steps.handovers]
    gaps = [1e3 * s for steps in ours for s in steps.gaps]
    return [
        measured("measured apart: a message of 256 KiB, one way", [1e3 * floor.message], unit="ms"),
        measured(
            "measured apart: lateness of sleeps of 20 and 40 ms", [1e3 * floor.late_f, 1e3 * floor.late_b], unit="ms"
        ),
        measured("in the steps: a forward without its 20 ms", forward, unit="ms"),
        measured("in the steps: a backward without its 40 ms", backward, unit="ms"),
        measured("in the steps: from an action's end to the one that waited for it", handovers, unit="ms"),
        measured("in the steps: from a step's end to the next one's start, on a rank", gaps, unit="ms"),
    ]
