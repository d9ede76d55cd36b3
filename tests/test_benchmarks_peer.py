"""Every schedule of the peer trains the unsplit model: several steps, so that a missing gradient shows."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.models import adamw, gpt, gpt_batch, token_loss
from benchmarks.peer import SCHEDULES, Peer, held
from benchmarks.task import Task
from raypipe.schedule import build

MICROBATCHES, STEPS = 4, 4


def task(counts: tuple[int, ...], chunks: int = 1) -> Task:
    model = functools.partial(gpt, 16, 2, sum(counts) - 2, 32)
    return Task(model, functools.partial(gpt_batch, 4, 8, 32), token_loss, adamw, MICROBATCHES, counts, chunks)


def unsplit_losses(of: Task) -> list[float]:
    model, (tokens, targets) = of.model(), of.batch()
    optimizer, losses = of.optimizer(model.parameters()), []
    for _ in range(STEPS):
        loss = of.loss(model(tokens), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_chunks_lie_as_raypipes() -> None:
    for name in SCHEDULES:
        schedule = build(name, 3, 6)
        chunks = schedule.chunks // 3
        for rank in range(3):
            assert all(schedule.stage_of(chunk) == rank for chunk in held(name, rank, 3, chunks))


@pytest.mark.slow
def test_it_trains_as_the_unsplit_model() -> None:
    whole, halves = task((3, 3)), task((2, 1, 2, 1), 2)
    tasks = {name: whole if name in ("1f1b", "gpipe") else halves for name in SCHEDULES}
    wanted = unsplit_losses(whole)
    with Peer(tasks) as peer:
        for name in SCHEDULES:
            found = [peer.run(name, 1).loss for _ in range(STEPS)]
            assert found == pytest.approx(wanted, rel=1e-5), name
        turn = peer.run("zbv", 3)
    assert len(turn.periods) == 3
    assert all(period > 0 for period in turn.periods)


@pytest.mark.slow
def test_a_rank_that_fails_is_named() -> None:
    uneven = Task(gpt, gpt_batch, token_loss, adamw, 5, (5, 5))
    with (
        Peer({"interleaved_zb": uneven}) as peer,
        pytest.raises((RuntimeError, TimeoutError), match=r"rank [01] of the peer"),
    ):
        peer.run("interleaved_zb", 1)
