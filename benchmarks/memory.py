"""Memory: how many microbatches are alive, what that is in bytes, and whose weights a process holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from benchmarks.models import first_mean, hoards, scales, sgd
from benchmarks.ours import chunks_held, trainer_of
from benchmarks.table import Row, Subject, counted, measured
from benchmarks.task import Task
from benchmarks.witness import Note, read_witness, witness
from raypipe.schedule import build, names

__all__ = ["in_flight_rows", "run"]

STAGES, MICROBATCHES = 4, 32
ACTIVATION = 2**20
"""Float32 numbers that a stage keeps for a microbatch."""
WEIGHTS, RICH = 2**26, 1
"""Float32 numbers that one stage holds as weights; the others hold one."""
GROWTH_BAR, STRANGER_BAR = 0.5, 0.05
MOST: Mapping[str, tuple[str, Callable[[int, int, int], int]]] = {
    "1f1b": ("min(m, p)", lambda p, m, v: min(m, p)),
    "gpipe": ("m", lambda p, m, v: m),
    "looped_bfs": ("m of v chunks", lambda p, m, v: m * v),
    "interleaved_1f1b": ("v p + p - 1", lambda p, m, v: v * p + p - 1),
    "zb_h1": ("min(m, p)", lambda p, m, v: min(m, p)),
    "zb_h2": ("2 p - 1", lambda p, m, v: 2 * p - 1),
    "zbv": ("p of 2 chunks", lambda p, m, v: 2 * p),
    "dualpipev": ("2 p + 1", lambda p, m, v: 2 * p + 1),
    "v_half": ("2 floor((p+2)/2)", lambda p, m, v: 2 * ((p + 2) // 2)),
    "v_min": ("2 floor((p+4)/3)", lambda p, m, v: 2 * ((p + 4) // 3)),
}
"""For each schedule with a published closed form, in words and numbers: the most microbatches alive on a rank, once for
each chunk, with p stages, m microbatches and v chunks a stage. Sources: Narayanan et al. 2021 (interleaved 1F1B), Qi et
al. 2023 (ZB) and 2024 (V), DeepSeek-AI 2025 (DualPipeV)."""


def run(rounds: int, say: Callable[[str], None]) -> Subject:
    """A process without activations and weights shows what it holds beside them. Peaks do not vary: one run each."""
    _, bare = _observed("1f1b", functools.partial(scales, STAGES, 1), MICROBATCHES)
    in_flight, notes, kept = {}, {}, {}
    _, bare_kept = _observed("1f1b", functools.partial(scales, STAGES, 1), MICROBATCHES, alive=False)
    for schedule in ("1f1b", "gpipe"):
        model = functools.partial(scales, STAGES, ACTIVATION)
        in_flight[schedule], notes[schedule] = _observed(schedule, model, MICROBATCHES)
        _, kept[schedule] = _observed(schedule, model, MICROBATCHES, alive=False)
        say(f"{schedule}: in flight {in_flight[schedule]}, peaks {_mib(notes[schedule], 'peak')} MiB")
    sizes = [WEIGHTS if stage == RICH else 1 for stage in range(STAGES)]
    _, rich = _observed("1f1b", functools.partial(hoards, *sizes), STAGES)
    say(f"bare {_mib(bare, 'peak')} MiB; while built: with weights {_mib(rich, 'peak_building')} MiB")
    what = "the same as a user has it, where a rank keeps freed blocks: 1f1b over gpipe"
    as_it_is = measured(f"p={STAGES}, m={MICROBATCHES}: {what}", _ratios(bare_kept, kept))
    rows = [*in_flight_rows(say), *_activation_rows(bare, in_flight, notes), as_it_is, *_weight_rows(bare, rich)]
    return Subject("Memory", rows)


def in_flight_rows(say: Callable[[str], None], stages: int = STAGES, microbatches: int = 2 * STAGES) -> list[Row]:
    """For every schedule what its ranks counted in a step, beside the simulation and, where there is one, a bound.

    A rank counts a microbatch once for each chunk that keeps something for it. In one process: the same executor.
    """
    rows = []
    for name in names():
        chunks = chunks_held(name)
        count = stages * chunks
        task = Task(
            functools.partial(scales, count, 1),
            functools.partial(_batch, microbatches),
            first_mean,
            sgd,
            microbatches,
            (1,) * count,
            chunks,
        )
        with trainer_of(task, name, microbatch_weight="samples", backend="local") as trainer:
            found = tuple(trainer.train_step(task.batch())["peak_in_flight"])
        say(f"{name}: in flight {found}")
        what = f"p={stages}, m={microbatches}: peak in-flight microbatches by rank, {name}: "
        simulated = build(name, stages, microbatches).simulate().peak_in_flight
        rows.append(counted(f"{what}as simulated", found, simulated))
        if name in MOST:
            word, most = MOST[name]
            bound = most(stages, microbatches, chunks)
            rows.append(Row(f"{what}{word}", str(max(found)), f"at most {bound}", max(found) <= bound))
    return rows


def _grown(bare: list[Note], notes: dict[str, list[Note]]) -> dict[str, list[int]]:
    """By how much each rank's peak is above that of one without activations."""
    return {name: [n["peak"] - b["peak"] for n, b in zip(noted, bare, strict=True)] for name, noted in notes.items()}


