"""Real work against the peers: a GPT's training step, both pipelines alive, one working at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.deepspeed_peer import DeepSpeedPeer, missing
from benchmarks.models import BLOCKS, adamw, gpt, gpt_batch, token_loss
from benchmarks.ours import chunks_held, last_traces, trainer_of
from benchmarks.peer import SCHEDULES, Peer
from benchmarks.table import Row, Subject, measured
from benchmarks.task import Task
from benchmarks.team import Team
from raypipe import PipelineTrainer
from raypipe.observe.timeline import mean_costs
from raypipe.options import Options
from raypipe.planning import make_plan
from raypipe.schedule import build, names

__all__ = ["best", "run", "run_halves"]

STAGES, MICROBATCHES, WARM_UP = 2, 8, 1
ALONE = 2
"""Rounds of a schedule that no peer has, at most: they only find the best one."""
BARS = {"1f1b": 0.90, "gpipe": 0.95, "interleaved_1f1b": 0.90, "interleaved_zb": 0.85, "zbv": 0.85}
DEEPSPEED_BAR, BEST_BAR = 0.85, 0.90
FINE = ["0", "*_norm", "*.qkv", "*.out", "*.mlp.*", "*.norm"]
"""Units inside the blocks: linear layers and norms. raypipe cuts between them as the model is; torch's stages are
modules, so its user would have to write the model anew."""
HALVES, ROUNDS_OF_HALVES = ("1f1b",), 3


@dataclass
class Side:
    """One system with one schedule: its ``step`` gives seconds, as the driver waits for them, and the loss."""

    who: str
    name: str
    step: Callable[[], tuple[float, float]]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """One step."""
        seconds, loss = self.step()
        self.seconds.append(seconds)
        self.losses.append(loss)


@dataclass
class Compared:
    """The sides of one schedule, raypipe's first, and for each of its steps the bound: what the schedule would take if
    nothing but raypipe's own actions took time."""

    task: Task
    sides: list[Side]
    bounds: list[float]

    def side(self, who: str) -> Side | None:
        """This system's, where it has one."""
        return next((side for side in self.sides if side.who == who), None)


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Every schedule, cut where raypipe cuts by itself; the peers' cut of it is the same.

    Last come the best of raypipe's and the best of torch's, whatever they are called, in rounds of their own.
    """
    tasks = {name: _task(name, _own_cut(name)) for name in names()}
    shared = [name for name in SCHEDULES if name in tasks]
    without, found = missing(), {}
    with Peer({name: tasks[name] for name in shared}) as peer:
        for name, task in tasks.items():
            with ExitStack() as stack:
                others = [Side("torch", name, _steps_of_peer(peer, name))] if name in shared else []
                if name == "1f1b" and without is None:
                    team = stack.enter_context(DeepSpeedPeer(task))
                    others.append(Side("DeepSpeed", name, _steps_of_peer(team, name)))
                found[name] = _compare(name, task, others, rounds if others else min(rounds, ALONE), say)
        one, other = (
            best([side for each in found.values() if (side := each.side(who))]) for who in ("raypipe", "torch")
        )
        say(f"the best are raypipe's {one.name} and torch's {other.name}")
        again = Side("torch", other.name, _steps_of_peer(peer, other.name))
        last = _compare(one.name, tasks[one.name], [again], rounds, say, same=False)
        again = Side("torch", other.name, _steps_of_peer(peer, other.name))
        finer = _compare(one.name, tasks[one.name], [again], rounds, say, same=False, units=FINE, balance="flops")
    rows = [row for each in found.values() for row in _rows(each)]
    return Subject(
        "Real work against the peers, raypipe's own cut",
        [*rows, *_deepspeed_rows(found["1f1b"], without), *_best_rows(*last.sides), _finer_row(*finer.sides)],
    )


def run_halves(rounds: int, say: Callable[[str], None]) -> Subject:
    """Cut in the middle, as one does by hand: the second stage is the slower one."""
    half = BLOCKS // 2 + 1
    tasks = {name: _task(name, (half, half)) for name in HALVES}
    with Peer(tasks) as peer:
        found = [
            _compare(name, task, [Side("torch", name, _steps_of_peer(peer, name))], min(rounds, ROUNDS_OF_HALVES), say)
            for name, task in tasks.items()
        ]
    return Subject("Real work against the peers, halves", [row for each in found for row in _rows(each)])


def best(sides: Sequence[Side]) -> Side:
    """The one whose median step is the shortest."""
    return min(sides, key=lambda side: median(side.seconds))


def _own_cut(name: str) -> tuple[int, ...]:
    options = Options(stages=STAGES, loss=token_loss, microbatches=MICROBATCHES, schedule=name)
    plan = make_plan(gpt(), options, gpt_batch())
    return tuple(len(chunk.units) for chunk in plan.partition.chunks)


def _task(name: str, counts: tuple[int, ...]) -> Task:
    return Task(gpt, gpt_batch, token_loss, adamw, MICROBATCHES, counts, chunks_held(name))


def _compare(
    name: str,
    task: Task,
    others: list[Side],
    rounds: int,
    say: Callable[[str], None],
    *,
    same: bool = True,
    **options: Any,
) -> Compared:
    """Each round: one step of each side; who goes first alternates. Only then is raypipe's trainer of it alive.

    A step's time is what the driver waits for it: raypipe's includes Ray's calls and the batch's way to the ranks,
    while the peers' ranks have had their batch from the start.

    Args:
        same: whether the sides have done as many steps, so that their losses are equal.
        options: of raypipe's trainer.
    """
    bounds: list[float] = []
    with trainer_of(task, name, **options) as trainer:
        sides = [Side("raypipe", name, _steps_of_ours(trainer, task, name, bounds)), *others]
        for number in range(WARM_UP + rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                side.turn()
            if same:
                _same_work(sides)
            say(", ".join(f"{side.who} {side.name} {side.seconds[-1]:.2f} s" for side in sides))
    for side in sides:
        del side.seconds[:WARM_UP]
    return Compared(task, sides, bounds[WARM_UP:])


def _steps_of_peer(team: Team, name: str) -> Callable[[], tuple[float, float]]:
    def step() -> tuple[float, float]:
        turn = team.run(name, 1)
        return turn.seconds, turn.loss

    return step


def _steps_of_ours(
    trainer: PipelineTrainer, task: Task, name: str, bounds: list[float]
) -> Callable[[], tuple[float, float]]:
    """Notes also what the schedule would take if nothing but raypipe's actions took time."""

    def step() -> tuple[float, float]:
        batch, began = task.batch(), time.monotonic()
        loss: float = trainer.train_step(batch)["loss"]
        seconds = time.monotonic() - began
        bounds.append(build(name, STAGES, MICROBATCHES).simulate(mean_costs(last_traces(trainer))).makespan)
        return seconds, loss

    return step


