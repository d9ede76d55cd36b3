"""How a model is cut and run: everything that a pipeline needs, as data."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from raypipe.accounting import StagePlan
from raypipe.checks import refuse_out_of_order
from raypipe.errors import ScheduleError
from raypipe.model.build import Skeleton
from raypipe.model.call import Caller
from raypipe.model.husk import names_of
from raypipe.model.microbatch import BatchLayout, LayoutCache
from raypipe.model.origin import Origin
from raypipe.model.partition import Chunk, Partition
from raypipe.model.recomputing import Recomputed
from raypipe.model.split_coverage import Coverage
from raypipe.model.weights import LossRule
from raypipe.options import Options
from raypipe.parallel.stage_split import TensorSplit
from raypipe.schedule import Choice, Schedule
from raypipe.stage.holders import gradients_of
from raypipe.stage.share import check_samples, share_sizes
from raypipe.stage.spec import Gradients, PipelineSpec
from raypipe.stage.worker import StageWorker
from raypipe.topology import Topology
from raypipe.transport.base import Wiring

__all__ = ["Plan"]


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
        choice: why the schedule is this one, where it was to be chosen.
        coverage: which weights' gradients wait, where the schedule has backwards in halves.
        changed: names of the buffers that a forward in train mode changes.
        recomputed: which units run again in their backward.
        tensor: how a stage's layers are split among its ranks, where it has several.
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
    choice: Choice | None = None
    coverage: Coverage | None = None
    changed: tuple[str, ...] = ()
    recomputed: Recomputed = field(default_factory=Recomputed)
    tensor: TensorSplit | None = None

    @property
    def model(self) -> nn.Module:
        """The unsplit model: the user's own, or one of husks."""
        return self.origin.model

    def chunks_on(self, stage: int) -> list[Chunk]:
        """The chunks that a stage holds, in model order."""
        placement = self.schedule.placement
        return [chunk for chunk, place in zip(self.partition.chunks, placement, strict=True) if place == stage]

    def held_by(self, stage: int) -> tuple[str, ...]:
        """Names of the parameters on a stage, in model order."""
        names = {name for chunk in self.chunks_on(stage) for name in chunk.parameters}
        return tuple(name for name in names_of(self.skeleton.model)[0] if name in names)

    def tensors_of(self, stage: int) -> dict[str, Tensor]:
        """The parameters and buffers that a stage holds, as husks: names, shapes and dtypes."""
        parameters, buffers = names_of(self.skeleton.model)
        chunks = self.chunks_on(stage)
        units = {unit for chunk in chunks for unit in chunk.units}
        inside = [name for unit in units for name in self.skeleton.unit_buffers[unit]]
        inside += [name for chunk in chunks for name in chunk.buffers]
        held = {name: parameters[name].detach() for name in self.held_by(stage)}
        return {**held, **{name: buffers[name].detach() for name in inside}}

    def gradients(self) -> Gradients:
        """Whose gradients are whose."""
        held = [self.held_by(stage) for stage in range(self.topology.stages)]
        sizes = {name: p.numel() for name, p in names_of(self.skeleton.model)[0].items() if p.requires_grad}
        return gradients_of(self.topology, held, sizes, sharded=self.options.shard == "optimizer")

    def wiring(self) -> Wiring:
        """Which ranks talk to which."""
        pairs: set[tuple[int, int]] = set()
        copies = itertools.product(range(self.topology.replicas), range(self.topology.tensor))
        for chunk, (replica, tensor) in itertools.product(range(self.schedule.chunks - 1), tuple(copies)):
            stages = self.schedule.stage_of(chunk), self.schedule.stage_of(chunk + 1)
            one, other = (self.topology.rank(stage, replica, tensor) for stage in stages)
            if one != other:
                pairs |= {(one, other), (other, one)}
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
            shard=options.shard,
            recompute=self.recomputed.units,
            compiled=options.compile,
            tensor=self.tensor,
        )

    def build_of(self, rank: int) -> Callable[[], StageWorker]:
        """What makes a rank's worker, in whatever process it is called."""
        share = self.origin.share(self.tensors_of(self.topology.place(rank).stage))
        return functools.partial(_build, self.spec(), rank, share)

    def admission(self, *, whole: bool = False) -> Callable[[Any], None]:
        """A check of each batch on the driver, before it is queued: what is wrong with one must not end the ranks.

        Args:
            whole: whether a batch goes to one replica, as in evaluation; else each has a share.
        """
        layouts = LayoutCache(self.layout, self.options.batch_dims)
        check_schedule = functools.cache(self._check_schedule)
        replicas = 1 if whole else self.topology.replicas

        def admit(batch: Any) -> None:
            self.caller.check(batch)
            samples = layouts.find(batch).samples(batch)
            check_samples(samples, replicas)
            for size in set(share_sizes(samples, replicas)):
                check_schedule(min(size, self.options.most_microbatches))

        return admit

    def _check_schedule(self, microbatches: int) -> None:
        made = self.options.make_schedule(microbatches)
        refuse_out_of_order(self.changed, made)
        if made.placement != self.schedule.placement:
            raise ScheduleError(
                f"schedule {made.name!r} of {made.microbatches} microbatches has its chunks on the stages "
                f"{made.placement}, but the model was cut for {self.schedule.placement}, those of "
                f"{self.schedule.microbatches} microbatches; keep each chunk on its stage, however many microbatches "
                "there are"
            )

    def __str__(self) -> str:
        from raypipe.table import plan_table

        return plan_table(self)

    __repr__ = __str__


def _build(spec: PipelineSpec, rank: int, share: Callable[[], dict[str, Tensor]]) -> StageWorker:
    return StageWorker(spec, rank, share())
