"""What is in the arguments and results of a call: nested tuples, lists and dicts, and objects of other kinds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.model.event import Path

__all__ = ["PLAIN", "at_path", "held_by", "leaves_in", "tensors_in"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout)
"""What is told apart by what it is, and not by which."""


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in nested tuples, lists and dicts, with their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from tensors_in(item, (*path, index))
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from tensors_in(item, (*path, key))


def at_path(tree: Any, path: Path) -> Any:
    """What stands at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def leaves_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything in nested tuples, lists and dicts, with its path."""
    if isinstance(tree, (list, tuple)):
        for index, item in enumerate(tree):
            yield from leaves_in(item, (*path, index))
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from leaves_in(item, (*path, key))
    else:
        yield path, tree


def held_by(thing: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors in an object's attributes, and in those of the objects there."""
    if isinstance(thing, Tensor):
        yield thing
    elif depth and not isinstance(thing, (*PLAIN, type, nn.Module)):
        inner = [leaf for _, leaf in leaves_in(thing)] if isinstance(thing, (list, tuple, Mapping)) else []
        slots = [getattr(thing, name, None) for name in getattr(type(thing), "__slots__", ())]
        for each in (*inner, *slots, *getattr(thing, "__dict__", {}).values()):
            yield from held_by(each, depth - 1)
