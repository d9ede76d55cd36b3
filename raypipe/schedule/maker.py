"""The user's ``schedule`` argument: what makes the schedule of a step, for however many microbatches its batch has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from raypipe.schedule import Schedule, build

__all__ = ["ScheduleMaker"]


@dataclass(frozen=True, slots=True)
class ScheduleMaker:
    """Makes the schedule of a number of microbatches; picklable.

    Attributes: ``given``, a name, a schedule, or a callable ``(stages, microbatches) -> Schedule``; ``stages``;
    ``chunks``, how many a stage holds, or None for the schedule's own number.
    """

    given: str | Schedule | Callable[[int, int], Schedule]
    stages: int
    chunks: int | None = None

    def __call__(self, microbatches: int) -> Schedule:
        """The schedule.

        Raises:
            ValueError: it is for another number of stages, microbatches or chunks.
        """
        if isinstance(self.given, str):
            return build(self.given, self.stages, microbatches, self.chunks)
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
        if made.forward_only:
            raise ValueError(
                f"schedule {made.name!r} has no backwards, so nothing would be trained; give one with them"
            )
        if self.chunks is not None and made.chunks != self.chunks * made.stages:
            raise ValueError(
                f"chunks={self.chunks}, but schedule {made.name!r} has {made.chunks} chunks on {made.stages} stages; "
                "leave chunks out"
            )
        return made


def _of_its_kind(given: Schedule, microbatches: int) -> Schedule:
    """The schedule of another number of microbatches, where the given one is one of those that have a name."""
    chunks, rest = divmod(given.chunks, given.stages)
    with contextlib.suppress(ValueError):  # a schedule of the user's own, or with another number of chunks
        if not rest and build(given.name, given.stages, given.microbatches, chunks) == given:
            return build(given.name, given.stages, microbatches, chunks)
    return given
