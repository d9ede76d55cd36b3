"""From the ranks' reports to one step's metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from raypipe.observe.timeline import bubble
from raypipe.stage.optimizer import global_norm
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.spec import Gradients
from raypipe.topology import Topology

__all__ = ["average", "step_metrics", "tokens_in"]


def step_metrics(
    reports: Sequence[TrainReport], gradients: Gradients, topology: Topology | None = None
) -> dict[str, Any]:
    """One step's metrics.

    Args:
        reports: by rank.
        gradients: whose gradients are whose.
        topology: the grid of ranks; None: one pipeline.

    Returns:
        ``loss``; ``grad_norm`` before clipping; ``lr`` of the first parameter group; ``samples``; ``microbatches``, the
        most that a replica had; ``seconds``, of the slowest rank; ``bubble``, the share of the ranks' time in which no
        action was computed; ``peak_in_flight``, by stage, the most of all replicas. Under fp16 also ``loss_scale``;
        ``skipped``, whether the weights stayed as they were; ``non_finite``, where the number arose that was the
        reason, or None.
    """
    topology = Topology(len(reports)) if topology is None else topology
    lasts = [report for rank, report in enumerate(reports) if report.loss is not None and topology.leader(rank) == rank]
    last = lasts[0]
    peaks = [0] * topology.stages
    for rank, report in enumerate(reports):
        stage = topology.place(rank).stage
        peaks[stage] = max(peaks[stage], report.trace.peak_in_flight)
    norms = [torch.from_numpy(report.norms.copy()) for report in reports]
    metrics: dict[str, Any] = {
        "step": last.step,
        "loss": sum(report.loss for report in lasts if report.loss is not None),
        "grad_norm": global_norm(gradients, norms) / (last.divisor or 1.0),
        "lr": next((report.lr[0] for report in reports if report.lr), 0.0),
        "samples": last.samples,
        "microbatches": max(report.microbatches for report in lasts),
        "seconds": max(report.trace.ended - report.trace.started for report in reports),
        "bubble": bubble([report.trace for report in reports]),
        "peak_in_flight": tuple(peaks),
    }
    if last.loss_scale is not None:
        where = last.non_finite
        metrics.update(loss_scale=last.loss_scale, skipped=where is not None, non_finite=where)
    return metrics


def average(reports: Sequence[ForwardReport]) -> dict[str, Any]:
    """The metrics of an evaluation: the loss by its weights, the user's metrics by samples.

    Args:
        reports: of the last stage, one a batch.
    """
    weight = sum(report.weight for report in reports)
    losses = [report.loss * report.weight for report in reports if report.loss is not None and report.weight]
    samples = sum(report.samples for report in reports)
    names = reports[0].metrics or {}
    return {
        "loss": sum(losses) / weight if weight else math.nan,
        "samples": samples,
        **{name: sum((r.metrics or {})[name] * r.samples for r in reports) / samples for name in names},
    }


def tokens_in(batch: Any) -> int | None:
    """The elements of the batch's first tensor of integers with two dimensions: its tokens, where it has such."""
    for leaf in pytree.tree_leaves(batch):
        shape: tuple[int, ...] = tuple(getattr(leaf, "shape", ()))
        dtype = str(getattr(leaf, "dtype", ""))
        if len(shape) == 2 and "int" in dtype:
            return int(shape[0]) * int(shape[1])
    return None
