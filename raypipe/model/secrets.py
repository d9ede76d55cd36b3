"""What cannot be carried, as it is met while a forward is recorded, and which events it keeps in one chunk.

A tensor that a unit kept to itself, or the values inside of an ``autograd.Function``, whose backward is one piece.
"""

from __future__ import annotations

from torch import Tensor

from raypipe.errors import CutError
from raypipe.model import refusals
from raypipe.model.cuts import END, Together
from raypipe.model.frames import Place, user_line
from raypipe.model.recording import Recording
from raypipe.model.twin import Twin
from raypipe.model.within import maker_of

__all__ = ["Secrets"]


class Secrets:
    """Writes into ``recording.together``.

    Args:
        twin: the fake model.
        recording: of its forward.
        mark: what ``maker_of`` knows the makers of this recording by.

    Attributes: ``in_hook``, whether the body of a hook inside of a unit runs, which may meet none of this.
    """

    def __init__(self, twin: Twin, recording: Recording, mark: object) -> None:
        self._twin, self._recording, self._mark = twin, recording, mark
        self._seen: list[tuple[Tensor, int]] = []
        self.in_hook = False

    def keep_in_function(self, where: Place, name: str) -> None:
        """From the first event inside of an ``autograd.Function`` on, nothing can be cut: its backward is one piece."""
        if self.in_hook:
            raise CutError(f"{name} runs in a hook inside {where.function}")
        event = len(self._recording.events)
        self._recording.together.append(
            Together(event, END, *refusals.inside_function(where.function, name, where.line))
        )

    def used_within(self, tensor: Tensor, user: str) -> None:
        """A unit uses what another one kept to itself."""
        self.used(tensor, user, len(self._recording.events) - 1)

    def used(self, tensor: Tensor, user: str, last: int) -> None:
        """A tensor that a unit kept to itself and that is used elsewhere, up to event ``last``.

        Code between units runs on every stage from there on, and needs it; so no stage may follow.
        """
        if self.in_hook:
            raise CutError(f"a hook uses a tensor that {user} cannot have")
        if id(tensor) in self._twin.buffers:
            refusals.foreign_buffer(self._twin.buffers[id(tensor)], user, user_line())
        if any(tensor is seen and last <= upto for seen, upto in self._seen):
            return
        self._seen.append((tensor, last))
        maker = maker_of(tensor, self._mark)
        name, first = (maker.unit, maker.event) if maker else ("a unit", 0)
        self._recording.together.append(Together(first, last, *refusals.hidden(tensor, name, user, user_line())))