def _same_work(sides: Sequence[Side]) -> None:
    """All sides have done as many steps from the same weights: equal losses show that they did the same work."""
    for side in sides[1:]:
        if not math.isclose(sides[0].losses[-1], side.losses[-1], rel_tol=1e-3):
            raise AssertionError(
                f"{side.name}: the loss is {sides[0].losses[-1]} in {sides[0].who} and {side.losses[-1]} in "
                f"{side.who}; both must train the same"
            )


def _rows(found: Compared) -> list[Row]:
    ours, theirs = found.sides[0], found.side("torch")
    what = f"{ours.name}, {', '.join(map(str, found.task.counts))} layers"
    bound = f"the bound ({ours.name} simulated from raypipe's measured actions, free messages, no optimizer)"
    rows = [measured(f"{what}: raypipe over {bound}", _over_bounds(ours, found))]
    if theirs is None:
        return [*rows, measured(f"{what}: raypipe (torch has none)", ours.seconds, unit="s")]
    return [
        measured(f"{what}: raypipe over torch", _over(ours, theirs), BARS[ours.name]),
        *rows,
        measured(f"{what}: torch over the same bound", _over_bounds(theirs, found)),
    ]


def _over(one: Side, other: Side) -> list[float]:
    return [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]


def _over_bounds(side: Side, found: Compared) -> list[float]:
    return [seconds / bound for seconds, bound in zip(side.seconds, found.bounds, strict=True)]


def _deepspeed_rows(found: Compared, without: str | None) -> list[Row]:
    what, theirs = "1f1b: raypipe over DeepSpeed's PipelineEngine", found.side("DeepSpeed")
    if theirs is None:
        return [Row(what, f"not run, because {without}", f"at most {DEEPSPEED_BAR:g}", None)]
    return [measured(what, _over(found.sides[0], theirs), DEEPSPEED_BAR)]


def _best_rows(one: Side, other: Side) -> list[Row]:
    return [
        measured(f"the best of each: raypipe's {one.name} over torch's {other.name}", _over(one, other), BEST_BAR),
        measured(f"the best of each: raypipe's {one.name}", one.seconds, unit="s"),
        measured(f"the best of each: torch's {other.name}", other.seconds, unit="s"),
    ]


def _finer_row(one: Side, other: Side) -> Row:
    what = f"raypipe's {one.name}, cut inside the blocks too, over torch's {other.name}, which needs whole ones"
    return measured(what, _over(one, other))
