"""What goes into a unit and comes out of it while it is recorded: arguments, results, what hooks see, what it leaves.

A unit gets aliases of its arguments, and what comes out of it are aliases of what it made. So a tensor that was made
inside is known from the value that came out, and a value by the way that it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from raypipe.model.attributes import Snapshot, containers, contents, refill, same_contents
from raypipe.model.event import Constant, Leaf, Left, New, Play, Same
from raypipe.model.hooks import HookPlace
from raypipe.model.ledger import Ledger
from raypipe.model.saved import Saved
from raypipe.model.trees import PLAIN, at_path, held_by, leaves_in, tensors_in
from raypipe.model.twin import Twin
from raypipe.model.within import maker_of
from raypipe.model.written import Written

__all__ = ["CannotCarry", "Traffic"]


class CannotCarry(Exception):
    """Something that no other stage can be given."""


class Traffic:
    """The traffic of one unit call.

    Args:
        unit: that is called.
        event: number of the call's event.
        arguments: positional and keyword arguments, as the caller gave them.
        twin: of the recording.
        ledger: of the recording.
        written: of the recording.
        mark: of the run.
        saved: is told of the arguments, and of fakes that stand for real tensors.

    Attributes: ``own``, the arguments that the unit gets; ``found``, the tensors in the caller's; ``inputs``, the
    caller's, in lists and dicts to which the unit adds nothing.
    """

    def __init__(
        self,
        unit: nn.Module,
        event: int,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        twin: Twin,
        ledger: Ledger,
        written: Written,
        mark: object,
        saved: Saved | None = None,
    ) -> None:
        self._unit, self._event, self._arguments = unit, event, arguments
        self._twin, self._ledger, self._mark = twin, ledger, mark
        self._saved = saved
        self.inputs = _copied(arguments)
        self.found = [tensor for _, tensor in tensors_in(arguments)]
        self._given = {id(t): self._handed_in(written.fake_of(t)) for t in self.found}
        if saved is not None:
            saved.given(event, self._given.values())
        self._versions = {id(t): self._given[id(t)]._version for t in self.found}
        self.own: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, lambda t: self._given.get(id(t), t), arguments
        )
        self._outside = {id(self._given[id(t)]): t for t in self.found}
        self._inside = dict(self._given)
        self._made: list[tuple[Tensor, Tensor, int]] = []  # inside, outside, version when a hook saw it
        self._paths = {id(leaf): path for path, leaf in leaves_in(arguments) if not isinstance(leaf, PLAIN)}
        self._before = Snapshot(unit)
        self._lists = [(p, c, contents(c)) for p, c in containers(self.own) if len(p) > 1]
        self.plays: list[Play] = []

    def given(self, tensor: Tensor) -> Tensor:
        """What the unit gets in the place of an argument."""
        return self._given[id(tensor)]

    def changed(self) -> set[int]:
        """Ids of the arguments that were changed in place."""
        return {id(t) for t in self.found if self._given[id(t)]._version != self._versions[id(t)]}

    def hook_sees(self, place: HookPlace, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a hook gets in the place of what the unit would give it.

        Raises:
            CannotCarry: no other stage could play this hook.
        """
        outside, leaves, tree = self._outwards(given)
        self.plays.append(Play(place, leaves, tree))
        return outside  # type: ignore[no-any-return]

    def inwards(self, tree: Any) -> Any:
        """What the unit gets in the place of what a hook returned."""
        return pytree.tree_map_only(Tensor, lambda t: self._inside.get(id(t), t), tree)

    def result(self, result: Any) -> Any:
        """What the caller gets in the place of the unit's result."""
        for inner, outer, version in self._made:
            if inner._version != version:
                self._ledger.refresh(outer)
        return pytree.tree_map_only(Tensor, self._handed_out, result)

    def left(self) -> tuple[Left, ...]:
        """What the unit left in lists and dicts that it was given, and in attributes of the modules in it.

        Raises:
            CannotCarry: it put something into its arguments that no other stage could be given.
        """
        found = []
        for path, own, before in reversed(self._lists):
            if not same_contents(before, contents(own)):
                outside, leaves, tree = self._outwards(own)
                refill(at_path(self._arguments, path), outside)
                found.append(Left(path, ("", ""), True, leaves, tree))
        for module, name, value in self._before.changed():
            if any(self._is_of_this_call(leaf) for leaf in pytree.tree_leaves(value)):
                try:
                    found.append(self._left_in(module, name, value))
                except CannotCarry:
                    continue  # who uses it is told then
        return tuple(found)

    def _left_in(self, path: str, name: str, value: Any) -> Left:
        outside, leaves, tree = self._outwards(value)
        same = self._before.is_same(path, name, value)
        if same:
            refill(value, outside)
        else:
            vars(self._unit.get_submodule(path))[name] = outside
        return Left(None, (path, name), same, leaves, tree)

    def _is_of_this_call(self, leaf: Any) -> bool:
        if not isinstance(leaf, Tensor):
            return False
        maker = maker_of(leaf, self._mark)
        if id(leaf) in self._outside or (maker is not None and maker.of_value and maker.event == self._event):
            return True
        return self._ledger.made_since(leaf, self._event)

    def _outwards(self, tree: Any) -> tuple[Any, tuple[Leaf, ...], pytree.TreeSpec]:
        leaves, spec = pytree.tree_flatten(tree)
        pairs = [self._outward(leaf) for leaf in leaves]
        return pytree.tree_unflatten([leaf for leaf, _ in pairs], spec), tuple(said for _, said in pairs), spec

    def _outward(self, leaf: Any) -> tuple[Any, Leaf]:
        if isinstance(leaf, PLAIN):
            return leaf, Constant(leaf, fixed=False)
        outside = self._outside.get(id(leaf), leaf)
        if id(outside) in self._paths:
            return outside, Same(self._paths[id(outside)])
        if not isinstance(leaf, Tensor):
            if next(held_by(leaf), None) is not None:
                raise CannotCarry(f"a {type(leaf).__name__} that holds tensors")
            return leaf, Constant(leaf, fixed=False)
        if outside is leaf and id(leaf) not in self._ledger.numbers:
            if id(leaf) in self._twin.parameters or not self._twin.is_fake(leaf):
                raise CannotCarry("a parameter" if id(leaf) in self._twin.parameters else "a tensor of no unit")
            outside = self._come_out(leaf)
        number = self._ledger.numbers.get(id(outside))
        return outside, New(self._ledger.value(outside, self._event) if number is None else number)

    def _come_out(self, tensor: Tensor) -> Tensor:
        outside = _alias(tensor)
        self._outside[id(tensor)], self._inside[id(outside)] = outside, tensor
        self._made.append((tensor, outside, tensor._version))
        return outside

    def _handed_in(self, tensor: Tensor) -> Tensor:
        if not self._twin.is_fake(tensor):
            made = self._twin.fake(tensor)
            if self._saved is not None:
                self._saved.stands_for(made, tensor)
            return made
        return tensor if id(tensor) in self._twin.parameters else _alias(tensor)

    def _handed_out(self, tensor: Tensor) -> Tensor:
        outside = self._outside.get(id(tensor))
        if outside is not None:
            return outside
        if self._ledger.made_since(tensor, self._event):  # in a hook
            return tensor
        return self._come_out(tensor) if self._twin.is_fake(tensor) else self._twin.fake(tensor)


def _copied(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        return tuple(_copied(item) for item in tree)
    return {key: _copied(item) for key, item in tree.items()} if isinstance(tree, Mapping) else tree


def _alias(tensor: Tensor) -> Tensor:
    with torch.enable_grad():
        return tensor.view_as(tensor)
