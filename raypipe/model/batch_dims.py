"""Which dimension of which leaf of a batch counts its samples.

Dimension 0 of every tensor whose size there is the batch's, unless the sizes allow another reading: then the caller
must say. A wrong guess here is a wrong gradient, so nothing is guessed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raypipe.errors import BatchError
from raypipe.model.batch_tree import Leaf, Shape, leaves_of, lists_of

__all__ = ["leaf_dims"]


class _Auto(enum.Enum):
    """No word was said about a leaf (None says that it is shared)."""

    AUTO = enum.auto()


_AUTO = _Auto.AUTO


def leaf_dims(
    batch: Any, batch_dims: Any = None, known: Mapping[tuple[str, int | None], int | None] | None = None
) -> tuple[list[Leaf], list[int | None]]:
    """The leaves of a batch, and the batch dimension of each (None: every microbatch shares it whole).

    ``known`` gives it by path and number of dimensions, for leaves of which ``batch_dims`` says nothing.

    Raises:
        BatchError: it is uncertain, or ``batch_dims`` does not fit the batch.
    """
    leaves = leaves_of(batch)
    told = [
        (known or {}).get((leaf.path, None if leaf.shape is None else len(leaf.shape)), said) if said is _AUTO else said
        for leaf, said in zip(leaves, _told(leaves, batch_dims), strict=True)
    ]
    size = _batch_size(leaves, told)
    whole = [leaf.shape for leaf in leaves if isinstance(leaf.value, (torch.Tensor, np.ndarray))]
    dims = [_dim(leaf, said, size, whole) for leaf, said in zip(leaves, told, strict=True)]
    guessed = {leaf.keys for leaf, said, dim in zip(leaves, told, dims, strict=True) if said is _AUTO and dim is None}
    for keys, kind in lists_of(batch, size):
        if any(leaf_keys[: len(keys)] == keys for leaf_keys in guessed):
            raise BatchError(
                f"{Leaf(keys, None).path} is a list of {size} {kind}s, as many as the batch has samples, and lists of "
                f"{kind}s are not cut into microbatches: give one padded tensor or one flat list of strings, or say "
                f"{_hint(Leaf(keys, None), None)} where every microbatch shares it whole"
            )
    return leaves, dims


def _dim(leaf: Leaf, said: int | _Auto | None, size: int, whole: Sequence[Shape | None]) -> int | None:
    """One leaf's batch dimension in a batch of ``size`` samples."""
    if not isinstance(said, _Auto):
        return said
    shape = leaf.shape
    if shape is None:
        if leaf.is_opaque:
            raise _opaque(leaf)
        return None
    if isinstance(leaf.value, (list, tuple)):
        if shape[0] != size or all(isinstance(row, str) for row in leaf.value):
            return 0 if shape[0] == size else None
        raise _uncertain(leaf, size, 0, f"it is a {type(leaf.value).__name__} of as many plain values")
    if size not in shape:
        return None
    if shape[0] != size:
        dim = shape.index(size)
        raise _uncertain(leaf, size, dim, f"dimension {dim} has that size, dimension 0 has not")
    # Such as position_ids of shape [3, B, S] beside input_ids of shape [B, S] where B happens to be 3.
    if len(shape) > 1 and shape[1] == size and shape[1:] in whole:
        raise _uncertain(leaf, size, 1, "dimension 1 has that size too")
    return 0


def _batch_size(leaves: Sequence[Leaf], told: Sequence[int | _Auto | None]) -> int:
    """The number of samples: what ``batch_dims`` says, else the size that most tensors have in dimension 0."""
    sizes = {
        leaf.path: leaf.shape[d] for leaf, d in zip(leaves, told, strict=True) if isinstance(d, int) and leaf.shape
    }
    if len(set(sizes.values())) > 1:
        raise BatchError(f"batch_dims gives tensors of different numbers of samples: {_listed(sizes)}")
    if not sizes:
        free = [leaf for leaf, said in zip(leaves, told, strict=True) if said is _AUTO and leaf.shape]
        tensors = [leaf for leaf in free if not isinstance(leaf.value, (list, tuple))]
        tensors = [leaf for leaf in tensors if not leaf.is_listed] or tensors
        votes = Counter(leaf.shape[0] for leaf in tensors or free if leaf.shape).most_common()
        for leaf, said in zip(leaves, told, strict=True):
            if not votes and said is _AUTO and leaf.is_opaque:
                raise _opaque(leaf)
        if not votes:
            raise BatchError(
                "the batch has no tensor with a batch dimension: give a dict, a pair or another tree of tensors"
            )
        best = {size for size, count in votes if count == votes[0][1]}
        if len(best) > 1:
            claims = {leaf.path: leaf.shape[0] for leaf in tensors or free if leaf.shape and leaf.shape[0] in best}
            raise BatchError(
                f"the number of samples in the batch is uncertain, since dimension 0 has different sizes "
                f"({_listed(claims)}): say which dimension is the batch, such as {_hint(free[0], 0)}"
            )
        sizes = {"": votes[0][0]}
    size = next(iter(sizes.values()))
    if size < 1:
        raise BatchError("the batch has no samples, but a step needs at least one")
    return size


