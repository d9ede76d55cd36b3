"""Joining the outputs of a batch's microbatches into the outputs of the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError

__all__ = ["join_outputs", "shapes_of"]


def join_outputs(
    outputs: Sequence[Any], samples: Sequence[int], grown: Sequence[frozenset[int] | None] | None = None
) -> Any:
    """The outputs of a batch from those of its microbatches, in order; one microbatch's come back as they are.

    - Tensors are concatenated along the dimension that counts the samples.
    - Tensors without one, and other values, that are equal in all microbatches are kept once.
    - Scalars that differ (a loss) are stacked, one for each microbatch: shape [microbatches]. How they would combine
      is not known here, so they are not combined.
    - Dataclasses are joined field by field.
    - Other values that differ (a cache object) become a list with one for each microbatch.

    Args:
        outputs: one pytree for each microbatch, all of one structure.
        samples: the number of samples of each.
        grown: the dimensions that grow with the samples, of each leaf as ``shapes_of`` has them; None, of one or of
            all: the one whose sizes are the samples.

    Raises:
        BatchError: a tensor's samples are in no dimension or in several and it is not equal in all, rows have different
            shapes, or the microbatches' outputs are built differently.
    """
    if len(outputs) != len(samples) or not outputs:
        raise ValueError(f"{len(outputs)} outputs and {len(samples)} numbers of samples, but there is one each or more")
    if len(outputs) == 1:
        return outputs[0]
    flat = [pytree.tree_flatten_with_path(_opened(output)) for output in outputs]
    structure = flat[0][1]
    if any(other != structure for _, other in flat[1:]):
        raise BatchError(
            "the outputs of the microbatches are built differently, so they cannot be joined: "
            "let forward(model, batch) return the same keys for every microbatch, or use microbatches=1"
        )
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    joined = [
        _join(f"outputs{pytree.keystr(column[0][0])}", [leaf for _, leaf in column], samples, dims)
        for column, dims in zip(columns, grown or [None] * len(columns), strict=True)
    ]
    return _closed(pytree.tree_unflatten(joined, structure), outputs[0])


def shapes_of(outputs: Any) -> list[tuple[int, ...] | None]:
    """The shape of each leaf, fields of dataclasses among them; None where it is no tensor."""
    leaves = pytree.tree_leaves(_opened(outputs))
    return [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in leaves]


def _join(path: str, leaves: list[Any], samples: Sequence[int], grown: frozenset[int] | None) -> Any:
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return leaves[0] if all(_same(leaf, leaves[0]) for leaf in leaves[1:]) else leaves
    dims = _sample_dims(leaves, samples)
    if grown is not None:
        dims = [dim for dim in dims if grown <= {dim} and dim in grown]
    if len(dims) == 1:
        rest = {(*leaf.shape[: dims[0]], *leaf.shape[dims[0] + 1 :]) for leaf in leaves}
        if len(rest) > 1:
            raise BatchError(
                f"{path} has shapes {_shapes(leaves)} in the microbatches, which cannot be concatenated: "
                "pad it to one shape in forward(model, batch), or use microbatches=1"
            )
        return torch.cat(leaves, dims[0])
    if not grown and not dims and all(leaf.shape == leaves[0].shape for leaf in leaves):
        if all(torch.equal(leaf, leaves[0]) for leaf in leaves[1:]):
            return leaves[0]
        if leaves[0].dim() == 0:
            return torch.stack(leaves)
    raise BatchError(
        f"{path} has shapes {_shapes(leaves)} in microbatches of {', '.join(map(str, samples))} samples, so it is not "
        "one row for each sample in one dimension, nor equal in all, and cannot be joined: let forward(model, batch) "
        "return the batch in one dimension, or use microbatches=1"
    )


def _sample_dims(leaves: Sequence[torch.Tensor], samples: Sequence[int]) -> list[int]:
    """The dimensions whose sizes are the samples; where sizes of samples differ, no other dimension should."""
    dims = range(min(leaf.dim() for leaf in leaves))
    return [dim for dim in dims if all(leaf.shape[dim] == size for leaf, size in zip(leaves, samples, strict=True))]


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same; of unknown types only the same object is, since == may mean anything there."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, (bool, int, float, complex, str, bytes)) and one == other


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _opened(tree: Any) -> Any:
    """A tree with dicts in the place of dataclasses that are no pytrees."""

    def fields_of(leaf: Any) -> Any:
        if not _is_record(leaf):
            return leaf
        return {field.name: _opened(getattr(leaf, field.name)) for field in dataclasses.fields(leaf)}

    return pytree.tree_map(fields_of, tree)


def _closed(joined: Any, like: Any) -> Any:
    """What was opened, as dataclasses again."""
    leaves, structure = pytree.tree_flatten(like)
    parts = structure.flatten_up_to(joined)
    for number, (leaf, part) in enumerate(zip(leaves, parts, strict=True)):
        if _is_record(leaf):
            parts[number] = copy.copy(leaf)
            for name, value in part.items():
                object.__setattr__(parts[number], name, _closed(value, getattr(leaf, name)))
    return pytree.tree_unflatten(parts, structure)


def _shapes(leaves: list[Any]) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in leaves)
