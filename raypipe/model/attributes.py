"""What modules keep in their attributes, and the lists and dicts that they share with others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

from raypipe.model.event import Path
from raypipe.model.trees import PLAIN

__all__ = ["Snapshot", "containers", "contents", "refill", "same_contents"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Snapshot:
    """The attributes of a module and of those in it, as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before = {
            (path, name): (value, contents(value), copy.copy(value) if isinstance(value, (list, dict)) else None)
            for path, name, value in _attributes(module)
        }

    def changed(self) -> Iterator[tuple[str, str, Any]]:
        """The attributes (path of the module, name, value) that are another object by now, or hold others."""
        for path, name, value in list(_attributes(self._module)):
            before = self._before.get((path, name))
            if before is None or value is not before[0] or not same_contents(before[1], contents(value)):
                yield path, name, value

    def is_same(self, path: str, name: str, value: Any) -> bool:
        """Whether the attribute still is the same object, a list or dict that holds others."""
        before = self._before.get((path, name))
        return before is not None and value is before[0]

    def restore_contents(self) -> None:
        """Gives the lists and dicts back what they held."""
        for value, held, copied in self._before.values():
            if held is not None and not same_contents(held, contents(value)):
                refill(value, copied)


def contents(thing: Any) -> tuple[Any, ...] | None:
    """What a list or a dict holds; None for anything else."""
    if isinstance(thing, list):
        return tuple(thing)
    return (*thing.keys(), *thing.values()) if isinstance(thing, dict) else None


def refill(container: Any, held: Any) -> None:
    """Makes a list or a dict hold something else, as the same object."""
    if isinstance(container, list):
        container[:] = held
    else:
        container.clear()
        container.update(held)


def containers(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The lists and dicts in nested tuples, lists and dicts, with their paths; inner ones last."""
    if isinstance(tree, (list, dict)):
        yield path, tree
    if isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from containers(item, (*path, index))
    elif isinstance(tree, dict):
        for key, item in tree.items():
            yield from containers(item, (*path, key))


def _attributes(module: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for path, inner in module.named_modules():
        for name, value in vars(inner).items():
            if name not in _OF_EVERY_MODULE and not isinstance(value, (*PLAIN, nn.Module)):
                yield path, name, value


def same_contents(before: tuple[Any, ...] | None, after: tuple[Any, ...] | None) -> bool:
    """Whether two ``contents`` are the same objects."""
    if before is None or after is None:
        return before is after
    return len(before) == len(after) and all(one is other for one, other in zip(before, after, strict=True))
