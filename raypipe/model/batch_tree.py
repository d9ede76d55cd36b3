"""The leaves of a batch: what is cut or shared, and the keys that lead to it."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

__all__ = ["Leaf", "Shape", "flatten", "leaves_of", "lists_of", "shape_of"]

Shape = tuple[int, ...]
_PLAIN = (bool, int, float, complex, str, bytes, np.generic, enum.Enum, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of a batch and the keys that lead to it."""

    keys: tuple[Any, ...]
    value: Any

    @property
    def path(self) -> str:
        """What a person reads: ``position_ids``, ``[0]['mask']``."""
        if not self.keys:
            return "the batch"
        return str(self.keys[0]) if len(self.keys) == 1 and isinstance(self.keys[0], str) else _brackets(self.keys)

    @property
    def shape(self) -> Shape | None:
        return shape_of(self.value)

    @property
    def is_listed(self) -> bool:
        """Whether it stands in a list below a name, such as one sample's boxes."""
        names = [isinstance(key, str) for key in self.keys]
        return any(name and not below for name, below in itertools.pairwise(names))

    @property
    def is_opaque(self) -> bool:
        """Whether it may hold tensors that nobody sees."""
        return self.shape is None and self.value is not None and not isinstance(self.value, _PLAIN)


def shape_of(value: Any) -> Shape | None:
    """The shape of a tensor or array, [length] of a list of plain values, None of anything else."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return tuple(value.shape)
    return (len(value),) if isinstance(value, (list, tuple)) else None


def flatten(batch: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a batch and its structure; a list of plain values (strings, numbers) is one leaf."""
    return pytree.tree_flatten(_as_dicts(batch), is_leaf=_is_rows)


def leaves_of(batch: Any) -> list[Leaf]:
    """The leaves with their keys, in the order of ``flatten``."""
    pairs, _ = pytree.tree_flatten_with_path(_as_dicts(batch), is_leaf=_is_rows)
    return [Leaf(tuple(_plain_key(key) for key in keys), value) for keys, value in pairs]


def _as_dicts(batch: Any) -> Any:
    """Mappings that pytrees do not know (a tokenizer's UserDict) become dicts, wherever they stand."""

    def plain(leaf: Any) -> Any:
        return _as_dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(plain, batch)


def lists_of(tree: Any, size: int, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """The lists below the top that have ``size`` parts, all tensors, all dicts or all lists; and which of these."""
    tree = tree if keys else _as_dicts(tree)
    if isinstance(tree, Mapping):
        children = list(tree.items())
    elif isinstance(tree, (list, tuple)) and not _is_rows(tree):
        children = list(enumerate(tree))
        for kind in (torch.Tensor, dict, list):
            if keys and len(tree) == size and type(tree) is list and all(isinstance(part, kind) for part in tree):
                yield keys, kind.__name__.lower()
    else:
        children = []
    for key, child in children:
        yield from lists_of(child, size, (*keys, key))


def _brackets(keys: Sequence[Any]) -> str:
    return "".join(f"[{key!r}]" for key in keys)


def _plain_key(key: Any) -> Any:
    """The dict key, index or attribute name in a pytree key."""
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return str(key)


def _is_rows(node: Any) -> bool:
    return isinstance(node, (list, tuple)) and len(node) > 0 and all(isinstance(row, _PLAIN) for row in node)
