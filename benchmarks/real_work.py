"""Real work against the peer: a GPT's training step, both pipelines alive, one working at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack

from benchmarks.models import BLOCKS, adamw, gpt, gpt_batch, token_loss
from benchmarks.ours import trainer_of
from benchmarks.peer import Peer, Task
from benchmarks.table import Row, Subject, measured
from raypipe.options import Options
from raypipe.plan import make_plan

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
    ratios: dict[str, list[float]] = {name: [] for name in BARS}
    with ExitStack() as stack:
        peer = stack.enter_context(Peer(task, tuple(BARS)))
        trainers = {name: stack.enter_context(trainer_of(task, name)) for name in BARS}
        batch = task.batch()

        def ours(name: str) -> tuple[float, float]:
            began = time.monotonic()
            loss = trainers[name].train_step(batch)["loss"]
            return time.monotonic() - began, loss

        def theirs(name: str) -> tuple[float, float]:
            turn = peer.run(name, 1)
            return turn.seconds, turn.loss

        for number in range(WARM_UP + rounds):
            for name in BARS:
                pair = _pair(lambda name=name: ours(name), lambda name=name: theirs(name), number % 2 == 1)
                (own_s, own_loss), (peer_s, peer_loss) = pair
                _check_same(name, own_loss, peer_loss)
                say(f"{name}: raypipe {own_s:.2f} s, torch {peer_s:.2f} s, {own_s / peer_s:.3f}")
                if number >= WARM_UP:
                    ratios[name].append(own_s / peer_s)
    rows = [_row(name, values, counts) for name, values in ratios.items()]
    return Subject(f"Real work against torch.distributed.pipelining, {cut}", rows)


def _pair(
    ours: Callable[[], tuple[float, float]], theirs: Callable[[], tuple[float, float]], swap: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    if swap:
        other = theirs()
        return ours(), other
    own = ours()
    return own, theirs()


def _check_same(name: str, ours: float, theirs: float) -> None:
    """Both sides have done as many steps from the same weights: equal losses show that they did the same work."""
    if not math.isclose(ours, theirs, rel_tol=1e-3):
        raise AssertionError(
            f"{name}: the loss is {ours} in raypipe and {theirs} in torch; they must train the same model"
        )


def _row(name: str, values: list[float], counts: tuple[int, ...]) -> Row:
    layers = " and ".join(map(str, counts))
    return measured(
        f"GPT step ({BLOCKS} blocks, {layers} layers a stage, m={MICROBATCHES}), {name} over torch's {name}",
        values,
        BARS[name],
    )
