"""Memory: how many microbatches are alive, what that is in bytes, and whose weights a process holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import first_mean, scales
from benchmarks.ours import trainer_of
from benchmarks.peer import Task
from benchmarks.table import Row, Subject, counted, measured
from benchmarks.witness import read_witness, witness

__all__ = ["run"]

STAGES, MICROBATCHES = 4, 32
ACTIVATION_BYTES = 4 * 2**20
WEIGHT_BYTES = 128 * 2**20
GROWTH_BAR = 0.5


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """One pipeline a schedule for activations, one for weights; peaks do not vary with rounds, so there are two steps."""
    in_flight, notes = {}, {}
    for schedule in ("1f1b", "gpipe"):
        in_flight[schedule], notes[schedule] = _observed(schedule, ACTIVATION_BYTES // 4, MICROBATCHES)
        grown = [note["peak_growth"] / 2**20 for note in notes[schedule]]
        say(f"{schedule}: in flight {in_flight[schedule]}, peaks grew by {[round(g) for g in grown]} MiB")
    _, small = _observed("1f1b", 1, 1)
    _, large = _observed("1f1b", WEIGHT_BYTES // 4, 1)
    say(
        f"weights: {[round(n['peak_building'] / 2**20) for n in large]} MiB, bare {[round(n['peak_building'] / 2**20) for n in small]} MiB"
    )
    return Subject("Memory", [*_activation_rows(in_flight, notes), *_weight_rows(small, large)])


def _activation_rows(in_flight: dict[str, tuple[int, ...]], notes: dict[str, list[dict[str, Any]]]) -> list[Row]:
    what = f"p={STAGES}, m={MICROBATCHES}: "
    bounds = tuple(min(MICROBATCHES, STAGES - rank) for rank in range(STAGES))
    ratios = [a["peak_growth"] / b["peak_growth"] for a, b in zip(notes["1f1b"], notes["gpipe"], strict=True)]
    return [
        counted(f"{what}peak in-flight microbatches by rank, 1f1b: min(m, p-r)", in_flight["1f1b"], bounds),
        counted(f"{what}the same, gpipe: m", in_flight["gpipe"], (MICROBATCHES,) * STAGES),
        measured(
            f"{what}growth of the process's peak in the steps, 1f1b over gpipe, over the ranks", ratios, GROWTH_BAR
        ),
    ]


def _weight_rows(small: list[dict[str, Any]], large: list[dict[str, Any]]) -> list[Row]:
    foreign = max(note["parameters_here"] - note["weights"] for note in large)
    peaks = [(n["peak_building"] - s["peak_building"]) / n["weights"] for n, s in zip(large, small, strict=True)]
    what = f"p={STAGES}, {WEIGHT_BYTES >> 20} MiB of weights a stage: "
    return [
        counted(f"{what}bytes of other stages' parameters in a stage's process", foreign, 0),
        measured(
            f"{what}peak of a process while it is built, above one with no weights, over its own weights (the whole model: {STAGES})",
            peaks,
            STAGES - 1.0,
        ),
    ]


def _observed(schedule: str, width: int, microbatches: int) -> tuple[tuple[int, ...], list[dict[str, Any]]]:
    """Two steps of units with ``width`` weights: peak in-flight microbatches, and what the ranks noted, by stage."""
    with TemporaryDirectory() as folder:
        batch = functools.partial(_batch, microbatches)
        task = Task(
            functools.partial(scales, STAGES, width), batch, first_mean, witness(folder), microbatches, (1,) * STAGES
        )
        with trainer_of(task, schedule, microbatch_weight="samples") as trainer:
            for _ in range(2):
                metrics = trainer.train_step(task.batch())
            return metrics["peak_in_flight"], read_witness(folder)


def _batch(samples: int) -> tuple[Tensor, Tensor]:
    return torch.ones(samples, 1), torch.zeros(samples)
