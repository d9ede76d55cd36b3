"""Why a step took longer than predicted: the difference along its critical path, by cause, to the nanosecond.

The path is that of the measured times: from the pipeline's last action back, each time to the later of the two that an
action comes after, the one before it on its stage and the one whose message it takes. On it nobody waits without a
cause, so what a stage lost by waiting for others appears where it arose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raypipe.observe.runs import Run, nanoseconds
from raypipe.schedule import Costs, Schedule
from raypipe.schedule.dry_run import number_messages

__all__ = ["Difference", "difference"]


class Difference(NamedTuple):
    """Nanoseconds by which the measured step was longer than the predicted makespan; they add up to just that.

    Attributes:
        compute: for each stage by how much its actions on the path were slower than predicted; negative where faster.
        communication: messages on the path, and getting on from action to action, beyond what was predicted.
        data: before the path's first action, on its stage.
        driver: from the end of the step before to the start of this one, there.
        optimizer: after the path's last action, on its stage.
        another_path: not positive but for rounding: by how much the prediction of this path falls short of the
            predicted makespan, where that had another path.
    """

    compute: tuple[int, ...]
    communication: int
    data: int
    driver: int
    optimizer: int
    another_path: int

    @property
    def total(self) -> int:
        """The measured step less the predicted makespan."""
        rest = self.communication + self.data + self.driver + self.optimizer + self.another_path
        return sum(self.compute) + rest


class _Place(NamedTuple):
    stage: int
    position: int


def difference(schedule: Schedule, costs: Costs, planned: Sequence[Run], measured: Sequence[Run]) -> Difference:
    """What made the step longer or shorter.

    Args:
        schedule: that was run.
        costs: of the prediction, in seconds.
        planned: of each stage what was predicted.
        measured: of each stage what was measured, on one clock.
    """
    numbered = number_messages(schedule.programs)
    giver_of = {
        number: _Place(stage, position)
        for stage, row in enumerate(numbered.gives)
        for position, number in enumerate(row)
        if number >= 0
    }
    compute = [0] * schedule.stages
    links = predicted = 0
    last = max(range(len(measured)), key=lambda stage: measured[stage].rows[-1].end)
    at: _Place | None = _Place(last, len(measured[last].rows) - 1)
    first = last
    while at is not None:
        row, plan = measured[at.stage].rows[at.position], planned[at.stage].rows[at.position]
        compute[at.stage] += (row.end - row.start) - (plan.end - plan.start)
        predicted += plan.end - plan.start
        need = numbered.needs[at.stage][at.position]
        before = _before(at, giver_of.get(need), measured)
        since = (
            measured[at.stage].rows[0].turned if before is None else measured[before.stage].rows[before.position].end
        )
        expected = 0 if before is None else _message(schedule, costs, before, at)
        links += row.start - since - expected
        predicted += expected
        first, at = at.stage, before
    begin, end = measured[first], measured[last]
    return Difference(
        compute=tuple(compute),
        communication=links,
        data=begin.rows[0].turned - begin.began,
        driver=begin.gap or 0,
        optimizer=end.ended - end.rows[-1].end,
        another_path=predicted - max(run.ended for run in planned),
    )


def _before(at: _Place, giver: _Place | None, runs: Sequence[Run]) -> _Place | None:
    """What the action comes after: the later of the two, or None for its stage's start."""
    own = _Place(at.stage, at.position - 1) if at.position else None
    free = runs[at.stage].rows[0].turned if own is None else runs[own.stage].rows[own.position].end
    if giver is None or giver.stage == at.stage:
        return own
    given = runs[giver.stage].rows[giver.position].end
    # Clocks that are not quite one may show a message before it was sent.
    return giver if free < given <= runs[at.stage].rows[at.position].start else own


def _message(schedule: Schedule, costs: Costs, source: _Place, target: _Place) -> int:
    """What a message was predicted to take on a channel of its own."""
    if source.stage == target.stage:
        return 0
    made, taken = (schedule.programs[place.stage][place.position].chunk for place in (source, target))
    latency, bandwidth = costs.channel(source.stage, target.stage)
    activations, gradients = costs.crossing(schedule.chunks)
    return nanoseconds(latency + (activations[made] if taken > made else gradients[taken]) / bandwidth)
