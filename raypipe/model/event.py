"""An event of a model's forward, and the values that it makes.

event     a unit call, or a torch function outside units on a value that depends on a unit or a parameter
value     a tensor that an event made; an in-place function makes a new version of the same object
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from raypipe.model.hooks import HookPlace
from raypipe.tensors import TensorSpec

__all__ = ["Constant", "Event", "Leaf", "Left", "Mutation", "New", "Path", "Play", "Same", "Value"]

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
    """An output leaf that is no tensor; the owner checks that a ``fixed`` one is the same in every run."""

    value: Any
    fixed: bool = True


@dataclass(frozen=True, slots=True)
class Mutation:
    """The argument at ``path`` was changed in place and is ``value`` from then on."""

    path: Path
    value: int


Leaf = New | Same | Constant


@dataclass(frozen=True, slots=True)
class Play:
    """A hook ran inside of a unit.

    Attributes: ``place`` of the hook; ``leaves`` and ``tree`` of what it was given beside its module.
    """

    place: HookPlace
    leaves: tuple[Leaf, ...]
    tree: pytree.TreeSpec


@dataclass(frozen=True, slots=True)
class Left:
    """A unit left tensors in an attribute, or in a list or dict.

    Attributes: ``path`` of the argument, or None for an attribute: ``attribute``, the path of the module inside of the
    unit and the name; ``refilled``, whether it is a list or dict that holds others now; ``leaves`` and ``tree`` of what
    it is or holds.
    """

    path: Path | None
    attribute: tuple[str, str]
    refilled: bool
    leaves: tuple[Leaf, ...]
    tree: pytree.TreeSpec


@dataclass(frozen=True, slots=True)
class Event:
    """One event. What the body of a hook inside of a unit does are events after the unit call's.

    Attributes:
        name: the unit's, or the function's.
        call: the number of the unit call, or None.
        uses: numbers of the values that it reads.
        parameters: names of those that it reads outside of their units, of those of units that it calls inside, and of
            units' buffers that it reads outside of their units.
        leaves: of its result, whose structure is ``tree``.
        mutations: what it changes in place.
        flops: of the forward.
        where: the line of the user's code.
        random: whether it is a function that draws random numbers.
        region: equal for events of one checkpointed call, or None.
        backward_flops: of the backward.
        plays: the hooks that ran inside of the unit.
        left: what the unit left behind without returning it.
        guessed: whether its shapes depend on data, and are those for stand-ins of zeros.
        once: why the unit call must not run a second time in the backward, or ``""`` (see ``model.once``).
        eagerly: whether only eager code could run it again.
        counted: whether the unit calls a loss function whose denominator must be seen (see ``model.denominators``).
    """

    name: str
    call: int | None
    uses: tuple[int, ...]
    parameters: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    tree: pytree.TreeSpec
    mutations: tuple[Mutation, ...] = ()
    flops: int = 0
    where: str = ""
    random: bool = False
    region: int | None = None
    backward_flops: int = 0
    plays: tuple[Play, ...] = ()
    left: tuple[Left, ...] = ()
    guessed: bool = False
    once: str = ""
    eagerly: bool = False
    counted: bool = False

    @property
    def nested(self) -> bool:
        """Whether the result is more than one bare leaf."""
        return not self.tree.is_leaf()

    @property
    def in_sight(self) -> bool:
        """Whether what the unit does inside is looked at while it runs."""
        return bool(self.plays or self.left or self.counted)
