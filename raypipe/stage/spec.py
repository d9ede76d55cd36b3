"""What a rank is told once, before its first step; everything in it can be pickled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from raypipe.model.build import Skeleton
from raypipe.model.call import Caller
from raypipe.model.microbatch import BatchLayout
from raypipe.model.weights import LossRule
from raypipe.parallel.stage_split import TensorSplit
from raypipe.schedule import Schedule
from raypipe.topology import Topology

__all__ = ["Gradients", "OptimizerMaker", "PipelineSpec", "SchedulerMaker"]

OptimizerMaker = Callable[[list[tuple[str, torch.nn.Parameter]]], torch.optim.Optimizer]
SchedulerMaker = Callable[[torch.optim.Optimizer], Any]


@dataclass(frozen=True, slots=True)
class Gradients:
    """Which parameters' gradients are whose.

    Attributes:
        owned: for each rank the trainable parameters that it counts in the global norm: all that it holds, but of a
            shared one there is one owner, and of a tensor group's the first rank.
        order: all trainable parameters that some rank holds, in model order: the order of sums in the norm.
        shared: for each set of ranks that share parameters, their names.
        stepped: for each rank what it steps where the optimizer is sharded: what the first rank of its tensor group
            owns, of which it holds a piece. None given: what it owns.
    """

    owned: tuple[tuple[str, ...], ...]
    order: tuple[str, ...]
    shared: Mapping[tuple[int, ...], tuple[str, ...]] = field(default_factory=dict)
    stepped: tuple[tuple[str, ...], ...] = ()

    def stepped_by(self, rank: int) -> tuple[str, ...]:
        """What a rank steps where the optimizer is sharded."""
        return self.stepped[rank] if self.stepped else self.owned[rank]


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """The whole pipeline, as every rank is told it.

    Attributes:
        topology: the grid of ranks.
        skeleton: the model without its weights.
        units: the user's patterns, or None.
        cuts: the unit call that each chunk but the first starts with.
        calls: how many unit calls the model makes.
        caller: how the model is called and its loss found.
        layout: which dimensions of a batch are cut.
        batch_dims: what the user said of them.
        rule: by which microbatches weigh.
        gradients: whose they are.
        schedule: makes the schedule of a number of microbatches.
        microbatches: how many at most.
        optimizer: makes a rank's optimizer.
        lr_scheduler: makes its scheduler, or None.
        max_grad_norm: bound of the global norm, or None.
        metrics: of evaluation, by name.
        seed: of dropout.
        threads: of PyTorch in each rank, or None to leave them.
        shard: ``"optimizer"`` where each replica keeps and steps its part of the optimizer, else None.
        recompute: names of the units that run again in their backward.
        compiled: whether ranks compile their units.
        tensor: how a stage's layers are split among its ranks, or None where each stage is one rank.
    """

    topology: Topology
    skeleton: Skeleton
    units: Sequence[str] | None
    cuts: tuple[int, ...]
    calls: int
    caller: Caller
    layout: BatchLayout
    batch_dims: Any
    rule: LossRule
    gradients: Gradients
    schedule: Callable[[int], Schedule]
    microbatches: int
    optimizer: OptimizerMaker
    lr_scheduler: SchedulerMaker | None
    max_grad_norm: float | None
    metrics: Mapping[str, Callable[[Any, Any], Any]]
    seed: int
    threads: int | None
    shard: str | None = None
    recompute: tuple[str, ...] = ()
    compiled: bool = False
    tensor: TensorSplit | None = None
