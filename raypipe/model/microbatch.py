"""Cutting a batch, which may be any pytree, into microbatches.

The layout says which dimension of which leaf counts the samples. It is found on the first batch; cutting is then a
view of each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from raypipe.errors import BatchError
from raypipe.model.batch_dims import leaf_dims
from raypipe.model.batch_tree import flatten, shape_of

__all__ = ["BatchLayout", "LayoutCache", "Microbatch", "find_layout"]


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A piece of a batch.

    Attributes:
        batch: of the batch's own structure; its tensors are views of the batch's.
        first_sample: number of its first sample within the batch, from 0.
        samples: how many it has.
    """

    batch: Any
    first_sample: int
    samples: int


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Which dimension of which leaf is the batch. Picklable; it holds no tensors.

    Attributes:
        structure: the batch's tree.
        paths: each leaf's place, in words.
        dims: each leaf's batch dimension, or None for one that every microbatch shares whole.
        ranks: each leaf's number of dimensions, or None for one that is no tensor (a list of strings has 1).
    """

    structure: pytree.TreeSpec
    paths: tuple[str, ...]
    dims: tuple[int | None, ...]
    ranks: tuple[int | None, ...]

    def samples(self, batch: Any) -> int:
        """The number of samples in a batch.

        Raises:
            BatchError: the batch is not of this layout, its tensors disagree, or it has no sample.
        """
        return self._size(self._leaves(batch))

    def split(self, batch: Any, count: int) -> list[Microbatch]:
        """Cuts a batch into ``count`` microbatches, or one for each sample where it has fewer.

        Their sizes differ by one at most, the larger first, as in ``torch.tensor_split``.

        Raises:
            BatchError: as ``samples`` does.
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"microbatches is {count}, but a batch is cut into at least one")
        leaves = self._leaves(batch)
        samples = self._size(leaves)
        count = min(count, samples)
        small, larger = divmod(samples, count)
        pieces, first = [], 0
        for number in range(count):
            size = small + (number < larger)
            cut = [_cut(leaf, dim, first, size) for leaf, dim in zip(leaves, self.dims, strict=True)]
            pieces.append(Microbatch(pytree.tree_unflatten(cut, self.structure), first, size))
            first += size
        return pieces

    def select(self, batch: Any, samples: Sequence[int]) -> Any:
        """A batch of these samples, in this order; a sample may come twice. Its batched tensors are copies."""
        leaves = self._leaves(batch)
        chosen = [_pick(leaf, dim, samples) for leaf, dim in zip(leaves, self.dims, strict=True)]
        return pytree.tree_unflatten(chosen, self.structure)

    def batched(self, batch: Any) -> list[tuple[Any, int]]:
        """Every leaf that has a batch dimension, and that dimension."""
        return [(leaf, dim) for leaf, dim in zip(self._leaves(batch), self.dims, strict=True) if dim is not None]

    def fits(self, batch: Any) -> bool:
        """Whether a batch is of this layout."""
        try:
            self.samples(batch)
        except BatchError:
            return False
        return True

    def __reduce__(self) -> tuple[Any, ...]:
        # A TreeSpec does not unpickle without a warning; a tree without values does.
        tree = pytree.tree_unflatten([None] * len(self.dims), self.structure)
        return _rebuild, (tree, self.paths, self.dims, self.ranks)

    def _leaves(self, batch: Any) -> list[Any]:
        leaves, structure = flatten(batch)
        if structure != self.structure:
            raise BatchError(
                f"the batch is built differently from the first one, whose tensors are {', '.join(self.paths)}: "
                "every batch of a source must have the same keys and nesting"
            )
        for leaf, path, rank in zip(leaves, self.paths, self.ranks, strict=True):
            shape = shape_of(leaf)
            if (None if shape is None else len(shape)) != rank:
                raise BatchError(
                    f"{path} {_ranked(None if shape is None else len(shape))} in this batch, but it {_ranked(rank)} "
                    "in the batch whose layout this is: find a layout for each kind of batch"
                )
        return leaves

    def _size(self, leaves: Sequence[Any]) -> int:
        samples, source = None, ""
        for leaf, dim, path in zip(leaves, self.dims, self.paths, strict=True):
            if dim is None:
                continue
            size = len(leaf) if dim == 0 else leaf.shape[dim]
            if samples is None:
                samples, source = size, path
            elif size != samples:
                raise BatchError(
                    f"{path} has {size} samples in dimension {dim}, but {source} has {samples}: they must be equal, "
                    "or batch_dims must say None of the one that every microbatch shares whole"
                )
        if not samples:
            raise BatchError("the batch has no samples, but a step needs at least one")
        return int(samples)


