"""A plan as text for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raypipe.advice import advice, short
from raypipe.schedule import Costs

if TYPE_CHECKING:
    from raypipe.accounting import StagePlan
    from raypipe.plan import Plan

__all__ = ["imbalance", "plan_table"]

_WIDTH = 120


def plan_table(plan: Plan) -> str:
    """What each stage computes, then what it holds, by kind; the schedule's bubble, the imbalance, and advice."""
    simulated = plan.schedule.simulate(_example_costs(plan))
    lines = [*_aligned(_work(plan)), "", *_aligned(_bytes(plan))]
    shared = plan.partition.shared
    if shared:
        holders = (f"{name} (chunks {', '.join(map(str, chunks))})" for name, chunks in shared.items())
        lines.append(f"shared: {', '.join(holders)}")
    lines.append(f"{plan.schedule.headline()} of {plan.samples} samples; predicted bubble {simulated.bubble:.1%}")
    lines.append(
        f"imbalance {imbalance(plan):.2f} (the slowest stage over the mean); FLOPs, times and sends are a microbatch's"
    )
    return "\n".join(lines + [textwrap.fill(sentence, _WIDTH) for sentence in advice(plan, simulated.bubble)])


def imbalance(plan: Plan) -> float:
    """The slowest stage's cost of a microbatch over the mean stage's: 1 is even."""
    costs = _costs(plan)
    totals = [0.0] * len(plan.stages)
    for number, (forward, backward) in enumerate(costs):
        totals[plan.schedule.stage_of(number)] += forward + backward
    return max(totals) * len(totals) / sum(totals)


def _work(plan: Plan) -> list[Sequence[str]]:
    timed = any(stage.time is not None for stage in plan.stages)
    head = ("stage", "units", "parameters", "forward FLOPs", "backward FLOPs", "sends")
    rows: list[Sequence[str]] = [(*head, "forward ms", "backward ms") if timed else head]
    for stage in plan.stages:
        time = (f"{stage.time.forward * 1e3:.2f}", f"{stage.time.backward * 1e3:.2f}") if stage.time else ()
        rows.append(
            (
                str(stage.stage),
                _span(stage.units),
                short(stage.parameters),
                short(stage.forward_flops),
                short(stage.backward_flops),
                f"{short(stage.sends_bytes)}B",
                *time,
            )
        )
    return rows


def _bytes(plan: Plan) -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ("stage", "weights", "gradients", "optimizer", "activations in flight", "receives", "sum")
    ]
    rows += (_bytes_of(stage) for stage in plan.stages)
    return rows


def _bytes_of(stage: StagePlan) -> Sequence[str]:
    flight = f"{stage.peak_in_flight} x {short(stage.activations_bytes)}B"
    return (
        str(stage.stage),
        f"{short(stage.weights_bytes)}B",
        f"{short(stage.gradients_bytes)}B",
        "unknown" if stage.optimizer_bytes is None else f"{short(stage.optimizer_bytes)}B",
        f"{flight} = {short(stage.peak_in_flight * stage.activations_bytes)}B",
        f"{short(stage.received_bytes)}B",
        f"{short(stage.total_bytes)}B",
    )


def _span(units: Sequence[str]) -> str:
    """The units in words, in a width that leaves room for the numbers."""
    text = units[0] if len(units) == 1 else f"{units[0]} .. {units[-1]} ({len(units)})"
    return text if len(text) <= 56 else f"{text[:26]}...{text[-27:]}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def _example_costs(plan: Plan) -> Costs:
    """Costs for a simulation before anything ran: each chunk's forward and backward, over the mean forward."""
    costs = _costs(plan)
    mean = sum(forward for forward, _ in costs) / len(costs)
    return Costs(
        forward=tuple(max(forward / mean, 1e-3) for forward, _ in costs),
        backward=tuple(max(backward / mean, 1e-3) for _, backward in costs),
    )


def _costs(plan: Plan) -> list[tuple[float, float]]:
    """Forward and backward of each chunk: times where they were measured, else FLOPs, else alike."""
    chunks = plan.partition.chunks
    timed = [(chunk.time.forward, chunk.time.backward) for chunk in chunks if chunk.time is not None]
    if len(timed) == len(chunks):
        return timed
    if any(chunk.flops for chunk in chunks):
        return [(float(chunk.flops), float(chunk.backward_flops)) for chunk in chunks]
    return [(1.0, 2.0) for _ in chunks]
