"""Cuts a recorded model for a schedule, and says what each stage then holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raypipe.accounting import StagePlan, in_flight, sizes_of, stage_plans
from raypipe.model.build import Skeleton
from raypipe.model.cost import CallTime
from raypipe.model.husk import names_of
from raypipe.model.memory import Sizes, worst_case
from raypipe.model.partition import Partition, partition
from raypipe.model.recording import Recording
from raypipe.model.saved import Saved
from raypipe.model.twin import Twin
from raypipe.options import Options
from raypipe.schedule import Schedule
from raypipe.stage.inbox import AHEAD

__all__ = ["Cutter"]


class Cutter:
    """Cuts one model, for as many schedules as are asked for.

    Args:
        skeleton: of the model.
        twin: that was recorded.
        recording: of one microbatch.
        saved: what its backward needs, or None where nothing is trained.
        options: of the trainer.
        times: of each unit call, where they were measured.
        again: the events of unit calls that run again in their backward.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        twin: Twin,
        recording: Recording,
        saved: Saved | None,
        options: Options,
        times: Sequence[CallTime] | None,
        again: frozenset[int] = frozenset(),
    ) -> None:
        self._twin, self._recording, self._options, self._times = twin, recording, options, times
        self._counts = {name: p.numel() for name, p in names_of(skeleton.model)[0].items()}
        self._sizes, self._state_known = sizes_of(skeleton, twin, recording, saved, options, again)

    def __call__(self, schedule: Schedule) -> tuple[Partition, tuple[StagePlan, ...]]:
        """The cut for a schedule, and its stages.

        Raises:
            ValueError: there are fewer unit calls than chunks, or a given balance does not add up.
            CutError: a given cut parts what has to stay in one chunk, or too few other cuts are left.
        """
        by_memory = self._options.balance == "memory"
        sharing = self._options.data_parallel if self._options.shard else 1
        cut = partition(
            self._recording,
            self._twin.unit_parameters,
            self._counts,
            schedule.chunks,
            self._options.balance,
            placement=schedule.placement,
            times=self._times,
            memory=worst_case(_parted(self._sizes, sharing), in_flight(schedule), AHEAD) if by_memory else None,
        )
        return cut, stage_plans(cut, schedule, self._sizes, self._counts, self._state_known, sharing)


def _parted(sizes: Sizes, sharing: int) -> Sizes:
    """The sizes as one of ``sharing`` replicas has them, with an even part of the optimizer's state."""
    parameters = {
        name: dataclasses.replace(each, optimizer=each.optimizer // sharing) for name, each in sizes.parameters.items()
    }
    return dataclasses.replace(sizes, parameters=parameters)
