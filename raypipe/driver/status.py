"""What is known of every rank at one moment: plain data, made by the host of the ranks, read by ``failure``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

__all__ = ["Failed", "Finished", "GroupStatus", "Outcome", "Running"]


@dataclass(frozen=True, slots=True)
class Finished:
    """The call returned."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """The call raised; where the rank's process is gone the error is a ``StageLost``."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Running:
    """Nothing has come back yet."""


Outcome: TypeAlias = Finished | Failed | Running


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """The outcomes of one call on all ranks.

    Attributes:
        outcomes: one a rank, in order of ranks.
    """

    outcomes: tuple[Outcome, ...]

    @property
    def errors(self) -> dict[int, BaseException]:
        """The errors by rank, in order of ranks."""
        return {rank: outcome.error for rank, outcome in enumerate(self.outcomes) if isinstance(outcome, Failed)}

    @property
    def running(self) -> tuple[int, ...]:
        """The ranks of which nothing has come back."""
        return tuple(rank for rank, outcome in enumerate(self.outcomes) if isinstance(outcome, Running))

    @property
    def values(self) -> list[Any]:
        """The results in order of ranks; only where every rank has finished."""
        return [outcome.value for outcome in self.outcomes if isinstance(outcome, Finished)]

    def others(self, cause: BaseException) -> list[str]:
        """One line for each kind of error but ``cause``, with the ranks that had it: equal errors are grouped."""
        ranks_by_text: dict[str, list[int]] = {}
        for rank, error in self.errors.items():
            if error is not cause:
                ranks_by_text.setdefault(_one_line(error), []).append(rank)
        return [
            f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}: {text}"
            for text, ranks in ranks_by_text.items()
        ]


def _one_line(error: BaseException) -> str:
    """The last line of an error: a remote traceback ends with what was raised."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
