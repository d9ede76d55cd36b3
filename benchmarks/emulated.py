"""Emulated accelerators: stages that sleep, so what is left over the ideal is the pipeline's own cost."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.floor import message_s, overshoot_s
from benchmarks.models import first_mean, sgd, sleepers
from benchmarks.ours import steps_of, trainer_of
from benchmarks.peer import Peer, Task
from benchmarks.table import Row, Subject, measured
from raypipe.schedule import Costs, build

__all__ = ["batch", "run", "run_8"]

FORWARD_S, BACKWARD_S, BOUNDARY_BYTES, MICROBATCHES = 0.020, 0.040, 256 * 1024, 16
FORMULA_BARS = {4: 1.08, 8: 1.15}
SIMULATED_BAR = 1.03
STEPS = 2
PEERS = ("1f1b", "gpipe")


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
    latency = message_s(BOUNDARY_BYTES)
    late_f, late_b = overshoot_s(stages, (FORWARD_S, BACKWARD_S))
    say(
        f"p={stages}: a message takes {1e3 * latency:.2f} ms, sleeps end {1e3 * late_f:.2f} and {1e3 * late_b:.2f} ms late"
    )
    costs = Costs(forward=FORWARD_S + late_f, backward=BACKWARD_S + late_b, latency=latency)
    simulated = build("1f1b", stages, MICROBATCHES).simulate(costs).makespan
    formula = (MICROBATCHES + stages - 1) * (FORWARD_S + BACKWARD_S)
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in PEERS}
    with Peer(task, PEERS) as peer, trainer_of(task, microbatch_weight="samples") as trainer:
        trainer.train_step(task.batch())
        for name in PEERS:
            peer.run(name, 1)
        for _ in range(rounds):
            ours += (periods := steps_of(trainer, STEPS).periods)
            for name in PEERS:
                theirs[name] += peer.run(name, STEPS).periods
            say(
                f"p={stages}: raypipe {periods[0]:.3f} s, "
                + ", ".join(f"torch {n} {theirs[n][-2]:.3f} s" for n in PEERS)
            )
    what = f"sleeping stages, p={stages}, m={MICROBATCHES}: "
    rows: list[Row] = [
        measured(f"{what}1f1b over its simulation", [s / simulated for s in ours], SIMULATED_BAR),
        measured(f"{what}1f1b over the formula (m+p-1)(F+B)", [s / formula for s in ours], FORMULA_BARS[stages]),
        *(measured(f"{what}torch's {n} over the formula", [s / formula for s in theirs[n]]) for n in PEERS),
        measured(f"{what}a message of 256 KiB, one way, apart", [1e3 * latency], unit="ms"),
        measured(f"{what}how late a sleep of 20 ms, 40 ms ends", [1e3 * late_f, 1e3 * late_b], unit="ms"),
    ]
    return Subject(f"Emulated accelerators, {stages} stages", rows)
