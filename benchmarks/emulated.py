"""Emulated accelerators: stages that sleep, so what is left over the ideal is the pipeline's own cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.floor import message_s, overshoot_s
from benchmarks.models import Sleeps, first_mean, sgd, sleepers
from benchmarks.ours import Steps, chunks_held, steps_of, trainer_of
from benchmarks.peer import SCHEDULES, Peer
from benchmarks.table import Row, Subject, measured
from benchmarks.task import Task
from raypipe.schedule import Costs, Op, build, names

__all__ = ["Floor", "batch", "costs_of", "run", "run_8", "run_zbv"]

SLEEPS, BOUNDARY_BYTES, MICROBATCHES = Sleeps(0.020, 0.020, 0.020), 256 * 1024, 16
"""Of a chunk: what an action costs beside its sleep is judged by actions of one length, whatever the schedule."""
STAGE_SLEEPS = Sleeps(0.040, 0.040, 0.040)
FORMULA_BARS = {4: 1.08, 8: 1.15}
SIMULATED_BAR, ZBV_BAR, ZBV_STAGES, ZBV_MICROBATCHES = 1.03, 0.82, 4, 8
STEPS, ROUNDS_OF_8 = 2, 3
IN_PARTS = ("1f1b", "zbv")


class Floor(NamedTuple):
    """Seconds that the machine itself takes: for a message, and over a sleep."""

    message: float
    late: float

    def __str__(self) -> str:
        return f"a message takes {1e3 * self.message:.2f} ms, sleeps of 20 ms end {1e3 * self.late:.2f} ms late"


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Four stages."""
    return _run(4, rounds, say)


def run_8(rounds: int, say: Callable[[str], None]) -> Subject:
    """Eight stages."""
    return _run(8, min(rounds, ROUNDS_OF_8), say)


def run_zbv(rounds: int, say: Callable[[str], None]) -> Subject:
    """ZBV beside 1F1B, both raypipe's, both alive: each round is two steps of either; who goes first alternates."""
    periods: dict[str, list[float]] = {"1f1b": [], "zbv": []}
    what = f"p={ZBV_STAGES}, m={ZBV_MICROBATCHES}, F=I=W=40 ms of a stage, 20 of a chunk: zbv over 1f1b"
    if not set(periods) <= set(names()):
        return Subject("Zero bubbles", [Row(what, f"not run, because names() is {', '.join(names())}", "", None)])
    sleeps = {name: STAGE_SLEEPS.shared(chunks_held(name)) for name in periods}
    ideal = {
        name: build(name, ZBV_STAGES, ZBV_MICROBATCHES).simulate(costs_of(sleeps[name])).makespan for name in periods
    }
    with ExitStack() as stack:
        trainers = {}
        for name in periods:
            task = _task(name, ZBV_STAGES, ZBV_MICROBATCHES, sleeps[name])
            trainers[name] = stack.enter_context(trainer_of(task, name, microbatch_weight="samples"))
            trainers[name].train_step(task.batch())
        for number in range(rounds):
            for name in periods if number % 2 == 0 else reversed(periods):
                periods[name] += steps_of(trainers[name], STEPS).periods
            say(", ".join(f"{name} {times[-1]:.3f} s" for name, times in periods.items()))
    return Subject(
        "Zero bubbles",
        [
            measured(what, [z / o for z, o in zip(periods["zbv"], periods["1f1b"], strict=True)], ZBV_BAR),
            measured("the same, both simulated without any cost", [ideal["zbv"] / ideal["1f1b"]]),
        ],
    )


def batch(samples: int = MICROBATCHES) -> tuple[Tensor, Tensor]:
    """Samples of one number: what a stage receives is made by the stage before it."""
    return torch.zeros(samples, 1), torch.zeros(samples)


def costs_of(sleeps: Sleeps, floor: Floor | None = None) -> Costs:
    """What a chunk's actions take: its sleeps, each of which ends late; a whole backward has two."""
    late = 0.0 if floor is None else floor.late
    return Costs(
        forward=sleeps.forward + late,
        backward=sleeps.backward + 2 * late,
        input=sleeps.input + late,
        weight=sleeps.weight + late,
        latency=0.0 if floor is None else floor.message,
    )