class LayoutCache:
    """The layouts of a source's batches, found once for each kind of batch.

    The first layout travels to every rank, so that none depends on the batches that a rank happened to see first; what
    it says of a tensor also holds in batches of another kind (a mask that is None in one and a tensor in the next).
    """

    def __init__(self, first: BatchLayout, batch_dims: Any = None) -> None:
        self._layouts = [first]
        self._batch_dims = batch_dims

    def find(self, batch: Any) -> BatchLayout:
        """The layout of this batch.

        Raises:
            BatchError: it is uncertain.
        """
        for layout in self._layouts:
            if layout.fits(batch):
                return layout
        layout = find_layout(batch, self._batch_dims, known=self._layouts[0])
        self._layouts.append(layout)
        return layout


def find_layout(batch: Any, batch_dims: Any = None, *, known: BatchLayout | None = None) -> BatchLayout:
    """Finds which dimension of which tensor is the batch.

    That is dimension 0 of every tensor whose size there is the batch's; tensors in which no dimension has that size,
    numbers and None are shared whole. A list of strings, one for each sample, is cut too.

    Args:
        batch: any pytree of tensors or numpy arrays.
        batch_dims: a dimension or None (shared whole) for some or all leaves: a pytree like the batch, or dicts of
            names (an index, for the parts of a pair) that lead to them.
        known: the layout of an earlier batch; what it says of a tensor of as many dimensions is taken over.

    Raises:
        BatchError: a tensor's batch dimension is uncertain, or ``batch_dims`` does not fit the batch.
    """
    leaves, dims = leaf_dims(batch, batch_dims, _known_dims(known))
    _, structure = flatten(batch)
    ranks = tuple(None if leaf.shape is None else len(leaf.shape) for leaf in leaves)
    layout = BatchLayout(structure, tuple(leaf.path for leaf in leaves), tuple(dims), ranks)
    layout.samples(batch)
    return layout


def _rebuild(
    tree: Any, paths: tuple[str, ...], dims: tuple[int | None, ...], ranks: tuple[int | None, ...]
) -> BatchLayout:
    return BatchLayout(flatten(tree)[1], paths, dims, ranks)


def _known_dims(known: BatchLayout | None) -> dict[tuple[str, int | None], int | None]:
    if known is None:
        return {}
    kinds = zip(known.paths, known.ranks, known.dims, strict=True)
    return {(path, rank): dim for path, rank, dim in kinds if rank}


def _cut(leaf: Any, dim: int | None, first: int, size: int) -> Any:
    if dim is None:  # a copy: what one microbatch writes into it, the next must not see
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf
    if isinstance(leaf, torch.Tensor):
        # Views of one tensor count their changes together, and autograd would take a change in one microbatch for a
        # change in all of them; .data counts by itself.
        return leaf.narrow(dim, first, size).data
    return leaf[(*[slice(None)] * dim, slice(first, first + size))] if dim else leaf[first : first + size]


def _pick(leaf: Any, dim: int | None, samples: Sequence[int]) -> Any:
    if dim is None:
        return leaf
    if isinstance(leaf, torch.Tensor):
        return leaf.index_select(dim, torch.tensor(samples, device=leaf.device))
    return np.take(leaf, samples, axis=dim) if isinstance(leaf, np.ndarray) else [leaf[i] for i in samples]


def _ranked(rank: int | None) -> str:
    return "is no tensor" if rank is None else f"has {rank} dimensions"
