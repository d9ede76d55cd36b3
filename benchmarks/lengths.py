"""Many lengths against one: what a batch of a new length costs a training run."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Sequence
from statistics import fmean, median

from benchmarks.models import adamw, gpt, gpt_batch, token_loss
from benchmarks.ours import trainer_of
from benchmarks.table import Row, Subject, measured
from benchmarks.task import Task
from raypipe import PipelineTrainer

__all__ = ["expected", "run", "shuffled"]

MEAN, SPREAD, SAMPLES, MICROBATCHES = 200, 100, 4, 2
WIDTH, HEADS, BLOCKS, VOCABULARY = 256, 4, 8, 2048
BLOCK, MOST, WARM_UP, BAR, LEAST_S = 80, 2, 3, 1.10, 0.2


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Each round: 80 steps of the mean length, and 80 of 200 lengths around it, one pass after the other.

    Two rounds are 160 steps of either side, and more are not made. Both sides are one trainer, whose ranks saw the mean
    length alone before.
    """
    rounds = min(rounds, MOST)
    model = functools.partial(gpt, WIDTH, HEADS, BLOCKS, VOCABULARY)
    task = Task(model, functools.partial(_batch, MEAN), token_loss, adamw, MICROBATCHES, (BLOCKS // 2 + 1,) * 2)
    lengths = shuffled(rounds * BLOCK)
    one: list[float] = []
    many: list[float] = []
    with trainer_of(task) as trainer:
        _seconds(trainer, [MEAN] * WARM_UP)
        for number in range(rounds):
            part = lengths[number * BLOCK : (number + 1) * BLOCK]
            sides = [(one, [MEAN] * BLOCK), (many, part)]
            for times, given in sides if number % 2 == 0 else reversed(sides):
                times += _seconds(trainer, given)
            say(f"one length {sum(one):.1f} s, many {sum(many):.1f} s, {sum(many) / sum(one):.3f}")
    return Subject("Batches of many lengths", _rows(one, many, lengths))


def shuffled(steps: int) -> list[int]:
    """Lengths of so many steps: passes over 200 of them, symmetric around the mean, in a fixed random order."""
    passed = [MEAN + sign * away for away in range(1, SPREAD + 1) for sign in (-1, 1)]
    random.Random(0).shuffle(passed)
    return [passed[step % len(passed)] for step in range(steps)]


def expected(lengths: Sequence[int]) -> float:
    """The work of these lengths over that of as many steps of the mean length, by FLOPs; attention's are quadratic."""

    def work(length: int) -> int:
        return length * (BLOCKS * (24 * WIDTH**2 + 4 * length * WIDTH) + 2 * WIDTH * VOCABULARY)

    return fmean(map(work, lengths)) / work(MEAN)


def _rows(one: Sequence[float], many: Sequence[float], lengths: Sequence[int]) -> list[Row]:
    what = f"{len(lengths)} steps over {len(set(lengths))} lengths, {min(lengths)} to {max(lengths)}"
    return [
        measured(f"{what}: seconds over those of as many steps of length {MEAN}", [sum(many) / sum(one)], BAR),
        measured(f"{what}: the same by FLOPs", [expected(lengths)]),
        measured(f"a step of length {MEAN}", one, unit="s"),
        Row(
            "the step is long enough to judge by",
            f"{median(one):.3f} s",
            f"at least {LEAST_S} s",
            median(one) >= LEAST_S,
        ),
    ]


def _batch(length: int) -> tuple[object, object]:
    return gpt_batch(SAMPLES, length, VOCABULARY)


def _seconds(trainer: PipelineTrainer, lengths: Sequence[int]) -> list[float]:
    found = []
    for length in lengths:
        batch, began = _batch(length), time.monotonic()
        trainer.train_step(batch)
        found.append(time.monotonic() - began)
    return found
