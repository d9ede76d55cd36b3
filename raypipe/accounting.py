"""What each stage of a plan computes, holds and sends, from shapes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.checks import refuse_foreign_random_numbers
from raypipe.model.build import Skeleton
from raypipe.model.call import Caller
from raypipe.model.cost import CallTime
from raypipe.model.husk import names_of
from raypipe.model.memory import Bytes, ParameterBytes, Sizes, windows_from
from raypipe.model.partition import Chunk, Partition
from raypipe.model.record import record
from raypipe.model.recording import Recording
from raypipe.model.saved import Saved
from raypipe.model.seeds import kept_state
from raypipe.model.twin import Twin
from raypipe.options import Options
from raypipe.schedule import Costs, Op, Schedule
from raypipe.schedule.memory import peak_bytes, peak_bytes_again, peak_in_flight
from raypipe.stage.holders import largest_part
from raypipe.stage.inbox import AHEAD
from raypipe.stage.state_bytes import state_bytes

__all__ = ["StagePlan", "costs_of", "in_flight", "observed", "sizes_of", "stage_plans"]


@dataclass(frozen=True, slots=True)
class StagePlan:
    """What one stage holds and does.

    Attributes:
        stage: its number.
        units: of its unit calls, in order.
        parameters: how many numbers its parameters are.
        weights_bytes: of its parameters and buffers.
        gradients_bytes: of its trainable parameters.
        optimizer_bytes: of the optimizer's state, the largest part where replicas share it out; None where the
            optimizer could not be tried without data.
        activations_bytes: kept for the backward of one microbatch, by all of its chunks.
        peak_in_flight: the most microbatches at one time whose forward has begun and whose backward has not ended, once
            for each chunk that holds one.
        peak_activations_bytes: kept at one time, at most.
        received_bytes: buffers of the receives that are posted ahead.
        forward_flops: of one microbatch.
        backward_flops: of one microbatch.
        sends_bytes: of the values that one microbatch sends to the next stage.
        time: measured seconds of one microbatch, with ``balance="time"``; else None.
        recompute_bytes: what comes to the peak of activations where units run again in their backward.
    """

    stage: int
    units: tuple[str, ...]
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int | None
    activations_bytes: int
    peak_in_flight: int
    peak_activations_bytes: int
    received_bytes: int
    forward_flops: int
    backward_flops: int
    sends_bytes: int
    time: CallTime | None = None
    recompute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All of it at the peak; what an action needs only while it runs, and the process itself, come on top."""
        own = self.weights_bytes + self.gradients_bytes + (self.optimizer_bytes or 0)
        return own + self.peak_activations_bytes + self.recompute_bytes + self.received_bytes


def observed(twin: Twin, caller: Caller, batch: Any, *, training: bool) -> tuple[Recording, Saved | None]:
    """The recording of a microbatch, and what its backward will need, the loss's part included."""
    saved = Saved(twin) if training else None
    try:
        return _observed(twin, caller, batch, saved)
    except RuntimeError as error:
        if saved is None or "saved tensor hooks" not in str(error):
            raise
    # torch.func's transforms refuse hooks: what such a model saves is not counted.
    recording, _ = _observed(twin, caller, batch, None)
    uncounted = Saved(twin)
    uncounted.of(recording)
    return recording, uncounted


def _observed(twin: Twin, caller: Caller, batch: Any, saved: Saved | None) -> tuple[Recording, Saved | None]:
    own: Any = None
    outputs: list[Any] = []

    def forward(model: Any) -> Any:
        nonlocal own
        own = pytree.tree_map_only(Tensor, torch.clone, batch)
        outputs[:] = [caller.outputs(model, own)]
        return outputs[0]

    with refuse_foreign_random_numbers():
        recording = record(twin, forward, saved)
    recording.low = caller.precision.boundary
    if saved is not None and outputs:
        saved.complete()
        # The loss runs for real in the last stage, whatever it does; what fakes cannot follow of it is not counted.
        with contextlib.suppress(Exception), kept_state(), twin.mode, saved.during(recording):
            caller.loss_of(outputs[0], own)
    return recording, saved


def sizes_of(
    skeleton: Skeleton,
    twin: Twin,
    recording: Recording,
    saved: Saved | None,
    options: Options,
    again: frozenset[int] = frozenset(),
) -> tuple[Sizes, bool]:
    """What the sizes of chunks are made of, and whether the optimizer's state is known.

    ``again`` are the events of unit calls that run again in their backward.
    """
    parameters, buffers = names_of(skeleton.model)
    trained = {name: p for name, p in parameters.items() if p.requires_grad and saved is not None}
    state = state_bytes(options.optimizer, trained)
    by_name = {
        name: ParameterBytes(_bytes(p), _bytes(p), (state or {}).get(name, 0))
        if name in trained
        else ParameterBytes(_bytes(p))
        for name, p in parameters.items()
    }
    inside = {name for names in skeleton.unit_buffers.values() for name in names}
    units = {unit: sum(_bytes(buffers[name]) for name in names) for unit, names in skeleton.unit_buffers.items()}
    loose = sum(_bytes(buffer) for name, buffer in buffers.items() if name not in inside)
    return Sizes(recording, saved, twin.unit_parameters, by_name, units, loose, again), state is not None