def _ratios(bare: list[Note], notes: dict[str, list[Note]]) -> list[float]:
    grown = _grown(bare, notes)
    return [one / other for one, other in zip(grown["1f1b"], grown["gpipe"], strict=True)]


def _activation_rows(
    bare: list[Note], in_flight: dict[str, tuple[int, ...]], notes: dict[str, list[Note]]
) -> list[Row]:
    what = f"p={STAGES}, m={MICROBATCHES}, 4 MiB kept for each: "
    bounds = tuple(min(MICROBATCHES, STAGES - rank) for rank in range(STAGES))
    grown, ratios = _grown(bare, notes), _ratios(bare, notes)
    return [
        counted(f"{what}peak in-flight microbatches by rank, 1f1b: min(m, p-r)", in_flight["1f1b"], bounds),
        counted(f"{what}the same, gpipe: m", in_flight["gpipe"], (MICROBATCHES,) * STAGES),
        measured(
            f"{what}a process's peak of what is alive, above one without activations, 1f1b over gpipe",
            ratios,
            GROWTH_BAR,
        ),
        *(measured(f"{what}that peak by rank, {name}", [g / 2**20 for g in grown[name]], unit="MiB") for name in grown),
    ]


def _weight_rows(poor: list[Note], rich: list[Note]) -> list[Row]:
    weights = rich[RICH]["weights"]
    risen = [(r["peak_building"] - p["peak_building"]) / weights for r, p in zip(rich, poor, strict=True)]
    what = f"one stage of {STAGES} has {weights >> 20} MiB of weights: "
    return [
        counted(
            f"{what}bytes of parameters in each process beyond its own stage's",
            [note["parameters_here"] - note["weights"] for note in rich],
            [0] * STAGES,
        ),
        measured(
            f"{what}rise of another stage's peak for it, over those weights",
            [share for stage, share in enumerate(risen) if stage != RICH],
            STRANGER_BAR,
        ),
        measured(f"{what}rise of its own peak while it is built, over those weights", [risen[RICH]]),
    ]


def _observed(
    schedule: str, model: Callable[[], nn.Sequential], samples: int, alive: bool = True
) -> tuple[tuple[int, ...], list[Note]]:
    """Three steps of microbatches of one sample: peak in-flight microbatches, and what the ranks noted, by stage."""
    with TemporaryDirectory() as folder:
        task = Task(
            model, functools.partial(_batch, samples), first_mean, witness(folder, alive), samples, (1,) * STAGES
        )
        with trainer_of(task, schedule, microbatch_weight="samples") as trainer:
            for _ in range(3):
                metrics = trainer.train_step(task.batch())
            return metrics["peak_in_flight"], read_witness(folder)


def _batch(samples: int) -> tuple[Tensor, Tensor]:
    return torch.ones(samples, 1), torch.zeros(samples)


def _mib(notes: list[Note], key: str) -> list[int]:
    return [round(note[key] / 2**20) for note in notes]
