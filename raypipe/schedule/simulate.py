"""A schedule played against costs: when each action runs, how much is idle, what is alive at the peak, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .costs import Costs
from .critical_path import Link, Sent, critical_path
from .dry_run import dry_run, number_messages
from .memory import peak_bytes, peak_in_flight
from .span import Span

if TYPE_CHECKING:
    from .schedule import Schedule

__all__ = ["Simulation", "simulate"]


@dataclass(frozen=True)
class Simulation:
    """What ``simulate`` found; times are in the unit of the costs and count from 0."""

    makespan: float
    """When the last action ends."""
    bubble: float
    """Share of the stages' time (stages times makespan) in which nothing is computed, 0 to 1."""
    stage_bubbles: tuple[float, ...]
    """The same for each stage alone."""
    peak_in_flight: tuple[int, ...]
    """For each stage, the most microbatches at one time whose forward has started and whose backward (W where it is
    apart) has not ended. A stage with several chunks counts a microbatch once for each chunk that holds it."""
    peak_bytes: tuple[float, ...]
    """For each stage, the most bytes that these microbatches keep at one time, by ``Costs.activation_bytes``."""
    spans: tuple[Span, ...]
    """All actions; those of one stage are in its order."""
    critical_path: tuple[Link, ...]
    """The actions, and the messages between them, that explain the makespan: the first starts at 0, each other one
    when the one before it ends, and the last ends at the makespan. See critical_path.py."""


def simulate(schedule: Schedule, costs: Costs | None = None) -> Simulation:
    """Plays ``schedule`` against ``costs``.

    A stage runs its program in order, each action as soon as the one before has ended and what it waits for is there.
    Messages take no time of a stage. A channel, from one stage to one other, takes in one message at a time in the
    sender's order, at its bandwidth; then the message is on its way for the latency. Linear in the number of actions.

    Args:
        schedule: any schedule; it has been checked, so it comes to its end.
        costs: how long things take; ``Costs()`` where none are given.

    Raises:
        ValueError: costs by chunk or boundary whose number is not the schedule's, or a channel without costs.
    """
    costs = costs or Costs()
    played = _Played(schedule, costs)
    makespan = max(played.free)
    stage_bubbles = tuple(max(0.0, 1.0 - time / makespan) if makespan else 0.0 for time in played.busy)
    return Simulation(
        makespan=makespan,
        bubble=sum(stage_bubbles) / schedule.stages,
        stage_bubbles=stage_bubbles,
        peak_in_flight=peak_in_flight(schedule.programs),
        peak_bytes=peak_bytes(schedule.programs, costs.kept(schedule.chunks), costs.input_share),
        spans=tuple(played.spans),
        critical_path=critical_path(played.spans, played.previous, played.needs, played.sent, played.numbered.message),
    )


class _Played:
    """Every action in the order of the dry run, in which whatever it waits for comes before it."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self.spans: list[Span] = []
        self.previous: list[int] = []
        self.needs: list[int] = []
        self.sent: dict[int, Sent] = {}
        self.free = [0.0] * schedule.stages
        self.busy = [0.0] * schedule.stages
        self.numbered = number_messages(schedule.programs)
        self._play(schedule, _seconds(schedule, costs), _Channels(schedule, costs, self.sent))

    def _play(self, schedule: Schedule, seconds: list[list[float]], channels: _Channels) -> None:
        last = [-1] * schedule.stages
        free, sent = self.free, self.sent
        for place, (_, stage, position) in enumerate(dry_run(schedule.programs).steps):
            need, give = self.numbered.needs[stage][position], self.numbered.gives[stage][position]
            start, time = free[stage], seconds[stage][position]
            if need in sent and sent[need].end > start:
                start = sent[need].end
            free[stage] = end = start + time
            self.busy[stage] += time
            self.spans.append(Span(stage, schedule.programs[stage][position], start, end))
            self.previous.append(last[stage])
            self.needs.append(need)
            last[stage] = place
            if give >= 0:
                channels.send(give, *self.numbered.made_by(give), place, end)


class _Channels:
    """The channels between stages; each takes in one message at a time."""

    def __init__(self, schedule: Schedule, costs: Costs, sent: dict[int, Sent]) -> None:
        self._costs, self._placement, self._sent = costs, schedule.placement, sent
        self._activations, self._gradients = costs.crossing(schedule.chunks)
        self._costs_of: dict[tuple[int, int], tuple[float, float]] = {}
        self._last: dict[tuple[int, int], int] = {}

    def send(self, number: int, chunk: int, gradient: bool, giver: int, ready: float) -> None:
        """Sends what ``chunk`` had made at ``ready`` to the stage that takes it, if that is another one."""
        taker = chunk - 1 if gradient else chunk + 1
        if not 0 <= taker < len(self._placement):
            return
        channel = self._placement[chunk], self._placement[taker]
        if channel[0] == channel[1]:
            return
        if channel not in self._costs_of:
            self._costs_of[channel] = self._costs.channel(*channel)
        latency, bandwidth = self._costs_of[channel]
        before = self._last.get(channel, -1)
        start = ready if before < 0 else max(ready, self._sent[before].taken)
        size = self._gradients[taker] if gradient else self._activations[chunk]
        taken = start + size / bandwidth
        self._sent[number] = Sent(giver, channel[1], start, taken, taken + latency, before)
        self._last[channel] = number


def _seconds(schedule: Schedule, costs: Costs) -> list[list[float]]:
    """For each stage and position what the action there takes."""
    table = costs.table(schedule.chunks)
    pairs = tuple(table.items())  # an enum's members are slow to hash
    return [
        [next(by_chunk for op, by_chunk in pairs if op is action.op)[action.chunk] for action in program]
        for program in schedule.programs
    ]
