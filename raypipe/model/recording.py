"""What a model's forward does, as seen from outside its units: events, the values they make, and who uses them.

    event     a unit call, or a torch function outside units on a value that depends on a unit or a parameter
    value     a tensor that an event made; an in-place function makes a new version of the same object
    cut       a unit call before which the model is cut; the live values there are the boundary

The boundary before event c is every value made before c and used at or after it (liveness). So residuals around
blocks, U-Net skips and an encoder's output are ordinary boundary values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.tensors import TensorSpec

__all__ = ["Constant", "Event", "Mutation", "New", "Path", "Recording", "Same", "Value", "Window"]

Path = tuple[str | int, ...]
"""Where an argument stands in ``(args, kwargs)``: keys and indices."""


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor made by an event.

    Attributes: ``number`` of the value; ``event`` that made it; ``spec``; ``stride``; ``requires_grad``; ``thing``, the
    number of the object (versions of one object share it); ``storage``, equal for values that share memory.
    """

    number: int
    event: int
    spec: TensorSpec
    stride: tuple[int, ...]
    requires_grad: bool
    thing: int
    storage: int


@dataclass(frozen=True, slots=True)
class New:
    """An output leaf: a new tensor object."""

    value: int


@dataclass(frozen=True, slots=True)
class Same:
    """An output leaf: the argument at ``path`` itself."""

    path: Path


@dataclass(frozen=True, slots=True)
class Constant:
    """An output leaf that is no tensor; the owner checks that it is the same in every run."""

    value: Any


@dataclass(frozen=True, slots=True)
class Mutation:
    """The argument at ``path`` was changed in place and is ``value`` from then on."""

    path: Path
    value: int


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        name: the unit's, or the function's.
        call: the number of the unit call, or None.
        uses: numbers of the values that it reads.
        parameters: names of those that it reads outside of their units, and of those of units that it calls inside.
        leaves: of its result, whose structure is ``tree``.
        mutations: what it changes in place.
        flops: of the forward.
        where: the line of the user's code.
        random: whether it is a function that draws random numbers.
        region: equal for events of one checkpointed call, or None.
    """

    name: str
    call: int | None
    uses: tuple[int, ...]
    parameters: tuple[str, ...]
    leaves: tuple[New | Same | Constant, ...]
    tree: pytree.TreeSpec
    mutations: tuple[Mutation, ...] = ()
    flops: int = 0
    where: str = ""
    random: bool = False
    region: int | None = None

    @property
    def nested(self) -> bool:
        """Whether the result is more than one bare leaf."""
        return not self.tree.is_leaf()


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
    """By value: a fake tensor that stands for it where it is not computed."""
    returned: tuple[int, ...] = ()
    """Values that the forward returned: used at the end."""
    withheld: tuple[int, ...] = ()
    """Leaves of the outputs that units filled out of sight (a cache of keys): None is returned in their place."""
    stopped: str | None = None
    """Why nothing is known of the end of the forward, where that is so: it asked a value for its data."""
    _windows: dict[tuple[int, ...], tuple[Window, ...]] = field(default_factory=dict)

    @property
    def calls(self) -> tuple[int, ...]:
        """The event of each unit call."""
        return tuple(number for number, event in enumerate(self.events) if event.call is not None)

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
            CutError: two live values share memory that is changed in place afterwards, or a cut is inside of a
                checkpointed call.
        """
        if cuts not in self._windows:
            calls = self.calls
            edges = [0, *(calls[cut] for cut in cuts), len(self.events)]
            live = [(), *(self.live(edge) for edge in edges[1:-1]), ()]
            for edge, values in zip(edges[1:-1], live[1:-1], strict=True):
                self._refuse_region(edge)
                self._refuse_aliases(edge, values)
            self._windows[cuts] = tuple(
                Window(edges[i], edges[i + 1], live[i], live[i + 1]) for i in range(len(edges) - 1)
            )
        return self._windows[cuts]

    def mutated_after(self, cut: int) -> set[int]:
        """The storages that events at or after ``cut`` change in place."""
        return {self.values[mutation.value].storage for event in self.events[cut:] for mutation in event.mutations}

    def describe(self, value: Value | int) -> str:
        """A value in words, for an error."""
        value = self.values[value] if isinstance(value, int) else value
        event = self.events[value.event]
        return (
            f"a {value.spec.dtype} tensor {value.spec.shape} made by {event.name}{event.where and f' ({event.where})'}"
        )

    def _refuse_region(self, cut: int) -> None:
        before, after = self.events[cut - 1], self.events[cut]
        if after.region is not None and before.region == after.region:
            raise CutError(
                f"a cut before {after.name} ({after.where}) would part one call of torch.utils.checkpoint that began "
                f"before {before.name}; checkpoint each unit by itself, or keep the call in one stage with "
                "balance=[...]"
            )

    def _refuse_aliases(self, cut: int, values: tuple[Value, ...]) -> None:
        changed = self.mutated_after(cut)
        by_storage: dict[int, Value] = {}
        for value in values:
            other = by_storage.setdefault(value.storage, value)
            if other is not value and value.storage in changed:
                raise CutError(
                    f"a cut before {self.events[cut].name} would part {self.describe(other)} from "
                    f"{self.describe(value)}: they share memory that is changed in place afterwards; "
                    "clone one of them, or keep both ends in one stage with balance=[...]"
                )
