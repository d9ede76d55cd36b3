"""A plan as text for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from raypipe.schedule import Costs

if TYPE_CHECKING:
    from raypipe.plan import Plan

__all__ = ["plan_table"]


def plan_table(plan: Plan) -> str:
    """Units, parameters, FLOPs and bytes of each stage, then the schedule's bubble and peak in-flight microbatches."""
    simulated = plan.schedule.simulate(_example_costs(plan))
    rows = [("stage", "units", "parameters", "weights", "forward FLOPs", "sends", "in flight")]
    for stage in range(plan.topology.stages):
        chunks = [c for number, c in enumerate(plan.partition.chunks) if plan.schedule.stage_of(number) == stage]
        units = [unit for chunk in chunks for unit in chunk.units]
        tensors = plan.tensors_of(stage)
        rows.append(
            (
                str(stage),
                units[0] if len(units) == 1 else f"{units[0]} .. {units[-1]} ({len(units)})",
                _short(sum(tensors[name].numel() for name in plan.held_by(stage))),
                f"{_short(_bytes_of(tensors))}B",
                _short(sum(chunk.flops for chunk in chunks)),
                f"{_short(sum(chunk.boundary_bytes for chunk in chunks))}B",
                str(simulated.peak_in_flight[stage]),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    shared = plan.partition.shared
    if shared:
        holders = (f"{name} (chunks {', '.join(map(str, chunks))})" for name, chunks in shared.items())
        lines.append(f"shared: {', '.join(holders)}")
    lines.append(
        f"{plan.schedule.headline()} of {plan.samples} samples; predicted bubble {simulated.bubble:.1%} "
        "(FLOPs and 'sends' are of one microbatch)"
    )
    return "\n".join(lines)


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if number < 1000 or unit == "T":
            return f"{number:.0f}{unit}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    raise AssertionError("unreachable")


def _example_costs(plan: Plan) -> Costs:
    """Costs for a simulation before anything ran: FLOPs of each chunk's forward, a backward twice that."""
    flops = [float(chunk.flops) for chunk in plan.partition.chunks]
    mean = sum(flops) / len(flops) or 1.0
    forward = tuple(max(f / mean, 1e-3) for f in flops) if any(flops) else tuple(1.0 for _ in flops)
    return Costs(forward=forward, backward=tuple(2 * f for f in forward))


def _bytes_of(named: Mapping[str, Tensor]) -> int:
    """The memory of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in named.values())