def _told(leaves: Sequence[Leaf], batch_dims: Any) -> list[int | _Auto | None]:
    """What ``batch_dims`` says of each leaf."""
    used: set[tuple[Any, ...]] = set()
    told = [_lookup(leaf, batch_dims, used) if batch_dims is not None else _AUTO for leaf in leaves]
    for keys in _named(batch_dims):
        if keys not in used:
            raise BatchError(
                f"batch_dims names {keys[-1]!r}, which is not in the batch, which has "
                f"{', '.join(leaf.path for leaf in leaves)}"
            )
    return told


def _lookup(leaf: Leaf, node: Any, used: set[tuple[Any, ...]]) -> int | _Auto | None:
    """Follows a leaf's keys through ``batch_dims``; a number or None above the leaf holds for all that is below."""
    for depth, key in enumerate(leaf.keys):
        if isinstance(node, Mapping):
            if key not in node:
                return _AUTO
            node = node[key]
        elif isinstance(node, (list, tuple)):
            if not isinstance(key, int) or key >= len(node):
                raise BatchError(f"batch_dims has a {type(node).__name__} where the batch has none: see {leaf.path}")
            node = node[key]
        used.add(leaf.keys[: depth + 1])
    if isinstance(node, Mapping) and not node:
        return _AUTO
    if node is None or leaf.value is None:
        return None
    shape = leaf.shape
    if not isinstance(node, int) or isinstance(node, bool):
        raise BatchError(f"batch_dims says {node!r} of {leaf.path}, but must give a dimension or None for each leaf")
    if shape is None or not -len(shape) <= node < len(shape):
        raise BatchError(
            f"batch_dims says {node} of {leaf.path}, which has {f'shape {list(shape)}' if shape else 'none'}"
        )
    return node % len(shape)


def _named(node: Any, keys: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The keys of every entry of ``batch_dims`` that is a dict's."""
    if isinstance(node, Mapping):
        return [path for key, below in node.items() for path in ((*keys, key), *_named(below, (*keys, key)))]
    if isinstance(node, (list, tuple)):
        return [path for index, below in enumerate(node) for path in _named(below, (*keys, index))]
    return []


def _uncertain(leaf: Leaf, size: int, dim: int, why: str) -> BatchError:
    dims = [d for d, length in enumerate(leaf.shape or ()) if length == size and d != dim]
    others = "".join(f"{d} or " for d in dims)
    return BatchError(
        f"the batch dimension of {leaf.path}, of shape {list(leaf.shape or ())}, is uncertain in a batch of {size} "
        f"samples ({why}): give {_hint(leaf, dim)}, with {others}None instead of {dim} if that is right (None: every "
        "microbatch shares it whole)"
    )


def _opaque(leaf: Leaf) -> BatchError:
    kind = type(leaf.value).__name__
    register = f"register {kind} with torch.utils._pytree.register_dataclass in the module that defines it"
    return BatchError(
        f"{leaf.path} is a {kind}, which cannot be cut into microbatches: give tensors, "
        + (f"{register}, " if dataclasses.is_dataclass(leaf.value) else "")
        + f"or {_hint(leaf, None)} where every microbatch shares it whole"
    )


def _hint(leaf: Leaf, dim: int | None) -> str:
    text = repr(dim)
    for key in reversed(leaf.keys):
        text = f"{{{key!r}: {text}}}"
    return f"batch_dims={text}"


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{path} {size}" for path, size in sizes.items())
