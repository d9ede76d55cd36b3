"""What a unit call does beside returning: hooks that run inside of it, attributes and lists that it leaves.

Where the unit runs, the tensors in them are values as its results are. Where it is skipped, the hooks are played and
the attributes set, with received tensors and placeholders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree

from raypipe.errors import CutError
from raypipe.model.attributes import refill
from raypipe.model.event import Event, Leaf, Left, New, Play, Same
from raypipe.model.hooks import HookPlace, hooks_of
from raypipe.model.recording import Recording
from raypipe.model.trees import at_path

__all__ = ["Hearing", "leave", "name_left", "play"]

Name = Callable[[Any, int], None]
Give = Callable[[int], Any]


class Hearing:
    """Hears the hooks of a unit that runs.

    Args:
        event: of the unit call.
        name: makes a tensor known as the value with that number.
        seen: runs a hook so that what its body does is seen.
    """

    def __init__(self, event: Event, name: Name, seen: Callable[[Callable[[], Any]], Any]) -> None:
        self._event, self._name, self._seen = event, name, seen
        self._plays = iter(event.plays)
        self._nested = False

    def __call__(self, place: HookPlace, hook: Callable[..., Any], module: nn.Module, given: tuple[Any, ...]) -> Any:
        """A hook runs."""
        if self._nested:
            return hook(module, *given)
        planned = next(self._plays, None)
        if planned is None or planned.place != place:
            raise CutError(_other_hooks(self._event))
        _name_leaves(given, planned, self._name, self._event)
        self._nested = True
        try:
            return self._seen(lambda: hook(module, *given))
        finally:
            self._nested = False

    def finish(self) -> None:
        """The unit returned."""
        if next(self._plays, None) is not None:
            raise CutError(_other_hooks(self._event))


def name_left(event: Event, unit: nn.Module, inputs: Any, name: Name) -> None:
    """Makes the tensors that a unit left known as values."""
    for left in event.left:
        path, attribute = left.attribute
        kept = at_path(inputs, left.path) if left.path is not None else _kept(event, unit, path, attribute)
        _name_leaves(kept, left, name, event)


def play(
    event: Event,
    unit: nn.Module,
    inputs: Any,
    recording: Recording,
    give: Give,
    seen: Callable[[Callable[[], Any]], Any],
) -> None:
    """Plays the hooks of a unit that is skipped.

    Args:
        event: of the unit call.
        unit: that is skipped.
        inputs: its arguments.
        recording: of the event.
        give: the tensor for a value.
        seen: runs a hook so that what its body does is seen.
    """
    hooks = hooks_of(unit, recording.inside)
    for each in event.plays:
        if each.place not in hooks:
            raise CutError(_other_hooks(event))
        hook, module = hooks[each.place], unit.get_submodule(each.place[0])
        given = _built(each, inputs, give)
        seen(lambda hook=hook, module=module, given=given: hook(module, *given))  # type: ignore[misc]


def leave(event: Event, unit: nn.Module, inputs: Any, give: Give) -> None:
    """Sets what a unit that is skipped would have left."""
    for left in event.left:
        path, attribute = left.attribute
        held = _built(left, inputs, give)
        if left.path is not None:
            refill(at_path(inputs, left.path), held)
        elif left.refilled:
            refill(_kept(event, unit, path, attribute), held)
        else:
            vars(unit.get_submodule(path))[attribute] = held


def _kept(event: Event, unit: nn.Module, path: str, attribute: str) -> Any:
    try:
        return vars(unit.get_submodule(path))[attribute]
    except KeyError:
        raise CutError(
            f"{event.name} does not set its attribute {attribute}, as it did when it was planned: it takes another way "
            "from batch to batch; put the part that varies into a unit (units=[...])"
        ) from None


def _name_leaves(tree: Any, planned: Play | Left, name: Name, event: Event) -> None:
    leaves, spec = pytree.tree_flatten(tree)
    if spec != planned.tree:
        raise CutError(f"a hook or an attribute of {event.name} got {spec} where it got {planned.tree} when planned")
    for leaf, said in zip(leaves, planned.leaves, strict=True):
        if isinstance(said, New):
            name(leaf, said.value)


def _built(planned: Play | Left, inputs: Any, give: Give) -> Any:
    return pytree.tree_unflatten([_leaf(said, inputs, give) for said in planned.leaves], planned.tree)


def _leaf(said: Leaf, inputs: Any, give: Give) -> Any:
    if isinstance(said, New):
        return give(said.value)
    return at_path(inputs, said.path) if isinstance(said, Same) else said.value


def _other_hooks(event: Event) -> str:
    return (
        f"other hooks ran inside {event.name} than when it was planned; set hooks before the model is given to the "
        "trainer, and let them stay"
    )
