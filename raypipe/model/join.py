"""Joining the outputs of a batch's microbatches into the outputs of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError

__all__ = ["join_outputs"]


def join_outputs(outputs: Sequence[Any], samples: Sequence[int]) -> Any:
    """The outputs of a batch from those of its microbatches, in order; one microbatch's come back as they are.

    - Tensors whose dimension 0 counts the microbatch's samples, in every microbatch, are concatenated.
    - Other tensors and values that are equal in all microbatches are kept once.
    - Scalars that differ (a loss) are stacked, one for each microbatch: shape [microbatches]. How they would combine
      is not known here, so they are not combined.
    - Other values that differ (a cache object) become a list with one for each microbatch.

    Args:
        outputs: one pytree for each microbatch, all of one structure.
        samples: the number of samples of each.

    Raises:
        BatchError: a tensor is neither one row for each sample nor equal in all, rows have different shapes, or the
            microbatches' outputs are built differently.
    """
    if len(outputs) != len(samples) or not outputs:
        raise ValueError(f"{len(outputs)} outputs and {len(samples)} numbers of samples, but there is one each or more")
    if len(outputs) == 1:
        return outputs[0]
    flat = [pytree.tree_flatten_with_path(output) for output in outputs]
    structure = flat[0][1]
    if any(other != structure for _, other in flat[1:]):
        raise BatchError(
            "the outputs of the microbatches are built differently, so they cannot be joined: "
            "let forward(model, batch) return the same keys for every microbatch, or use microbatches=1"
        )
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [
        _join(f"outputs{pytree.keystr(column[0][0])}", [leaf for _, leaf in column], samples) for column in columns
    ]
    return pytree.tree_unflatten(joined, structure)


def _join(path: str, leaves: list[Any], samples: Sequence[int]) -> Any:
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return leaves[0] if all(_same(leaf, leaves[0]) for leaf in leaves[1:]) else leaves
    if all(leaf.dim() and leaf.shape[0] == size for leaf, size in zip(leaves, samples, strict=True)):
        if any(leaf.shape[1:] != leaves[0].shape[1:] for leaf in leaves):
            raise BatchError(
                f"{path} has shapes {_shapes(leaves)} in the microbatches, which cannot be concatenated: "
                "pad it to one shape in forward(model, batch), or use microbatches=1"
            )
        return torch.cat(leaves)
    if all(leaf.shape == leaves[0].shape for leaf in leaves):
        if all(torch.equal(leaf, leaves[0]) for leaf in leaves[1:]):
            return leaves[0]
        if leaves[0].dim() == 0:
            return torch.stack(leaves)
    raise BatchError(
        f"{path} has shapes {_shapes(leaves)} in microbatches of {', '.join(map(str, samples))} samples, so its "
        "dimension 0 is not the batch and it cannot be joined: let forward(model, batch) return the batch in "
        "dimension 0, or use microbatches=1"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same; of unknown types only the same object is, since == may mean anything there."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, (bool, int, float, complex, str, bytes)) and one == other


def _shapes(leaves: list[Any]) -> str:
    return ", ".join(str(list(leaf.shape)) for leaf in leaves)
