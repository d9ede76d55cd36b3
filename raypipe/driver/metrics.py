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

__all__ = ["average", "step_metrics", "tokens_in"]


def step_metrics(
    reports: Sequence[TrainReport], gradients: Gradients, stages: Sequence[TrainReport] | None = None
) -> dict[str, Any]:
    """One step's metrics.

    Args:
        reports: by rank.
        gradients: whose gradients are whose.
        stages: the reports of one rank of each stage; None: every rank is a stage.

    Returns:
        ``loss``; ``grad_norm`` before clipping; ``lr`` of the first parameter group; ``samples``; ``microbatches``;
        ``seconds``, of the slowest rank; ``bubble``, the share of the stages' time in which no action was computed;
        ``peak_in_flight``, by stage.
    """
    stages = reports if stages is None else stages
    last = next(report for report in reports if report.loss is not None)
    norms = [torch.from_numpy(report.norms.copy()) for report in reports]
    return {
        "step": last.step,
        "loss": last.loss,
        "grad_norm": global_norm(gradients, norms) / (last.divisor or 1.0),
        "lr": next((report.lr[0] for report in reports if report.lr), 0.0),
        "samples": last.samples,
        "microbatches": last.microbatches,
        "seconds": max(report.trace.ended - report.trace.started for report in reports),
        "bubble": bubble([report.trace for report in stages]),
        "peak_in_flight": tuple(report.trace.peak_in_flight for report in stages),
    }


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
