"""A plan as text for a person."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raypipe.accounting import costs_of
from raypipe.advice import advice, short
from raypipe.schedule import Op
from raypipe.stage.share import share_sizes

if TYPE_CHECKING:
    from raypipe.accounting import StagePlan
    from raypipe.model.partition import Chunk
    from raypipe.model.recomputing import Recomputed
    from raypipe.model.split_coverage import Coverage
    from raypipe.plan import Plan

__all__ = ["imbalance", "plan_table"]

_WIDTH = 120


def plan_table(plan: Plan) -> str:
    """What each stage computes, then what it holds, by kind; the schedule's bubble, the imbalance, and advice."""
    simulated = plan.choice.simulation if plan.choice else plan.schedule.simulate(costs_of(plan.partition.chunks))
    lines = [*_aligned(_work(plan)), "", *_aligned(_bytes(plan))]
    shared = plan.partition.shared
    if shared:
        holders = (f"{name} (chunks {', '.join(map(str, chunks))})" for name, chunks in shared.items())
        lines.append(f"shared: {', '.join(holders)}")
    if plan.tensor is not None:
        lines.append(
            f"tensor_parallel={plan.tensor.size}: parameters, weights, gradients and optimizer are one rank's; "
            "activations count whole"
        )
    replicas, samples = plan.topology.replicas, plan.samples
    if replicas > 1 and plan.rule is not None:
        sharing = ", which share the optimizer's state out" if plan.options.shard else ""
        samples = share_sizes(samples, replicas)[0]
        lines.append(
            f"{replicas} replicas of this pipeline, {plan.topology.size} ranks{sharing}; each has up to {samples} of a "
            f"batch's {plan.samples} samples"
        )
    lines.append(f"{plan.schedule.headline()} of {samples} samples; predicted bubble {simulated.bubble:.1%}")
    if plan.options.precision != "fp32":
        lines.append(f"{plan.options.precision}: forwards under autocast; weights, gradients and optimizer in float32")
    if plan.coverage is not None:
        lines.append(textwrap.fill(_halves(plan.coverage, plan.partition.chunks), _WIDTH))
    if plan.recomputed.units or plan.recomputed.whole:
        lines.append(textwrap.fill(_again(plan.recomputed), _WIDTH))
    if plan.choice is not None:
        lines += ["chosen among", *(f"  {line}" for line in str(plan.choice).splitlines())]
    lines.append(
        f"imbalance {imbalance(plan):.2f} (the slowest stage over the mean); FLOPs, times and sends are a microbatch's"
    )
    return "\n".join(lines + [textwrap.fill(sentence, _WIDTH) for sentence in advice(plan, simulated.bubble)])


def imbalance(plan: Plan) -> float:
    """The slowest stage's cost of a microbatch over the mean stage's: 1 is even."""
    costs = costs_of(plan.partition.chunks).table(plan.schedule.chunks)
    totals = [0.0] * len(plan.stages)
    for number, (forward, backward) in enumerate(zip(costs[Op.FORWARD], costs[Op.BACKWARD], strict=True)):
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
                _units(plan, stage),
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
    rows += (_bytes_of(stage, plan.schedule.placement.count(stage.stage)) for stage in plan.stages)
    return rows


def _bytes_of(stage: StagePlan, chunks: int) -> Sequence[str]:
    alike = stage.peak_in_flight * stage.activations_bytes == stage.peak_activations_bytes
    flight = f"{stage.peak_in_flight}{f' x {short(stage.activations_bytes)}B' if alike else f' in {chunks} chunks'}"
    more = f" + {short(stage.recompute_bytes)}B run again" if stage.recompute_bytes else ""
    return (
        str(stage.stage),
        f"{short(stage.weights_bytes)}B",
        f"{short(stage.gradients_bytes)}B",
        "unknown" if stage.optimizer_bytes is None else f"{short(stage.optimizer_bytes)}B",
        f"{flight} = {short(stage.peak_activations_bytes)}B{more}",
        f"{short(stage.received_bytes)}B",
        f"{short(stage.total_bytes)}B",
    )


def _halves(found: Coverage, chunks: Sequence[Chunk]) -> str:
    """Which units have parameters whose gradients do not wait, and what keeps them."""
    text = f"backwards in halves: {found.share():.1%} of the trained weights' bytes have their gradients in W"
    if not found.whole:
        return text
    units = dict.fromkeys(unit for chunk in chunks for unit in chunk.units)
    kept: dict[str, dict[str, None]] = {}
    for name, functions in found.functions.items():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), name)
        kept.setdefault(unit, {}).update(dict.fromkeys(functions))
    listed = [f"{unit} ({', '.join(functions)})" for unit, functions in kept.items()]
    more = f", and {len(listed) - 4} more" if len(listed) > 4 else ""
    return f"{text}; the rest is computed in I, in {', '.join(listed[:4])}{more}"


def _again(recomputed: Recomputed) -> str:
    """Which units run again, and which do not and why."""
    text = f"recompute: {_span(recomputed.units) if recomputed.units else 'no unit'} in the backward"
    reasons: dict[str, list[str]] = {}
    for name, reason in recomputed.whole.items():
        reasons.setdefault(reason, []).append(name)
    left = [f"{_span(names)} ({reason})" for reason, names in reasons.items()]
    return f"{text}; left whole: {'; '.join(left)}" if left else text


def _units(plan: Plan, stage: StagePlan) -> str:
    """Of each of its chunks, or of all together where that is too long."""
    text = " + ".join(_span(chunk.units) for chunk in plan.chunks_on(stage.stage))
    return text if len(text) <= 56 else _span(stage.units)


def _span(units: Sequence[str]) -> str:
    """The units in words, in a width that leaves room for the numbers."""
    text = units[0] if len(units) == 1 else f"{units[0]} .. {units[-1]} ({len(units)})"
    return text if len(text) <= 56 else f"{text[:26]}...{text[-27:]}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
