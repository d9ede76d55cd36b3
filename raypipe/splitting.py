"""How a plan splits layers among the ranks of a stage, and what is then left for each rank."""

from __future__ import annotations

import dataclasses

from raypipe.accounting import StagePlan
from raypipe.model.build import Skeleton
from raypipe.model.husk import names_of
from raypipe.model.partition import Partition
from raypipe.model.recording import Recording
from raypipe.options import Options
from raypipe.parallel.elementwise import refuse_coupled
from raypipe.parallel.stage_split import TensorSplit, find_split
from raypipe.schedule import Schedule

__all__ = ["divided", "found_split"]


def found_split(skeleton: Skeleton, recording: Recording, options: Options) -> TensorSplit | None:
    """The split of a model's layers; None where each stage is one rank.

    Raises:
        TypeError, ValueError, CutError: the plan, or the optimizer, does not fit; see ``find_split`` and
            ``refuse_coupled``.
    """
    if options.tensor_parallel == 1:
        return None
    outside = {name for event in recording.events for name in event.parameters}
    units = tuple(skeleton.unit_buffers)
    split = find_split(skeleton.model, options.tensor_parallel_plan, options.tensor_parallel, units, outside)
    parameters = names_of(skeleton.model)[0]
    trained = {name: parameters[name].dim() for name in split.dims if parameters[name].requires_grad}
    refuse_coupled(options.optimizer, trained, f"tensor_parallel={options.tensor_parallel}")
    return split


def divided(stage: StagePlan, cut: Partition, schedule: Schedule, skeleton: Skeleton, split: TensorSplit) -> StagePlan:
    """What the first rank of a stage holds of it; activations count whole, as they are between pairs of layers."""
    parameters = names_of(skeleton.model)[0]
    chunks = [cut.chunks[n] for n in range(schedule.chunks) if schedule.stage_of(n) == stage.stage]
    names = {name for chunk in chunks for name in chunk.parameters}
    gone = trained = whole = 0.0
    count = 0.0
    for name in names:
        parameter = parameters[name]
        dim = split.dims.get(name)
        rest = 1.0 - (split.share(name, parameter.shape[dim]) if dim is not None else 1.0)
        size = parameter.numel() * parameter.element_size()
        count += rest * parameter.numel()
        gone += rest * size
        if parameter.requires_grad:
            trained += rest * size
            whole += size
    left = 1.0 - trained / whole if whole else 1.0
    return dataclasses.replace(
        stage,
        parameters=stage.parameters - round(count),
        weights_bytes=stage.weights_bytes - round(gone),
        gradients_bytes=round(stage.gradients_bytes * left),
        optimizer_bytes=None if stage.optimizer_bytes is None else round(stage.optimizer_bytes * left),
    )
