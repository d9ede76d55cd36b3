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
from raypipe.stage.share import Share, share_of, weights_of
from raypipe.stage.slice import Slice
from raypipe.stage.spec import PipelineSpec
from raypipe.stage.tally import tellers_of
from raypipe.stage.tensor import TensorRank
from raypipe.stage.verdict import Verdict
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
        self._stage, self._replica, self._replicas = place.stage, place.replica, spec.topology.replicas
        self._named = spec.topology.replica_named(rank)
        self._ranks = {s: spec.topology.rank(s, place.replica, place.tensor) for s in range(spec.topology.stages)}
        self._activity = Activity()
        self._layouts = LayoutCache(spec.layout, spec.batch_dims)
        self._slice = Slice(
            spec.skeleton, tensors, spec.units, spec.cuts, spec.calls, spec.caller, spec.recompute, spec.compiled
        )
        self._outputs = Outputs(self._slice)
        placement = spec.schedule(spec.microbatches)
        self._last = self._ranks[placement.stage_of(placement.chunks - 1)]
        self._is_last = rank == self._last
        self._verdict = Verdict(spec, rank, is_last=self._is_last)
        self._tensor: TensorRank | None = None
        if spec.tensor is None:
            self._optimizer = self._made_optimizer()
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
        shards = None if self._tensor is None else self._tensor.shards
        with self._reported(-1, "optimizer"):
            return StageOptimizer(
                self._rank,
                self._slice.parameters if shards is None else shards.parameters,
                spec.gradients,
                spec.optimizer,
                spec.lr_scheduler,
                spec.max_grad_norm,
                tellers_of(spec.rule, topology, topology.leader(self._last), always=self._verdict.scales),
                sharded=spec.shard == "optimizer",
                agree=self._verdict.scales,
                norms=None if shards is None else shards.norms,
                leader=topology.leader(self._rank),
            )

    def connect(self, transport: Transport) -> None:
        """Takes its channels."""
        self._transport = transport
        self._activity.set(-1, "idle")

    def train_step(self, step: int, batch: Wire) -> RankWork[TrainReport]:
        """One step on a batch: the whole one, of which this replica has its share."""
        started = monotonic()
        with self._reported(step, "batch"):
            self._activity.set(step, "batch")
            self._slice.set_training(True)
            scale = self._verdict.scale
            samples, share, losses = self._shared_out(unpack(batch), scale)
            microbatches = share.microbatches
            program = self._program(len(microbatches), True)
            self._optimizer.begin(self._channels())
            recorder = Recorder([item.action for item in program.items], started)
            seed, first = self._spec.seed, share.first_sample
            computer = TrainComputer(self._slice, microbatches, seed, step, first, losses, program.split)
        yield from self._execute(program, computer, recorder, step)
        with self._reported(step, "optimizer"):
            self._activity.set(step, "optimizer")
            if self._tensor is not None:
                self._tensor.collect()
            work = self._optimizer.finish(self._channels(), self._verdict.told(losses), scale)
            update = yield from self._waiting(work, step)
            non_finite = self._verdict.settle(update, losses, step, agreed=self._optimizer.agrees)
            loss, divisor, refused = self._verdict.outcome(losses, update)
            yield from self._waiting(self._flush(), step)
        trace = recorder.trace()
        self._activity.set(step, "idle")
        return TrainReport(
            step,
            samples,
            len(microbatches),
            loss,
            None if divisor is None else divisor * scale,
            update.norms.numpy(),
            update.lr,
            trace,
            refused,
            scale if self._verdict.scales else None,
            non_finite,
        )

    def forward_step(self, step: int, batch: Wire | None, kind: str) -> RankWork[ForwardReport]:
        """Forwards only, in eval mode, without gradients; nothing of the training state changes."""
        if batch is None:  # another replica's
            return ForwardReport(0)
        with self._reported(step, "batch"):
            self._activity.set(step, "batch")
            self._slice.set_training(False)
            own = unpack(batch)
            microbatches = self._layouts.find(own).split(own, self._spec.microbatches)
            losses = Losses(self._spec.rule, self._spec.caller, microbatches) if kind == "evaluate" else None
            program = self._program(len(microbatches), False)
            recorder = Recorder([item.action for item in program.items])
            computer = ForwardComputer(self._slice, microbatches, self._spec.seed, step, losses)
        yield from self._execute(program, computer, recorder, step)
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

    def _execute(
        self, program: Program, computer: TrainComputer | ForwardComputer, recorder: Recorder, step: int
    ) -> RankWork[None]:
        return execute(
            program, computer, self._channels(), self._ranks, recorder, self._activity, step, replica=self._named
        )

    def _shared_out(self, batch: Any, scale: float) -> tuple[int, Share, Losses]:
        """The whole batch's samples, this replica's share, and what collects the share's losses."""
        layout, spec = self._layouts.find(batch), self._spec
        share = share_of(layout, batch, self._replica, self._replicas, spec.microbatches)
        whole = None
        if self._replicas > 1 and spec.rule.known_before_forward:
            whole = weights_of(spec.rule, layout, batch, self._replicas, spec.microbatches)
        losses = Losses(spec.rule, spec.caller, share.microbatches, self._tell, whole, scale)
        return layout.samples(batch), share, losses

    def _tell(self, losses: Losses) -> None:
        """Every loss of the step is known: what its gradients are divided by can go to the other ranks."""
        if self._verdict.is_early(losses, self._activity.progress().step):
            self._optimizer.tell(self._channels(), self._verdict.told(losses))

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
            peer = next((rank for rank in range(self._spec.topology.size) if rank != self._rank), self._rank)
            self._activity.set(step, "optimizer", waits_for=handle.source if handle.source is not None else peer)
            yield handle
            self._activity.set(step, "optimizer")

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
            raise StageError(self._stage, word, step, named(error), replica=self._named) from error
