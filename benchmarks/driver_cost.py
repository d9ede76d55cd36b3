"""The driver in ``fit``: the processor time it takes, and how long a rank waits between two steps."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median, quantiles

from benchmarks.emulated import batch
from benchmarks.models import Sleeps, first_mean, sgd, sleepers
from benchmarks.ours import steps_of, trainer_of
from benchmarks.table import Subject, measured
from benchmarks.task import Task

__all__ = ["run"]

STAGES, MICROBATCHES, STEPS = 4, 4, 40
SLEEPS = Sleeps(0.003, 0.003, 0.003)
LIMIT_MS = 2.0


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """Many short steps of sleeping stages: each round is one ``fit``."""
    model = functools.partial(sleepers, STAGES, SLEEPS, 1024)
    task = Task(model, batch, first_mean, sgd, MICROBATCHES, (1,) * STAGES)
    cpu_ms: list[float] = []
    gaps_ms: list[float] = []
    steps_ms: list[float] = []
    worst_ms: list[float] = []
    with trainer_of(task, microbatch_weight="samples") as trainer:
        trainer.train_step(task.batch())
        steps_of(trainer, 5)
        for _ in range(rounds):
            before = time.process_time()
            steps = steps_of(trainer, STEPS)
            cpu_ms.append(1e3 * (time.process_time() - before) / (STEPS * STAGES))
            gaps_ms.append(1e3 * median(steps.gaps))
            worst_ms.append(1e3 * quantiles(steps.gaps, n=20)[-1])
            steps_ms.append(1e3 * median(steps.periods))
            say(f"driver {cpu_ms[-1]:.2f} ms a rank and step, gap {gaps_ms[-1]:.2f} ms, step {steps_ms[-1]:.1f} ms")
    what = f"fit, p={STAGES}, m={MICROBATCHES}, {STEPS} short steps a round: "
    rows = [
        measured(f"{what}the driver's processor time, per rank and step", cpu_ms, LIMIT_MS, "ms"),
        measured(f"{what}gap between two steps on a rank (a round's median)", gaps_ms, LIMIT_MS, "ms"),
        measured(f"{what}the same, the longest but a twentieth", worst_ms, unit="ms"),
        measured(
            f"{what}the gap as a share of the step", [g / s for g, s in zip(gaps_ms, steps_ms, strict=True)], unit="%"
        ),
        measured(f"{what}a step (for that share)", steps_ms, unit="ms"),
    ]
    return Subject("The driver", rows)
