"""What a plan advises: whether the model needs a pipeline at all, and whether each stage has room."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from raypipe.plan import Plan

__all__ = ["advice", "device_memory", "short"]


def short(number: float) -> str:
    """A number in at most five characters and a letter."""
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.0f}{unit}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def device_memory() -> tuple[int, str]:
    """Bytes of this machine's first GPU, or of its memory where it has none; and which it is."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory), "GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "machine"


def advice(plan: Plan, bubble: float) -> list[str]:
    """Sentences about the plan, by this machine's memory; none where there is nothing to say.

    Data parallelism has no bubble and sends no activations; it sums every gradient once a step instead. On a machine
    without GPUs all copies may have to share its memory, so it must have room for all of them.
    """
    memory, what = device_memory()
    lines = []
    for stage in plan.stages:
        if stage.total_bytes > memory:
            lines.append(
                f"stage {stage.stage} needs {short(stage.total_bytes)}B and this {what} has {short(memory)}B: use more "
                "stages, more microbatches, or balance='memory'"
            )
    count = plan.topology.size
    # A copy takes its microbatches one after the other: one is in flight. (A shared weight counts at each holder.)
    need = sum(s.total_bytes - s.received_bytes - s.peak_activations_bytes + s.activations_bytes for s in plan.stages)
    copies = count if what == "machine" else 1
    # Of a tensor group one rank is counted, so what the whole model needs is not told by these numbers.
    whole = plan.topology.tensor == 1 and plan.rule is not None
    if len(plan.stages) > 1 and whole and plan.samples >= count and need * copies <= memory:
        sends = 2 * plan.schedule.microbatches * sum(s.sends_bytes for s in plan.stages)
        gradients = sum(s.gradients_bytes for s in plan.stages)
        lines.append(
            f"advice: the whole model needs {short(need)}B with its optimizer, and {'one' if copies == 1 else count} "
            f"such fit this {what}'s {short(memory)}B; {count} copies (data parallelism) would likely be faster: no "
            f"bubble instead of {bubble:.1%}, and {short(gradients)}B of gradients summed once a step instead of "
            f"{short(sends)}B sent between stages; that is stages=1, data_parallel={count}"
        )
    return lines
