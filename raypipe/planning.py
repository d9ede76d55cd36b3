"""From a model and an example batch to a plan, by running the model on husks; nothing is started."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from raypipe.accounting import observed
from raypipe.checks import (
    Changes,
    refuse_changing_buffers,
    refuse_parameters_in_functions,
    refuse_untrainable,
    try_optimizers,
)
from raypipe.choosing import chosen
from raypipe.cutting import Cutter
from raypipe.data.wire import pack, unpack
from raypipe.errors import BatchError
from raypipe.model.build import Skeleton, make_skeleton
from raypipe.model.call import Caller
from raypipe.model.cost import CallTime
from raypipe.model.husk import names_of, replace_tensors
from raypipe.model.lent import lent
from raypipe.model.measure import measure, runnable_copy
from raypipe.model.microbatch import BatchLayout, find_layout
from raypipe.model.origin import Origin, origin_of
from raypipe.model.pretrained import Pretrained
from raypipe.model.probe import confirm, find_rule, probe
from raypipe.model.recording import Recording
from raypipe.model.split_coverage import Coverage, coverage
from raypipe.model.streamed import streaming
from raypipe.model.streamed_gradients import streaming_gradients
from raypipe.model.trial_run import tolerance_of
from raypipe.model.twin import Twin
from raypipe.model.weights import LossRule, refuse_batch_norm
from raypipe.options import Options
from raypipe.plan import Plan
from raypipe.schedule import Auto
from raypipe.splitting import divided, found_split
from raypipe.topology import Topology

__all__ = ["make_plan", "planned_origin"]


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
    twin = Twin(skeleton.model, options.units)
    changes = Changes(twin.model)
    recording, saved = observed(twin, caller, microbatches[0].batch, training=training)
    times = None
    if options.balance == "time" or isinstance(options.schedule, Auto):
        times = _times(origin, skeleton, caller, microbatches[0].batch, recording, options, training)
    cutter = Cutter(skeleton, twin, recording, saved, options, times)
    options, choice = chosen(options, len(microbatches), cutter)
    schedule = options.make_schedule(len(microbatches))
    cut, stages = cutter(schedule)
    tensor = found_split(skeleton, recording, options)
    if tensor is not None:
        stages = tuple(divided(stage, cut, schedule, skeleton, tensor) for stage in stages)
    if training:
        refuse_changing_buffers(changes.names(), options, skeleton.unit_buffers, cut)
    rule = _find_rule(origin, skeleton, caller, batch, layout, options) if training else None
    plan = Plan(
        Topology(options.stages, tensor=options.tensor_parallel),
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
        stages,
        choice,
        _coverage(twin, caller, microbatches[0].batch) if training and schedule.in_halves else None,
        tensor,
    )
    if training:
        _try_optimizers(plan)
    return plan


def _coverage(twin: Twin, caller: Caller, piece: Any) -> Coverage:
    """Which weights' gradients wait for the second half of a backward, as the schedule wants them to."""
    named = {name: parameter for name, parameter in twin.model.named_parameters() if parameter.requires_grad}
    return coverage(lambda: observed(twin, caller, piece, training=False), named)


def _times(
    origin: Origin,
    skeleton: Skeleton,
    caller: Caller,
    piece: Any,
    recording: Recording,
    options: Options,
    training: bool,
) -> tuple[CallTime, ...]:
    """Each unit call's time on one microbatch; of a model without weights, each kind of unit gets its own for that."""
    told: dict[str, Any] = {"training": training, "halves": training and isinstance(options.schedule, Auto)}
    if origin.is_whole:
        running = runnable_copy(origin.model, training)
    else:
        running, told["with_weights"] = lent(skeleton, origin.tensor, recording, training)
    return measure(running, options.units, caller, piece, recording, options.threads or 1, **told)


def _try_optimizers(plan: Plan) -> None:
    parameters = names_of(plan.model)[0]
    held = [
        (plan.topology.rank(stage), {name: parameters[name] for name in plan.held_by(stage)})
        for stage in range(plan.topology.stages)
    ]
    try_optimizers(plan.options, plan.gradients(), held)


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
