"""What the controller sees of the ranks, whoever hosts them: Ray actors, or this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from raypipe.driver.status import GroupStatus

__all__ = ["Gang", "Pending"]


@dataclass(frozen=True, slots=True)
class Pending:
    """A call that every rank has been given and whose results are not taken yet.

    Attributes:
        step: the step that it belongs to.
        kind: ``train``, ``evaluate``, ``predict``, or a word such as ``state``.
        calls: one handle a rank, in order of ranks; only the gang that made them can read them.
    """

    step: int
    kind: str
    calls: tuple[Any, ...]


class Gang(Protocol):
    """All ranks of one trainer. A rank runs its calls one by one, in the order in which they were made."""

    @property
    def failure(self) -> GroupStatus | None:
        """What is known of every rank since ``wait`` raised, or None while all is well."""

    def put(self, value: Any) -> Any:
        """Stores a value once for all ranks; the result is handed to a step in the value's place."""

    def train_step(self, step: int, batch: Any) -> Pending:
        """Queues a training step on all ranks, or on none."""

    def forward_step(self, step: int, batch: Any, kind: str, replica: int = 0) -> Pending:
        """Queues forwards only on all ranks, or on none; ``kind`` is ``"evaluate"`` or ``"predict"``.

        The batch goes to one replica whole; the ranks of the others have nothing to do.
        """

    def state(self) -> list[Any]:
        """What ``Worker.state`` gives of the first replica, by rank, after everything that was queued before.

        Raises:
            RaypipeError: as ``wait``.
        """

    def wait(self, pending: Pending) -> list[Any]:
        """The results in order of ranks.

        Raises:
            StageError: the user's code, or ours, failed on a stage.
            StageLost: a stage's process is gone.
            StageStuck: a stage makes no progress.
            RaypipeError: whatever else was the first cause. Ranks that failed because of it are not raised, and a
                later ``wait`` raises the same again.
        """

    def drop(self, pending: Pending) -> None:
        """Lets go of a call whose results nobody will take."""

    def close(self) -> None:
        """Ends every rank and gives back what it holds. May be called twice."""
