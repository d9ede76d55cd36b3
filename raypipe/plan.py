"""From a model and an example batch to everything that a pipeline needs; nothing is started."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.data.wire import Wire, pack, unpack
from raypipe.errors import CutError
from raypipe.model.build import Skeleton, make_skeleton
from raypipe.model.call import Caller
from raypipe.model.husk import names_of
from raypipe.model.microbatch import BatchLayout, find_layout
from raypipe.model.partition import Partition, partition
from raypipe.model.probe import find_rule
from raypipe.model.record import record
from raypipe.model.recording import Recording
from raypipe.model.twin import Twin
from raypipe.model.weights import LossRule, refuse_batch_norm
from raypipe.options import Options
from raypipe.schedule import Schedule
from raypipe.stage.optimizer import StageOptimizer
from raypipe.stage.spec import Gradients, PipelineSpec
from raypipe.stage.worker import StageWorker
from raypipe.topology import Topology
from raypipe.transport.base import Wiring

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True, repr=False)
class Plan:
    """How a model is cut and run. ``print`` shows it as a table.

    Attributes:
        topology: the grid of ranks.
        partition: what each chunk holds.
        schedule: of the example batch's number of microbatches.
        layout: how a batch is cut.
        rule: by which microbatches weigh, or None where no loss was asked for.
        samples: of the example batch.
        options: of the trainer.
        caller: how the model is called and its loss found.
        skeleton: the model without its weights.
        calls: how many unit calls the model makes.
        model: the user's own, which is never changed.
    """

    topology: Topology
    partition: Partition
    schedule: Schedule
    layout: BatchLayout
    rule: LossRule | None
    samples: int
    options: Options
    caller: Caller
    skeleton: Skeleton
    calls: int
    model: nn.Module

    def held_by(self, stage: int) -> tuple[str, ...]:
        """Names of the parameters on a stage, in model order."""
        chunks = [c for number, c in enumerate(self.partition.chunks) if self.schedule.stage_of(number) == stage]
        names = {name for chunk in chunks for name in chunk.parameters}
        return tuple(name for name in names_of(self.model)[0] if name in names)

    def tensors_of(self, stage: int) -> dict[str, Tensor]:
        """The parameters and buffers that a stage holds; the user's own tensors, not copies."""
        parameters, buffers = names_of(self.model)
        chunks = [c for number, c in enumerate(self.partition.chunks) if self.schedule.stage_of(number) == stage]
        units = {unit for chunk in chunks for unit in chunk.units}
        inside = [name for unit in units for name in self.skeleton.unit_buffers[unit]]
        held = {name: parameters[name].detach() for name in self.held_by(stage)}
        return {**held, **{name: buffers[name].detach() for name in inside}}

    def gradients(self) -> Gradients:
        """Whose gradients are whose."""
        held = [self.held_by(stage) for stage in range(self.topology.stages)]
        trainable = [name for name, p in names_of(self.model)[0].items() if p.requires_grad]
        holders = {name: tuple(s for s, names in enumerate(held) if name in names) for name in trainable}
        shared: dict[tuple[int, ...], list[str]] = {}
        for name, stages in holders.items():
            if len(stages) > 1:
                shared.setdefault(tuple(self.topology.rank(s) for s in stages), []).append(name)
        owned = tuple(
            tuple(name for name in trainable if holders[name] and holders[name][0] == stage)
            for stage in range(self.topology.stages)
        )
        order = tuple(name for name in trainable if holders[name])
        return Gradients(owned, order, {ranks: tuple(names) for ranks, names in shared.items()})

    def wiring(self) -> Wiring:
        """Which ranks talk to which."""
        pairs: dict[tuple[int, int], None] = {}
        for chunk in range(self.schedule.chunks - 1):
            one, other = self.schedule.stage_of(chunk), self.schedule.stage_of(chunk + 1)
            if one != other:
                pairs[self.topology.rank(one), self.topology.rank(other)] = None
                pairs[self.topology.rank(other), self.topology.rank(one)] = None
        return Wiring(self.topology.size, tuple(sorted(pairs)), tuple(sorted(self.gradients().shared)))

    def spec(self) -> PipelineSpec:
        """What every rank is told."""
        options = self.options
        return PipelineSpec(
            topology=self.topology,
            skeleton=self.skeleton,
            units=options.units,
            cuts=self.partition.cuts,
            calls=self.calls,
            caller=self.caller,
            layout=self.layout,
            batch_dims=options.batch_dims,
            rule=self.rule or LossRule.given("samples"),
            gradients=self.gradients(),
            schedule=options.make_schedule,
            microbatches=options.most_microbatches,
            optimizer=options.optimizer,
            lr_scheduler=options.lr_scheduler,
            max_grad_norm=options.max_grad_norm,
            metrics=options.metrics,
            seed=options.seed,
            threads=options.threads or 1,
        )

    def build_of(self, rank: int) -> Callable[[], StageWorker]:
        """What makes a rank's worker, in whatever process it is called."""
        tensors = pack(self.tensors_of(self.topology.place(rank).stage))
        return functools.partial(_build, self.spec(), rank, tensors)

    def __str__(self) -> str:
        from raypipe.table import plan_table

        return plan_table(self)

    __repr__ = __str__


