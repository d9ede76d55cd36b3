"""One rank at work: takes a batch, runs its program, updates its weights, reports."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from raypipe.data.wire import Wire, pack, unpack
from raypipe.errors import BatchError, PeerLost, RaypipeError, StageError
from raypipe.model.build import held_state
from raypipe.model.microbatch import LayoutCache, Microbatch
from raypipe.observe.events import Recorder
from raypipe.parallel.group import named
from raypipe.stage.compute import ForwardComputer, TrainComputer
from raypipe.stage.executor import Activity, execute
from raypipe.stage.losses import Losses
from raypipe.stage.optimizer import StageOptimizer
from raypipe.stage.outputs import Outputs
from raypipe.stage.program import Program, compile_program
from raypipe.stage.protocol import Progress, RankWork
from raypipe.stage.report import ForwardReport, TrainReport
from raypipe.stage.slice import Slice
from raypipe.stage.spec import PipelineSpec
from raypipe.stage.tensor import TensorRank
from raypipe.transport.base import Transport

__all__ = ["StageWorker"]

T = TypeVar("T")


class StageWorker:
    """A rank. See ``stage.protocol.Worker`` for its calls.

    Args:
        spec: the whole pipeline.
        rank: this one.
        tensors: the parameters and buffers that it holds, by name.
    """

    def __init__(self, spec: PipelineSpec, rank: int, tensors: Mapping[str, Tensor]) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self._spec, self._rank = spec, rank
        place = spec.topology.place(rank)
        self._stage = place.stage
        self._ranks = {s: spec.topology.rank(s, place.replica, place.tensor) for s in range(spec.topology.stages)}
        self._activity = Activity()
        self._layouts = LayoutCache(spec.layout, spec.batch_dims)
        self._slice = Slice(spec.skeleton, tensors, spec.units, spec.cuts, spec.calls, spec.caller)
        self._outputs = Outputs(self._slice)
        placement = spec.schedule(spec.microbatches)
        self._last = self._ranks[placement.stage_of(placement.chunks - 1)]
        self._tensor: TensorRank | None = None
        if spec.tensor is None:
            self._optimizer = self._made_optimizer()
        self._is_last = rank == self._last
        self._program = functools.cache(self._compile)
        self._transport: Transport | None = None

    def join(self, store: Store, timeout_s: float) -> None:
        """Joins its tensor group, and keeps its slices only."""
        if self._spec.tensor is not None:
            with self._reported(-1, "start"):
                place = self._spec.topology.place(self._rank)
                piece = self._slice
                self._tensor = TensorRank(piece.model, piece.units, self._spec.tensor, store, place, timeout_s)
                piece.name_tensors()
            self._optimizer = self._made_optimizer()

    def _made_optimizer(self) -> StageOptimizer:
        spec, topology = self._spec, self._spec.topology
        place, last = topology.place(self._rank), topology.place(self._last)
        shards = None if self._tensor is None else self._tensor.shards
        with self._reported(-1, "optimizer"):
            return StageOptimizer(
                self._rank,
                self._slice.parameters if shards is None else shards.parameters,
                spec.gradients,
                spec.optimizer,
                spec.lr_scheduler,
                spec.max_grad_norm,
                topology.rank(last.stage, last.replica) if spec.rule.needs_denominators else None,
                None if shards is None else shards.norms,
                topology.rank(place.stage, place.replica),
            )

    def connect(self, transport: Transport) -> None:
        """Takes its channels."""
        self._transport = transport
        self._activity.set(-1, "idle")

    def train_step(self, step: int, batch: Wire) -> RankWork[TrainReport]:
        """One step on a batch; the whole replica's."""
        started = monotonic()
        with self._reported(step, "batch"):
            self._activity.set(step, "batch")
            self._slice.set_training(True)
            microbatches = self._cut(unpack(batch))
            losses = Losses(self._spec.rule, self._spec.caller, microbatches, self._tell)
            program = self._program(len(microbatches), True)
            self._optimizer.begin(self._channels())
            recorder = Recorder([item.action for item in program.items], started)
            computer = TrainComputer(self._slice, microbatches, self._spec.seed, step, 0, losses, program.split)
        yield from execute(program, computer, self._channels(), self._ranks, recorder, self._activity, step)
        with self._reported(step, "optimizer"):
            self._activity.set(step, "optimizer")
            if self._tensor is not None:
                self._tensor.collect()
            refused = losses.refusal() if self._is_last else None
            divisor = losses.total() if self._is_last and refused is None else 1.0
            told = _told(losses, refused, divisor)
            update = yield from self._waiting(self._optimizer.finish(self._channels(), told), step)
            loss = losses.loss() if self._is_last and refused is None else None
            yield from self._waiting(self._flush(), step)
        trace = recorder.trace()
        self._activity.set(step, "idle")
        return TrainReport(
            step,
            sum(m.samples for m in microbatches),
            len(microbatches),
            loss,
            divisor if self._is_last else None,
            update.norms.numpy(),
            update.lr,
            trace,
            refused,
        )

    def forward_step(self, step: int, batch: Wire, kind: str) -> RankWork[ForwardReport]:
        """Forwards only, in eval mode, without gradients; nothing of the training state changes."""
        with self._reported(step, "batch"):
            self._activity.set(step, "batch")
            self._slice.set_training(False)
            own = unpack(batch)
            microbatches = self._cut(own)
            losses = Losses(self._spec.rule, self._spec.caller, microbatches) if kind == "evaluate" else None
            program = self._program(len(microbatches), False)
            recorder = Recorder([item.action for item in program.items])
            computer = ForwardComputer(self._slice, microbatches, self._spec.seed, step, losses)
        yield from execute(program, computer, self._channels(), self._ranks, recorder, self._activity, step)
        report = ForwardReport(sum(m.samples for m in microbatches))
        with self._reported(step, kind):
            if self._is_last:
                outputs = [computer.outputs[number] for number in range(len(microbatches))]
                report = self._reported_outputs(own, microbatches, outputs, losses)
            yield from self._waiting(self._flush(), step)
        self._activity.set(step, "idle")
        return report

    def state(self) -> Wire:
        """Every parameter and buffer that this rank holds, by name, as ``data.wire`` packs it."""
        self._activity.set(self._activity.progress().step, "state")
        try:
            return self._packed_state()
        finally:
            self._activity.set(self._activity.progress().step, "idle")

    def _packed_state(self) -> Wire:
        if self._tensor is not None:
            return pack(self._tensor.state())
        return pack({name: tensor.clone() for name, tensor in held_state(self._slice.model).items()})

    def progress(self) -> Progress:
        """What it is doing."""
        return self._activity.progress()

    def close(self) -> None:
        """Closes its channels, so that its neighbours fail at once."""
        if self._transport is not None:
            self._transport.close()

    def _tell(self, losses: Losses) -> None:
        """Every loss of the step is known: what its gradients are divided by can go to the other ranks."""
        refused = losses.refusal() if self._is_last else None
        if self._is_last and (refused is not None or losses.trains):  # else the step's end says what is wrong
            self._optimizer.tell(self._channels(), _told(losses, refused, losses.total() if refused is None else 1.0))

    def _flush(self) -> RankWork[None]:
        yield self._channels().flush()

    def _waiting(self, work: RankWork[T], step: int) -> RankWork[T]:
        """Passes the work's handles on; while one is out, this rank waits for others and is not the stuck one."""
        while True:
            try:
                handle = next(work)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            # A collective waits for whoever is missing; that some rank is waited for is all that is asked.
            peer = next((rank for rank in self._ranks.values() if rank != self._rank), self._rank)
            self._activity.set(step, "optimizer", waits_for=handle.source if handle.source is not None else peer)
            yield handle
            self._activity.set(step, "optimizer")

    def _cut(self, batch: Any) -> list[Microbatch]:
        return self._layouts.find(batch).split(batch, self._spec.microbatches)

    def _compile(self, microbatches: int, training: bool) -> Program:
        schedule = self._spec.schedule(microbatches)
        return compile_program(schedule if training else schedule.forwards(microbatches), self._stage)

    def _channels(self) -> Transport:
        if self._transport is None:
            raise PeerLost(None, "this rank was never connected")
        return self._transport

    @torch.no_grad()
    def _reported_outputs(
        self, batch: Any, microbatches: Sequence[Microbatch], outputs: Sequence[Any], losses: Losses | None
    ) -> ForwardReport:
        samples = sum(m.samples for m in microbatches)
        joined, metrics = None, {}
        if losses is None or self._spec.metrics:
            try:
                joined = self._outputs.join(batch, self._layouts.find(batch), microbatches, outputs)
            except BatchError as error:  # no reason to lose the ranks, and what they have learnt
                return ForwardReport(samples, refused=str(error))
        if losses is None:
            return ForwardReport(samples, outputs=pack(joined))
        if self._spec.metrics:
            metrics = {name: float(metric(joined, batch)) for name, metric in self._spec.metrics.items()}
        return ForwardReport(samples, *losses.evaluated(), metrics, refused=losses.refusal_of_terms())

    @contextmanager
    def _reported(self, step: int, word: str) -> Generator[None]:
        """An exception outside the actions is reported with a word in the action's place."""
        try:
            yield
        except RaypipeError:
            raise
        except Exception as error:
            raise StageError(self._stage, word, step, named(error)) from error


def _told(losses: Losses, refused: str | None, divisor: float) -> float:
    """What the optimizers are told: the divisor, or 0 for a batch whose gradients are thrown away."""
    return 0.0 if refused is not None or losses.divisor == 0 else divisor
