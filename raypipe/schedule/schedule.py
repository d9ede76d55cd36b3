"""A schedule: the programs of all stages, as pure data that has been checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .action import Action, Op, Programs
from .check import check, check_count
from .costs import Costs
from .csv import read_csv, write_csv
from .draw import draw_programs
from .dry_run import dry_run
from .simulate import Simulation, simulate

__all__ = ["Schedule"]


@dataclass(frozen=True, repr=False)
class Schedule:
    """What every stage computes in a step, in order. Immutable, hashable, picklable; ``print`` draws its grid.

    A stage holds the chunks that its program names: one each in GPipe and 1F1B, several where a schedule interleaves,
    in any placement.

    Raises:
        ScheduleError: programs that compute the wrong thing or can deadlock; see check.py for the rules.
    """

    name: str
    """What people call it."""
    programs: Programs
    """For each stage its actions, in order; any sequences are taken and become tuples."""
    microbatches: int
    """How many microbatches a step has."""
    forward_only: bool = False
    """Whether it is for evaluation: forwards and no backwards. Said, not guessed, so that a schedule that forgot its
    backwards is refused."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "programs", tuple(map(tuple, self.programs)))
        check(self.name, self.programs, self.microbatches, self.forward_only)

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.programs)

    @property
    def chunks(self) -> int:
        """The number of chunks of the whole model."""
        return len(self.placement)

    @cached_property
    def placement(self) -> tuple[int, ...]:
        """The stage of each chunk, in order of chunks."""
        stage_of = {action.chunk: stage for stage, program in enumerate(self.programs) for action in program}
        return tuple(stage_of[chunk] for chunk in range(len(stage_of)))

    @property
    def in_halves(self) -> bool:
        """Whether it has backwards in two halves, I and W."""
        return any(action.op is Op.INPUT for program in self.programs for action in program)

    def stage_of(self, chunk: int) -> int:
        """The stage that holds ``chunk``.

        Raises:
            ValueError: there is no such chunk.
        """
        if not 0 <= chunk < self.chunks:
            raise ValueError(f"chunk is {chunk}, but the chunks of schedule {self.name!r} are 0 to {self.chunks - 1}")
        return self.placement[chunk]

    def order(self) -> tuple[tuple[int, Action], ...]:
        """All actions as (stage, action) in one order in which none waits for a later one; always the same.

        It is the order of a dry run in which each action takes one time slot: by slot, then by stage.
        """
        return tuple((stage, self.programs[stage][index]) for _, stage, index in dry_run(self.programs).steps)

    def forwards(self, microbatches: int) -> Schedule:
        """The forward-only schedule of ``microbatches`` microbatches in the same placement, for evaluation.

        Where a stage holds several chunks, it runs as many microbatches as there are stages through one chunk and then
        through its next, so that no stage idles between them and few boundaries are alive.
        """
        check_count("microbatches", microbatches)
        programs: list[list[Action]] = [[] for _ in self.programs]
        for first in range(0, microbatches, self.stages):
            # Group, chunk, microbatch: in this order every forward comes after the one it waits for.
            for chunk, stage in enumerate(self.placement):
                group = range(first, min(first + self.stages, microbatches))
                programs[stage] += [Action(chunk, Op.FORWARD, microbatch) for microbatch in group]
        return Schedule(f"{self.name} forwards", tuple(map(tuple, programs)), microbatches, forward_only=True)

    def simulate(self, costs: Costs | None = None) -> Simulation:
        """Plays it against ``costs``: makespan, bubble, peak in-flight microbatches, and when each action runs.

        Raises:
            ValueError: costs by chunk whose number is not that of the chunks.
        """
        return simulate(self, costs)

    def to_csv(self) -> str:
        """The programs as CSV text that ``torch.distributed.pipelining`` reads."""
        return write_csv(self.programs)

    @classmethod
    def from_csv(cls, text: str, name: str = "csv") -> Schedule:
        """The schedule in CSV text of ``torch.distributed.pipelining``; see csv.py for what is skipped.

        Raises:
            ScheduleError: a cell that is no action, or a schedule that breaks a rule.
        """
        programs = read_csv(text)
        last = max((action.microbatch for program in programs for action in program), default=0)
        return cls(name, programs, last + 1)

    def __str__(self) -> str:
        return f"{self.headline()}\n{draw_programs(self.programs)}"

    def __repr__(self) -> str:
        return f"<Schedule {self.headline()}>"

    def headline(self) -> str:
        """Name and sizes in one line, such as ``1f1b: 4 stages, 8 microbatches``."""
        chunks = f", {self.chunks} chunks" if self.chunks != self.stages else ""
        return f"{self.name}: {_count(self.stages, 'stage')}{chunks}, {_count(self.microbatches, 'microbatch', 'es')}"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
