"""``schedule="auto"``: every candidate is cut, weighed and simulated, and the fastest that fits the memory is taken."""

from __future__ import annotations

import dataclasses

from raypipe.accounting import costs_of
from raypipe.advice import device_memory
from raypipe.cutting import Cutter
from raypipe.errors import CutError
from raypipe.options import Options
from raypipe.schedule import Auto, Choice, Costs, Schedule, build, choose

__all__ = ["chosen"]


def chosen(options: Options, microbatches: int, cutter: Cutter) -> tuple[Options, Choice | None]:
    """The options with a schedule's name where they ask for the fastest, and why it is that one.

    Args:
        options: of the trainer.
        microbatches: of the example batch.
        cutter: of the model.

    Raises:
        ValueError: no candidate can be cut, or none fits the memory.
        CutError: no candidate can be cut.
    """
    auto = options.schedule
    if not isinstance(auto, Auto):
        return options, None
    made: dict[Schedule, tuple[Costs, list[float]]] = {}
    refused: list[ValueError | CutError] = []
    for name, chunks in auto.tried(options.chunks):
        try:
            schedule = build(name, options.stages, microbatches, chunks)
            cut, stages = cutter(schedule)
        except (ValueError, CutError) as error:
            refused.append(error)
            continue
        costs = costs_of(cut.chunks, latency=auto.latency, bandwidth=auto.bandwidth)
        made[schedule] = costs, [float(stage.total_bytes) for stage in stages]
    if not made:
        raise (
            refused[0]
            if refused
            else ValueError(
                f"chunks={options.chunks}, but no schedule that may be chosen holds so many a stage; leave chunks out"
            )
        )
    choice = choose(
        tuple(made),
        lambda s: made[s][0],
        _limit(auto, options.stages * options.data_parallel),
        bytes_of=lambda s: made[s][1],
    )
    found = choice.schedule
    return dataclasses.replace(options, schedule=found.name, chunks=found.chunks // found.stages), choice


def _limit(auto: Auto, ranks: int) -> float:
    if auto.memory_bytes is not None:
        return float(auto.memory_bytes)
    memory, what = device_memory()
    return float(memory if what == "GPU" else memory / ranks)
