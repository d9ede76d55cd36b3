"""Real work against the peer: a GPT's training step, both pipelines alive, one working at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

from benchmarks.models import BLOCKS, adamw, gpt, gpt_batch, token_loss
from benchmarks.ours import last_traces, trainer_of
from benchmarks.peer import Peer
from benchmarks.task import Task
from benchmarks.table import Row, Subject, measured
from raypipe import PipelineTrainer
from raypipe.observe.timeline import mean_costs
from raypipe.options import Options
from raypipe.planning import make_plan
from raypipe.schedule import build

__all__ = ["run", "run_halves"]

STAGES, MICROBATCHES, WARM_UP = 2, 8, 2
BARS = {"1f1b": 0.90, "gpipe": 0.95}


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Cut where raypipe cuts by itself; the peer's cut is the same."""
    plan = make_plan(gpt(), Options(stages=STAGES, loss=token_loss, microbatches=MICROBATCHES), gpt_batch())
    counts = tuple(len(chunk.units) for chunk in plan.partition.chunks)
    return _run("raypipe's own cut", counts, rounds, say)


def run_halves(rounds: int, say: Callable[[str], None]) -> Subject:
    """Cut in the middle, as one does by hand: the second stage is the slower one."""
    return _run("halves", (BLOCKS // 2 + 1, BLOCKS // 2 + 1), rounds, say)


def _run(cut: str, counts: tuple[int, ...], rounds: int, say: Callable[[str], None]) -> Subject:
    """Each round: one step of each side with each schedule; who goes first alternates.

    A step's time is what the driver waits for it: raypipe's includes Ray's calls and the batch's way to the ranks,
    while the peer's ranks have had their batch from the start.
    """
    task = Task(gpt, gpt_batch, token_loss, adamw, MICROBATCHES, counts)
    pairs: dict[str, list[Pair]] = {name: [] for name in BARS}
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(task, tuple(BARS)))
        trainers = {name: stack.enter_context(trainer_of(task, name)) for name in BARS}
        for number in range(WARM_UP + rounds):
            for name, trainer in trainers.items():
                pair = _pair(name, trainer, peer, task, peer_first=number % 2 == 1)
                say(f"{name}: raypipe {pair.ours:.2f} s, torch {pair.theirs:.2f} s, {pair.ours / pair.theirs:.3f}")
                pairs[name].append(pair)
    layers = " and ".join(map(str, counts))
    rows = [row for name in BARS for row in _rows(f"{name}, {layers} layers", name, pairs[name][WARM_UP:])]
    return Subject(f"Real work against torch.distributed.pipelining, {cut}", rows)


class Pair(NamedTuple):
    """Seconds of one step on either side, and of the schedule if nothing but raypipe's actions took time."""

    ours: float
    theirs: float
    bound: float


def _pair(name: str, trainer: PipelineTrainer, peer: Peer, task: Task, *, peer_first: bool) -> Pair:
    turn = peer.run(name, 1) if peer_first else None
    batch, began = task.batch(), time.monotonic()
    loss = trainer.train_step(batch)["loss"]
    seconds = time.monotonic() - began
    turn = turn or peer.run(name, 1)
    # Both sides have done as many steps from the same weights: equal losses show that they did the same work.
    if not math.isclose(loss, turn.loss, rel_tol=1e-3):
        raise AssertionError(
            f"{name}: the loss is {loss} in raypipe and {turn.loss} in torch; both must train the same"
        )
    bound = build(name, STAGES, MICROBATCHES).simulate(mean_costs(last_traces(trainer))).makespan
    return Pair(seconds, turn.seconds, bound)


def _rows(what: str, name: str, pairs: list[Pair]) -> list[Row]:
    bound = f"the bound ({name} simulated from raypipe's measured actions, free messages, no optimizer)"
    return [
        measured(f"{what}: raypipe over torch", [pair.ours / pair.theirs for pair in pairs], BARS[name]),
        measured(f"{what}: raypipe over {bound}", [pair.ours / pair.bound for pair in pairs]),
        measured(f"{what}: torch over the same bound", [pair.theirs / pair.bound for pair in pairs]),
    ]
