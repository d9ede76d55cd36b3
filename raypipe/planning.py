"""From a model and an example batch to a plan, by running the model on husks; nothing is started."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
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
from raypipe.errors import BatchError, CutError
from raypipe.model import gradient_check, trial_run
from raypipe.model.build import Skeleton, make_skeleton
from raypipe.model.call import Caller
from raypipe.model.cost import CallTime
from raypipe.model.husk import names_of, replace_tensors
from raypipe.model.lent import lent
from raypipe.model.measure import measure, runnable_copy
from raypipe.model.microbatch import BatchLayout, find_layout
from raypipe.model.origin import Origin, origin_of
from raypipe.model.precision import Precision, refuse_low_weights
from raypipe.model.pretrained import Pretrained
from raypipe.model.probe import confirm, probe
from raypipe.model.recomputing import Recomputed, charge, recomputed_units
from raypipe.model.recording import Recording
from raypipe.model.split_coverage import Coverage, coverage
from raypipe.model.streamed import streaming
from raypipe.model.streamed_gradients import streaming_gradients
from raypipe.model.twin import Twin
from raypipe.model.unit_weight import with_unit
from raypipe.model.weights import LossRule, refuse_batch_norm
from raypipe.options import Options
from raypipe.plan import Plan
from raypipe.schedule import Auto
from raypipe.splitting import divided, found_split
from raypipe.stage.share import share_of
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
    caller = Caller(options.forward, options.loss, Precision(options.precision))
    batch = unpack(pack(batch))
    caller.check(batch)  # before it is cut, so that the sentence speaks of the user's batch
    layout = find_layout(batch, options.batch_dims)
    samples = layout.samples(batch)
    # An evaluation's batch goes to one replica; in training the first one's share is as large as any.
    replicas = options.data_parallel if training else 1
    microbatches = share_of(layout, batch, 0, replicas, options.most_microbatches).microbatches
    if training:
        refuse_untrainable(model)
        refuse_low_weights(model, caller.precision)
    skeleton = make_skeleton(model, options.units, None if origin.is_whole else origin.tensor)
    if not (training and skeleton.model.training):  # a root in train mode keeps its submodules' own modes
        skeleton.model.train(training)
    if training:  # by the most microbatches that a batch may have: this one may be small
        refuse_batch_norm(skeleton.model, options.most_pieces, options.batch_norm, replicas)
    twin = Twin(skeleton.model, options.units)
    changes = Changes(twin.model)
    recording, saved = observed(twin, caller, microbatches[0].batch, training=training)
    recomputed = recomputed_units(options.recompute, recording, saved, compiled=options.compile)
    charge(recording, recomputed)
    times = None
    if options.balance == "time" or isinstance(options.schedule, Auto):
        times = _times(origin, skeleton, caller, microbatches[0].batch, recording, options, training, recomputed)
    cutter = Cutter(skeleton, twin, recording, saved, options, times, recomputed.events(recording))
    options, choice = chosen(options, len(microbatches), cutter)
    schedule = options.make_schedule(len(microbatches))
    cut, stages = cutter(schedule)
    changed = tuple(changes.names()) if training else ()
    tensor = found_split(skeleton, recording, options)
    if tensor is not None:
        stages = tuple(divided(stage, cut, schedule, skeleton, tensor) for stage in stages)
    if training:
        refuse_changing_buffers(changed, options, skeleton.unit_buffers, cut, schedule)
    rule = _find_rule(origin, skeleton, caller, batch, layout, options) if training else None
    plan = Plan(
        Topology(options.stages, options.data_parallel, options.tensor_parallel),
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
        changed,
        recomputed,
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
    recomputed: Recomputed,
) -> tuple[CallTime, ...]:
    """Each unit call's time on one microbatch; of a model without weights, each kind of unit gets its own for that."""
    told: dict[str, Any] = {"training": training, "halves": training and isinstance(options.schedule, Auto)}
    told["again"] = recomputed.units
    if origin.is_whole:
        running = runnable_copy(origin.model, training)
    else:
        running, told["with_weights"] = lent(skeleton, origin.tensor, recording, training)
    return measure(running, options.units, caller, piece, recording, options.threads or 1, **told)


def _try_optimizers(plan: Plan) -> None:
    parameters = names_of(plan.model)[0]
    ranks = range(plan.topology.size) if plan.options.shard else plan.topology.ranks_of(0)
    held = [
        (rank, {name: parameters[name] for name in plan.held_by(plan.topology.place(rank).stage)}) for rank in ranks
    ]
    try_optimizers(plan.options, plan.gradients(), held)


def _find_rule(
    origin: Origin, skeleton: Skeleton, caller: Caller, batch: Any, layout: BatchLayout, options: Options
) -> LossRule:
    """By a probe in float32, whatever the precision: a rule is the loss's own, and rounding hides least there.

    Under autocast is probed only what does not run without it.
    """
    if options.microbatch_weight is not None and caller.precision.dtype is None:
        return LossRule.given(options.microbatch_weight)
    try:
        return _probed(origin, skeleton, replace(caller, precision=Precision()), batch, layout, options)
    except (BatchError, CutError):
        raise
    except Exception:
        if caller.precision.dtype is None:
            raise
        return _probed(origin, skeleton, caller, batch, layout, options)


def _probed(
    origin: Origin, skeleton: Skeleton, caller: Caller, batch: Any, layout: BatchLayout, options: Options
) -> LossRule:
    """The probe runs in the modes of training, on a copy that shares the model's tensors, or makes them in passing."""
    if origin.is_whole:
        tensors = [*origin.model.parameters(), *origin.model.buffers()]
        copy = replace_tensors(origin.model, {id(tensor): tensor for tensor in tensors})
        if not copy.training:
            copy.train()
        observe, gradients_of = trial_run.in_process(copy, caller), gradient_check.in_process(copy, caller)
    else:
        observe = streaming(skeleton, origin.tensor, options.units, caller)
        gradients_of = streaming_gradients(skeleton, origin.tensor, options.units, caller)
    if options.microbatch_weight is not None:
        rule = LossRule.given(options.microbatch_weight)
    else:
        try:
            tolerance = trial_run.tolerance_of(skeleton.model, caller.precision.dtype)
            rule = probe(observe, batch, layout, tolerance)
            confirm(rule, gradients_of, batch, layout, tolerance)
        except BatchError:
            if options.most_pieces > 1:
                raise
            rule = LossRule.given("samples")  # a batch that is never cut needs none; an evaluation weighs batches so
    return rule if options.precision == "fp32" else with_unit(rule, observe, batch, layout)


def planned_origin(model: object, seed: int) -> Origin:
    """The origin of what the user gave as ``model``; see ``origin_of``."""
    if isinstance(model, Pretrained):
        return model.origin(seed)
    return origin_of(model, seed, _packed)


def _packed(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    return functools.partial(unpack, pack(tensors))