def make_plan(model: nn.Module, options: Options, batch: Any, *, training: bool = True) -> Plan:
    """Plans a pipeline by looking at one batch.

    Args:
        model: not changed.
        options: of the trainer.
        batch: an example.
        training: whether a loss is needed.

    Raises:
        CutError: the model cannot be cut exactly.
        BatchError: the batch cannot be cut exactly, or no rule of weights reproduces its loss.
        ValueError: there are more stages than units, or the model has BatchNorm in train mode.
        TypeError: ``optimizer`` or ``lr_scheduler`` gave what cannot be used.
    """
    caller = Caller(options.forward, options.loss)
    batch = unpack(pack(batch))
    layout = find_layout(batch, options.batch_dims)
    samples = layout.samples(batch)
    microbatches = layout.split(batch, options.most_microbatches)
    skeleton = make_skeleton(model, options.units)
    if not (training and skeleton.model.training):  # a root in train mode keeps its submodules' own modes
        skeleton.model.train(training)
    if training:  # by the most microbatches that a batch may have: this one may be small
        refuse_batch_norm(skeleton.model, options.most_microbatches, options.batch_norm)
    schedule = options.make_schedule(len(microbatches))
    twin = Twin(skeleton.model, options.units)
    recording = _record(twin, caller, microbatches[0].batch)
    sizes = {name: p.numel() for name, p in names_of(model)[0].items()}
    cut = partition(recording, twin.unit_parameters, sizes, schedule.chunks, options.balance)
    _refuse_shared_buffers(skeleton, cut)
    rule = _find_rule(model, caller, batch, layout, options) if training else None
    plan = Plan(
        Topology(options.stages),
        cut,
        schedule,
        layout,
        rule,
        samples,
        options,
        caller,
        skeleton,
        len(recording.calls),
        model,
    )
    if training:
        _try_optimizers(plan)
    return plan


def _record(twin: Twin, caller: Caller, batch: Any) -> Recording:
    own = pytree.tree_map_only(Tensor, torch.clone, batch)
    return record(twin, lambda model: caller.outputs(model, own))


def _find_rule(model: nn.Module, caller: Caller, batch: Any, layout: BatchLayout, options: Options) -> LossRule:
    """The probe runs in the modes of training."""
    if model.training:
        return find_rule(model, caller, batch, layout, options.microbatch_weight)
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        return find_rule(model, caller, batch, layout, options.microbatch_weight)
    finally:
        for module, training in modes.items():
            module.training = training


def _try_optimizers(plan: Plan) -> None:
    """Makes each rank's optimizer once on stand-ins, so that one that cannot be used is refused before anything starts.

    Raises:
        TypeError: it is of a kind that cannot be split.
        ValueError: it works on other parameters than it was given. An exception of the user's code comes as itself.
    """
    options, gradients, parameters = plan.options, plan.gradients(), names_of(plan.model)[0]
    for stage in range(plan.topology.stages):
        held = {name: _stand_in(parameters[name]) for name in plan.held_by(stage)}
        rank = plan.topology.rank(stage)
        made = StageOptimizer(rank, held, gradients, options.optimizer, options.lr_scheduler, None, None).optimizer
        given = {id(parameter) for parameter in held.values()}
        groups = made.param_groups if made is not None else []
        if any(id(parameter) not in given for group in groups for parameter in group["params"]):
            raise ValueError(
                "optimizer(named_parameters) made an optimizer of other parameters than it was given, so a stage would "
                "not train its own; use its argument, as in lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"
            )


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter of the same shape, dtype and device on one element of memory."""
    empty = torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
    return nn.Parameter(empty, requires_grad=parameter.requires_grad)


def _refuse_shared_buffers(skeleton: Skeleton, cut: Partition) -> None:
    """A unit called in two chunks has its buffers on both; what changes one would not change the other."""
    for unit, names in skeleton.unit_buffers.items():
        chunks = [number for number, chunk in enumerate(cut.chunks) if unit in chunk.units]
        changing = [name for name in names if "running_" in name or name.endswith("num_batches_tracked")]
        if len(chunks) > 1 and changing:
            raise CutError(
                f"{unit} is called in chunks {chunks} and changes its buffer {changing[0]}, which would differ between "
                "them; keep its calls in one chunk with balance=[...]"
            )


def _build(spec: PipelineSpec, rank: int, tensors: Wire) -> StageWorker:
    return StageWorker(spec, rank, unpack(tensors))
