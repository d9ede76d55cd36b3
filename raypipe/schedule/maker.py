"""The user's ``schedule`` argument: what makes the schedule of a step, for however many microbatches its batch has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from raypipe.schedule import Schedule, build, names

__all__ = ["ScheduleMaker"]


@dataclass(frozen=True, slots=True)
class ScheduleMaker:
    """Makes the schedule of a number of microbatches; picklable.

    Attributes: ``given``, a name, a schedule, or a callable ``(stages, microbatches) -> Schedule``; ``stages``.
    """

    given: str | Schedule | Callable[[int, int], Schedule]
    stages: int

    def __call__(self, microbatches: int) -> Schedule:
        """The schedule.

        Raises:
            ValueError: it is for another number of stages or microbatches.
        """
        if isinstance(self.given, str):
            return build(self.given, self.stages, microbatches)
        made = self.given if isinstance(self.given, Schedule) else self.given(self.stages, microbatches)
        if not isinstance(made, Schedule):
            raise TypeError(f"schedule gave a {type(made).__name__}; it must return a raypipe.Schedule")
        if isinstance(self.given, Schedule) and made.stages == self.stages and made.microbatches != microbatches:
            made = _of_its_kind(made, microbatches)
        if (made.stages, made.microbatches) != (self.stages, microbatches):
            raise ValueError(
                f"schedule {made.name!r} is for {made.stages} stages and {made.microbatches} microbatches, but this "
                f"step has {self.stages} and {microbatches}; give a name such as '1f1b', or a callable "
                "(stages, microbatches)"
            )
        if made.chunks != made.stages:
            raise ValueError(
                f"schedule {made.name!r} has {made.chunks} chunks on {made.stages} stages, but several chunks a stage "
                "are not built yet; use one chunk a stage, such as '1f1b'"
            )
        return made


def _of_its_kind(given: Schedule, microbatches: int) -> Schedule:
    """The schedule of another number of microbatches, where the given one is one of those that have a name."""
    if given.name in names() and build(given.name, given.stages, given.microbatches) == given:
        return build(given.name, given.stages, microbatches)
    return given