def _task(schedule: str, stages: int, microbatches: int, sleeps: Sleeps) -> Task:
    chunks = chunks_held(schedule) if schedule in names() else 1
    count = stages * chunks
    model = functools.partial(sleepers, count, sleeps, BOUNDARY_BYTES // 4)
    made = functools.partial(batch, microbatches)
    return Task(model, made, first_mean, sgd, microbatches, (1,) * count, chunks)


def _run(stages: int, rounds: int, say: Callable[[str], None]) -> Subject:
    """One schedule after the other; each round is two steps of raypipe in ``fit``, then two of the peer's same one.

    A step counts from the end of the one before it: whatever a user waits for is in it.
    """
    floor = Floor(message_s(BOUNDARY_BYTES, stages, SLEEPS.forward), *overshoot_s(stages, (SLEEPS.forward,)))
    say(f"p={stages}: {floor}")
    ours: dict[str, list[Steps]] = {}
    theirs: dict[str, list[float]] = {name: [] for name in SCHEDULES if name in names()}
    tasks = {name: _task(name, stages, MICROBATCHES, SLEEPS) for name in names()}
    with Peer({name: tasks[name] for name in theirs}) as peer:
        for name, task in tasks.items():
            ours[name] = []
            with trainer_of(task, name, microbatch_weight="samples") as trainer:
                trainer.train_step(task.batch())
                if name in theirs:
                    peer.run(name, 1)
                for _ in range(rounds):
                    ours[name].append(steps_of(trainer, STEPS))
                    if name in theirs:
                        theirs[name] += peer.run(name, STEPS).periods
            beside = f", torch {theirs[name][-1]:.3f} s" if name in theirs else ""
            say(f"p={stages}: {name} {ours[name][-1].periods[-1]:.3f} s{beside}")
    return Subject(f"Emulated accelerators, {stages} stages", _rows(stages, floor, ours, theirs))


def _rows(stages: int, floor: Floor, ours: dict[str, list[Steps]], theirs: dict[str, list[float]]) -> list[Row]:
    what = f"p={stages}, m={MICROBATCHES}, F=I=W=20 ms of a chunk: "
    formula = (MICROBATCHES + stages - 1) * (SLEEPS.forward + SLEEPS.backward)
    rows = []
    for name, steps in ours.items():
        simulated = build(name, stages, MICROBATCHES).simulate(costs_of(SLEEPS, floor)).makespan
        periods = [period for each in steps for period in each.periods]
        rows.append(measured(f"{what}{name} over its simulation", [s / simulated for s in periods], SIMULATED_BAR))
        if name in theirs:
            rows.append(
                measured(f"{what}torch's {name} over the same simulation", [s / simulated for s in theirs[name]])
            )
        if name == "1f1b":
            shares = [s / formula for s in periods]
            rows.append(measured(f"{what}1f1b over (m+p-1)(F+B)", shares, FORMULA_BARS[stages]))
    parts = [row for name in IN_PARTS if name in ours for row in _parts(name, ours[name])]
    return [*rows, *_apart(floor), *parts]


def _apart(floor: Floor) -> list[Row]:
    """What the machine takes, in which no step of either side enters."""
    return [
        measured("measured apart: a message of 256 KiB, one way", [1e3 * floor.message], unit="ms"),
        measured("measured apart: lateness of sleeps of 20 ms", [1e3 * floor.late], unit="ms"),
    ]


def _parts(name: str, steps: list[Steps]) -> list[Row]:
    """What a step consists of beside the sleeps themselves."""
    nominal = {
        Op.FORWARD: SLEEPS.forward,
        Op.BACKWARD: SLEEPS.backward,
        Op.INPUT: SLEEPS.input,
        Op.WEIGHT: SLEEPS.weight,
    }
    rows = []
    for op, seconds in nominal.items():
        beside = [1e3 * (took - seconds) for each in steps for took in each.action_s(op)]
        if beside:
            word = {Op.INPUT: "an input gradient", Op.WEIGHT: "a weight gradient"}.get(op, f"a {op.name.lower()}")
            rows.append(measured(f"in {name}'s steps: {word} without its {1e3 * seconds:g} ms", beside, unit="ms"))
    handovers = [1e3 * seconds for each in steps for seconds in each.handovers]
    gaps = [1e3 * seconds for each in steps for seconds in each.gaps]
    return [
        *rows,
        measured(f"in {name}'s steps: from an action's end to the one that waited for it", handovers, unit="ms"),
        measured(f"in {name}'s steps: from a step's end to the next one's start, on a rank", gaps, unit="ms"),
    ]
