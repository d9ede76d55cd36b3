"""From a model and an example batch to everything that a pipeline needs; nothing is started."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from raypipe.accounting import StagePlan, in_flight, observed, sizes_of, stage_plans
from raypipe.checks import (
    Changes,
    refuse_changing_buffers,
    refuse_parameters_in_functions,
    refuse_untrainable,
    try_optimizers,
)
from raypipe.data.wire import pack, unpack
from raypipe.errors import BatchError
from raypipe.model.build import Skeleton, make_skeleton
from raypipe.model.call import Caller
from raypipe.model.husk import names_of, replace_tensors
from raypipe.model.measure import measure, runnable_copy
from raypipe.model.memory import worst_case
from raypipe.model.microbatch import BatchLayout, LayoutCache, find_layout
from raypipe.model.origin import Origin, origin_of
from raypipe.model.partition import Partition, partition
from raypipe.model.pretrained import Pretrained
from raypipe.model.probe import confirm, find_rule, probe
from raypipe.model.streamed import streaming
from raypipe.model.streamed_gradients import streaming_gradients
from raypipe.model.trial_run import tolerance_of
from raypipe.model.twin import Twin
from raypipe.model.weights import LossRule, refuse_batch_norm
from raypipe.options import Options
from raypipe.schedule import Schedule
from raypipe.stage.inbox import AHEAD
from raypipe.stage.spec import Gradients, PipelineSpec
from raypipe.stage.worker import StageWorker
from raypipe.topology import Topology
from raypipe.transport.base import Wiring

__all__ = ["Plan", "make_plan", "planned_origin"]


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
        origin: the model, and where its tensors come from.
        stages: what each stage holds, computes and sends.
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
    origin: Origin
    stages: tuple[StagePlan, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The unsplit model: the user's own, or one of husks."""
        return self.origin.model

    def held_by(self, stage: int) -> tuple[str, ...]:
        """Names of the parameters on a stage, in model order."""
        chunks = [c for number, c in enumerate(self.partition.chunks) if self.schedule.stage_of(number) == stage]
        names = {name for chunk in chunks for name in chunk.parameters}
        return tuple(name for name in names_of(self.skeleton.model)[0] if name in names)

    def tensors_of(self, stage: int) -> dict[str, Tensor]:
        """The parameters and buffers that a stage holds, as husks: names, shapes and dtypes."""
        parameters, buffers = names_of(self.skeleton.model)
        chunks = [c for number, c in enumerate(self.partition.chunks) if self.schedule.stage_of(number) == stage]
        units = {unit for chunk in chunks for unit in chunk.units}
        inside = [name for unit in units for name in self.skeleton.unit_buffers[unit]]
        inside += [name for chunk in chunks for name in chunk.buffers]
        held = {name: parameters[name].detach() for name in self.held_by(stage)}
        return {**held, **{name: buffers[name].detach() for name in inside}}

    def gradients(self) -> Gradients:
        """Whose gradients are whose."""
        held = [self.held_by(stage) for stage in range(self.topology.stages)]
        trainable = [name for name, p in names_of(self.skeleton.model)[0].items() if p.requires_grad]
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
        share = self.origin.share(self.tensors_of(self.topology.place(rank).stage))
        return functools.partial(_build, self.spec(), rank, share)

    def admission(self) -> Callable[[Any], None]:
        """A check of each batch on the driver, before it is queued: what is wrong with one must not end the ranks."""
        layouts = LayoutCache(self.layout, self.options.batch_dims)
        schedule = functools.cache(self.options.make_schedule)

        def admit(batch: Any) -> None:
            self.caller.check(batch)
            schedule(min(layouts.find(batch).samples(batch), self.options.most_microbatches))

        return admit

    def __str__(self) -> str:
        from raypipe.table import plan_table

        return plan_table(self)

    __repr__ = __str__


