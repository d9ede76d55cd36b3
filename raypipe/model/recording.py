"""What a model's forward does, as seen from outside its units: all of its events, and who uses their values.

    cut       a unit call before which the model is cut; the live values there are the boundary

The boundary before event c is every value made before c and used at or after it (liveness). So residuals around
blocks, U-Net skips and an encoder's output are ordinary boundary values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from raypipe.errors import CutError
from raypipe.model.cuts import Together, forbidden_cuts, parted
from raypipe.model.event import Event, Value
from raypipe.tensors import TensorSpec

__all__ = ["Recording", "Window"]


@dataclass(frozen=True, slots=True)
class Window:
    """A chunk's part of the events: ``start <= event < end``, with what crosses at both ends."""

    start: int
    end: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(slots=True)
class Recording:
    """The events of one forward, for one signature of a microbatch."""

    events: list[Event] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    placeholders: list[Tensor] = field(default_factory=list)
    """By value: a fake tensor that stands for it where it is not computed. Empty where this was predicted."""
    returned: tuple[int, ...] = ()
    """Values that the forward returned: used at the end."""
    withheld: tuple[int, ...] = ()
    """Leaves of the outputs that units filled out of sight (a cache of keys): None is returned in their place."""
    together: list[Together] = field(default_factory=list)
    """Events that must lie in one chunk, since what goes on between them cannot be carried."""
    inside: frozenset[str] = frozenset()
    """Names of hooks whose bodies belong to the unit: they do what code between units cannot."""
    removes_hooks: bool = False
    """Whether the forward sets hooks on modules and removes all of them before it ends."""
    running: int | None = None
    """The event of the unit call that runs now, while the forward is recorded."""
    low: torch.dtype | None = None
    """What float32 values with a gradient travel as (``Precision.boundary``); None: as they are."""
    stopped: str | None = None
    """Why nothing is known of the end of the forward, where that is so: it asked a value for its data."""
    make: Callable[[Value], Tensor] | None = None
    """Makes placeholders, where this recording was predicted from others (``model.predict_recording``)."""
    _windows: dict[tuple[int, ...], tuple[Window, ...]] = field(default_factory=dict)
    _forbidden: dict[int, str] | None = None
    _made: dict[int, Tensor] = field(default_factory=dict)
    _once: dict[int, str] | None = None

    @property
    def predicted(self) -> bool:
        """Whether it was told from recordings of other sizes."""
        return self.make is not None

    @property
    def calls(self) -> tuple[int, ...]:
        """The event of each unit call."""
        return tuple(number for number, event in enumerate(self.events) if event.call is not None)

    @property
    def beside(self) -> bool:
        """Whether hooks or attributes carry anything."""
        return any(event.plays or event.left for event in self.events)

    @property
    def names(self) -> tuple[str, ...]:
        """The unit of each unit call."""
        return tuple(event.name for event in self.events if event.call is not None)

    @property
    def forbidden(self) -> dict[int, str]:
        """By unit call: why no cut may stand before it. Of a finished recording."""
        if self._forbidden is None:
            self._forbidden = forbidden_cuts(self)
        return self._forbidden

    def placeholder(self, number: int) -> Tensor:
        """What stands for a value where it is not computed; of a predicted recording made when first asked for."""
        if self.make is None:
            return self.placeholders[number]
        if number not in self._made:
            self._made[number] = self.make(self.values[number])
        return self._made[number]

    def last_uses(self) -> list[int]:
        """By value: the last event that uses it (the number of events where the forward returns it), or -1."""
        last = [-1] * len(self.values)
        for number, event in enumerate(self.events):
            for value in event.uses:
                last[value] = number
        for value in self.returned:
            last[value] = len(self.events)
        return last

    def live(self, cut: int) -> tuple[Value, ...]:
        """The values made before event ``cut`` and used at or after it."""
        last = self.last_uses()
        return tuple(value for value in self.values if value.event < cut <= last[value.number])

    def windows(self, cuts: tuple[int, ...]) -> tuple[Window, ...]:
        """The windows between cuts, each given as the number of the unit call that it stands before.

        Raises:
            CutError: a cut parts what has to stay in one chunk.
        """
        if cuts not in self._windows:
            for cut in cuts:
                if cut in self.forbidden:
                    raise CutError(parted(self.names, self.forbidden, cut, len(cuts) + 1))
            calls = self.calls
            edges = [0, *(calls[cut] for cut in cuts), len(self.events)]
            live = [(), *(self.live(edge) for edge in edges[1:-1]), ()]
            self._windows[cuts] = tuple(
                Window(edges[i], edges[i + 1], live[i], live[i + 1]) for i in range(len(edges) - 1)
            )
        return self._windows[cuts]

    def mutated_after(self, cut: int) -> set[int]:
        """The storages that events at or after ``cut`` change in place."""
        return {self.values[mutation.value].storage for event in self.events[cut:] for mutation in event.mutations}

    def once(self, number: int) -> str:
        """Why the unit call of event ``number`` must not run again in its backward, or ``""``."""
        if self._once is None:
            self._once = {each: self._why_once(each) for each in self.calls}
        return self._once[number]

    def _why_once(self, number: int) -> str:
        event = self.events[number]
        if not event.once and not self.mutated_after(number + 1).isdisjoint(
            self.values[value].storage for value in event.uses
        ):
            return "gets an argument that is changed in place later"
        return event.once

    def travels(self, value: Value) -> TensorSpec:
        """What a value is on its way to another stage, and what its gradient is on the way back.

        Low is what a gradient flows through alone: masks, positions and the like must keep their digits. So all of an
        evaluation's values travel as they are.
        """
        if self.low is None or value.spec.dtype is not torch.float32 or not value.requires_grad:
            return value.spec
        return replace(value.spec, dtype=self.low)

    def describe(self, value: Value | int) -> str:
        """A value in words, for an error."""
        value = self.values[value] if isinstance(value, int) else value
        event = self.events[value.event]
        return (
            f"a {value.spec.dtype} tensor {value.spec.shape} made by {event.name}{event.where and f' ({event.where})'}"
        )