def in_flight(schedule: Schedule) -> tuple[int, ...]:
    """For each chunk, the most microbatches between the begin of their forward and the end of their backward."""
    peaks = [0] * schedule.chunks
    alive = [0] * schedule.chunks
    for program in schedule.programs:
        for action in program:
            if action.op is Op.FORWARD:
                alive[action.chunk] += 1
                peaks[action.chunk] = max(peaks[action.chunk], alive[action.chunk])
            elif action.op is not Op.INPUT:
                alive[action.chunk] -= 1
    return tuple(peaks)


def stage_plans(
    partition: Partition, schedule: Schedule, sizes: Sizes, counts: dict[str, int], state_known: bool, sharing: int = 1
) -> tuple[StagePlan, ...]:
    """The stages of a plan.

    Args:
        partition: of the model.
        schedule: of the example's number of microbatches.
        sizes: of the model.
        counts: number of elements of each parameter.
        state_known: whether the optimizer's state is.
        sharing: how many replicas share it out.
    """
    edges = (0, *partition.cuts, len(sizes.recording.calls))
    held = [list(windows_from(sizes, a))[b - a - 1] for a, b in pairwise(edges)]
    flights = in_flight(schedule)
    kept = peak_bytes(schedule.programs, [each.activations for each in held])
    with_again = peak_bytes_again(
        schedule.programs, [h.activations for h in held], [h.again for h in held], [h.redone for h in held]
    )
    made = []
    for stage, at_once in enumerate(peak_in_flight(schedule.programs)):
        own = [number for number in range(schedule.chunks) if schedule.stage_of(number) == stage]
        chunks = [partition.chunks[number] for number in own]
        times = [chunk.time for chunk in chunks if chunk.time is not None]
        units = tuple(unit for chunk in chunks for unit in chunk.units)
        names = {name for chunk in chunks for name in chunk.parameters}
        parameters = [sizes.parameters[name] for name in names]
        trained = {name for name in names if sizes.parameters[name].gradient}
        state = {name: sizes.parameters[name].optimizer for name in counts if name in trained}
        made.append(
            StagePlan(
                stage,
                units,
                sum(counts[name] for name in names),
                sum(p.weight for p in parameters) + sizes.buffers(units),
                sum(p.gradient for p in parameters),
                largest_part({name: counts[name] for name in state}, state, sharing) if state_known else None,
                sum(held[number].activations for number in own),
                at_once,
                int(kept[stage]),
                sum(_ahead(held[number], flights[number]) for number in own),
                sum(chunk.flops for chunk in chunks),
                sum(chunk.backward_flops for chunk in chunks),
                sum(chunk.boundary_bytes for chunk in chunks),
                sum(times, CallTime(0.0, 0.0)) if times else None,
                int(with_again[stage] - kept[stage]),
            )
        )
    return tuple(made)


def costs_of(chunks: Sequence[Chunk], latency: float = 0.0, bandwidth: float | None = None) -> Costs:
    """What the chunks of a cut cost: seconds where they were measured, else FLOPs over the mean forward, else alike.

    Half of a backward whose halves were not measured is for the weights.
    """
    timed = [chunk.time for chunk in chunks if chunk.time is not None]
    if len(timed) == len(chunks):
        halved = any(time.input or time.weight for time in timed)
        return Costs(
            forward=tuple(time.forward for time in timed),
            backward=tuple(time.backward for time in timed),
            input=tuple(time.input if halved else time.backward / 2 for time in timed),
            weight=tuple(time.weight if halved else time.backward / 2 for time in timed),
            latency=latency,
            bandwidth=bandwidth,
            boundary_bytes=tuple(float(chunk.boundary_bytes) for chunk in chunks[:-1]),
        )
    if not any(chunk.flops for chunk in chunks):
        return Costs()
    mean = sum(chunk.flops for chunk in chunks) / len(chunks)
    backward = tuple(chunk.backward_flops / mean for chunk in chunks)
    half = tuple(each / 2 for each in backward)
    return Costs(tuple(chunk.flops / mean for chunk in chunks), backward, half, half)


def _ahead(size: Bytes, peak: int) -> int:
    return size.received * min(AHEAD, peak)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