def make_plan(model: nn.Module | Origin, options: Options, batch: Any, *, training: bool = True) -> Plan:
    """Plans a pipeline by looking at one batch.

    Args:
        model: not changed; or the origin of one that is nowhere whole.
        options: of the trainer.
        batch: an example.
        training: whether a loss is needed.

    Raises:
        CutError: the model cannot be cut exactly.
        BatchError: the batch cannot be cut exactly, or no rule of weights reproduces its loss.
        ValueError: there are more stages than units, or the model has BatchNorm in train mode.
        TypeError: ``optimizer`` or ``lr_scheduler`` gave what cannot be used.
    """
    refuse_parameters_in_functions(options)
    origin = planned_origin(model, options.seed) if isinstance(model, nn.Module) else model
    model = origin.model
    caller = Caller(options.forward, options.loss)
    batch = unpack(pack(batch))
    caller.check(batch)  # before it is cut, so that the sentence speaks of the user's batch
    layout = find_layout(batch, options.batch_dims)
    samples = layout.samples(batch)
    microbatches = layout.split(batch, options.most_microbatches)
    if training:
        refuse_untrainable(model)
    skeleton = make_skeleton(model, options.units, None if origin.is_whole else origin.tensor)
    if not (training and skeleton.model.training):  # a root in train mode keeps its submodules' own modes
        skeleton.model.train(training)
    if training:  # by the most microbatches that a batch may have: this one may be small
        refuse_batch_norm(skeleton.model, options.most_microbatches, options.batch_norm)
    schedule = options.make_schedule(len(microbatches))
    twin = Twin(skeleton.model, options.units)
    changes = Changes(twin.model)
    recording, saved = observed(twin, caller, microbatches[0].batch, training=training)
    counts = {name: p.numel() for name, p in names_of(skeleton.model)[0].items()}
    sizes, state_known = sizes_of(skeleton, twin, recording, saved, options)
    times = None
    if options.balance == "time":
        if not origin.is_whole:  # its tensors have no data here to run on
            raise ValueError(
                "balance='time' runs the model here, but this one was given as a callable and is built on the ranks; "
                "use 'flops', 'memory', 'parameters' or a list of unit calls"
            )
        piece, threads = microbatches[0].batch, options.threads or 1
        running = runnable_copy(model, training)
        times = measure(running, options.units, caller, piece, recording, threads, training=training)
    memory = worst_case(sizes, in_flight(schedule), AHEAD) if options.balance == "memory" else None
    cut = partition(
        recording, twin.unit_parameters, counts, schedule.chunks, options.balance, times=times, memory=memory
    )
    if training:
        refuse_changing_buffers(changes.names(), options, skeleton.unit_buffers, cut)
    rule = _find_rule(origin, skeleton, caller, batch, layout, options) if training else None
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
        origin,
        stage_plans(cut, schedule, sizes, counts, state_known),
    )
    if training:
        parameters = names_of(model)[0]
        held = [
            (plan.topology.rank(s), {name: parameters[name] for name in plan.held_by(s)}) for s in range(options.stages)
        ]
        try_optimizers(options, plan.gradients(), held)
    return plan


def _find_rule(
    origin: Origin, skeleton: Skeleton, caller: Caller, batch: Any, layout: BatchLayout, options: Options
) -> LossRule:
    """The probe runs in the modes of training, on a copy that shares the model's tensors, or makes them in passing."""
    if options.microbatch_weight is not None:
        return LossRule.given(options.microbatch_weight)
    try:
        if not origin.is_whole:
            observe = streaming(skeleton, origin.tensor, options.units, caller)
            tolerance = tolerance_of(skeleton.model)
            rule = probe(observe, batch, layout, tolerance)
            confirm(rule, streaming_gradients(skeleton, origin.tensor, options.units, caller), batch, layout, tolerance)
            return rule
        tensors = [*origin.model.parameters(), *origin.model.buffers()]
        copy = replace_tensors(origin.model, {id(tensor): tensor for tensor in tensors})
        if not copy.training:
            copy.train()
        return find_rule(copy, caller, batch, layout)
    except BatchError:
        if options.most_microbatches > 1:
            raise
        return LossRule.given("samples")  # a batch that is never cut needs no rule; an evaluation weighs batches so


def planned_origin(model: object, seed: int) -> Origin:
    """The origin of what the user gave as ``model``; see ``origin_of``."""
    if isinstance(model, Pretrained):
        return model.origin(seed)
    return origin_of(model, seed, _packed)


def _packed(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(unpack, pack(tensors))


def _build(spec: PipelineSpec, rank: int, share: Callable[[], dict[str, Tensor]]) -> StageWorker:
    return StageWorker(spec, rank, share())
