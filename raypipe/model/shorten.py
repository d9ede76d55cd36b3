"""Samples that tell rules of weights apart: those that differ in length, and some whose last one is cut short.

Only values are used that such a leaf may hold anyway (zero is a valid token, class and mask; half a length is a
length), so that no index leaves its table. The exception is -100 in labels, tried on the CPU alone: on a GPU a model
that looks labels up in a table would end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model.batch_tree import flatten
from raypipe.model.microbatch import BatchLayout

__all__ = ["shortened", "telling_samples"]


def shortened(batch: Any, layout: BatchLayout) -> Iterator[Any]:
    """Yields copies of ``batch``: masks cut short, all numbers cut short, labels ignored in part."""
    for cut in (_mask, _numbers, _labels):
        changed = _changed(batch, layout, cut)
        if changed is not None:
            yield changed


def _mask(path: str, sample: Tensor) -> Tensor | None:
    """A mask's second half becomes 0."""
    is_mask = sample.dtype is torch.bool or bool(((sample == 0) | (sample == 1)).all())
    return _tail(sample, 0) if is_mask else None


def _numbers(path: str, sample: Tensor) -> Tensor | None:
    """The second half of token ids becomes 0; a single number (a length, a weight) is halved."""
    if sample.dtype is torch.bool:
        return None
    if sample.dim() == 0:
        return sample / 2 if sample.is_floating_point() else sample // 2
    return None if sample.is_floating_point() else _tail(sample, 0)


def _labels(path: str, sample: Tensor) -> Tensor | None:
    """The second half of labels is ignored, as cross-entropy understands it."""
    named = "label" in path.lower() or "target" in path.lower() or path.startswith("[1]")
    signed = sample.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    return _tail(sample, -100) if named and signed and not sample.is_cuda else None


def _changed(batch: Any, layout: BatchLayout, cut: Callable[[str, Tensor], Tensor | None]) -> Any | None:
    """The batch with its last sample's leaves as ``cut`` makes them; None where that changes nothing."""
    leaves, structure = flatten(batch)
    any_change = False
    for number, (leaf, dim, path) in enumerate(zip(leaves, layout.dims, layout.paths, strict=True)):
        if dim is None or not isinstance(leaf, (torch.Tensor)) or leaf.is_complex():
            continue
        new = cut(path, leaf.select(dim, -1))
        if new is not None and not torch.equal(new, leaf.select(dim, -1)):
            leaves[number] = leaf.clone()
            leaves[number].select(dim, -1).copy_(new)
            any_change = True
    return pytree.tree_unflatten(leaves, structure) if any_change else None


def _tail(sample: Tensor, value: int) -> Tensor | None:
    """A copy whose last dimension is ``value`` from the middle on; None for a number and for less than two entries."""
    if sample.dim() == 0 or sample.shape[-1] < 2:
        return None
    copy = sample.clone()
    copy[..., sample.shape[-1] // 2 :] = value
    return copy


def telling_samples(batch: Any, layout: BatchLayout) -> list[int]:
    """Two full samples and one that is short, by the entries of masks and labels that are neither 0 nor -100."""
    count = layout.samples(batch)
    score, empty = torch.zeros(count), torch.zeros(count, dtype=torch.bool)
    for leaf, dim in layout.batched(batch):
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            leaf = torch.as_tensor(leaf)
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 2 or leaf.is_complex():
            continue
        filled = ((leaf != 0) & (leaf != -100)).movedim(dim, 0).reshape(count, -1).sum(1).cpu()
        if not torch.all(filled == filled[0]):
            score += filled / filled.max()
            empty |= filled == 0
    order = [i for i in torch.argsort(score, descending=True, stable=True).tolist() if not empty[i]]
    order = order or list(range(count))
    return [order[0], order[1 % len(order)], order[-1]]
