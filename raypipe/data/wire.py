"""Batches in a form that an object store shares between processes: tensors as NumPy arrays.

What comes out of the store is memory that other processes read too, sometimes writable. So ``unpack`` always copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils import _pytree as pytree

__all__ = ["Wire", "pack", "unpack"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The dtype whose values carry the bits of a dtype that NumPy lacks, by size in bytes."""


@dataclass(frozen=True, slots=True, eq=False)
class _Array:
    """A tensor: its values (or bits, where NumPy lacks its dtype), and what an array does not tell.

    ``stride`` is None where it is contiguous.
    """

    values: numpy.ndarray[Any, Any]
    dtype: torch.dtype
    stride: tuple[int, ...] | None
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Wire:
    """A packed batch. It pickles; its arrays go out of band with pickle's protocol 5.

    Attributes:
        leaves: tensors' arrays, and everything else as it was.
        nodes: the structure around them.
    """

    leaves: tuple[Any, ...]
    nodes: Any

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        arrays = {id(leaf): leaf.values.nbytes for leaf in self.leaves if isinstance(leaf, _Array)}
        return sum(arrays.values())


def pack(tree: Any) -> Wire:
    """A batch with NumPy arrays for tensors.

    Dense tensors and numeric arrays are taken without a copy where their memory allows it, so put the result away
    before the batch changes. Mappings that are no pytree (a tokenizer's output) become plain dicts. Everything else,
    sparse tensors and tensor subclasses too, stays as it is.

    Args:
        tree: any pytree.
    """
    leaves, spec = pytree.tree_flatten(pytree.tree_map(_plain, tree))
    # The same object twice (labels that are the inputs) stays one.
    packed = {id(leaf): _pack_leaf(leaf) for leaf in leaves}
    return Wire(tuple(packed[id(leaf)] for leaf in leaves), _nodes(spec))


def unpack(wire: Wire) -> Any:
    """The batch again, with CPU tensors in memory of their own.

    Tensors have the dtype, shape, strides and ``requires_grad`` that they were packed with; NumPy arrays have become
    tensors.

    Raises:
        TypeError: the batch holds a class that was registered as a pytree where it was packed, but not here.
    """
    unpacked = {id(leaf): _unpack_leaf(leaf) for leaf in wire.leaves}
    return pytree.tree_unflatten([unpacked[id(leaf)] for leaf in wire.leaves], _spec(wire.nodes))


def _nodes(spec: pytree.TreeSpec) -> Any:
    """A tree's structure as plain tuples, because unpickling PyTorch's own warns; None is a leaf."""
    return None if spec.is_leaf() else (spec.type, spec.context, tuple(map(_nodes, spec.children())))


def _spec(nodes: Any) -> pytree.TreeSpec:
    if nodes is None:
        return pytree.tree_structure(0)
    kind, context, children = nodes
    if kind not in pytree.SUPPORTED_NODES:
        raise TypeError(
            f"a batch holds a {kind.__qualname__}, which is no pytree in this process: register it in the module that "
            "defines it, so that every process that imports the class knows it"
        )
    return pytree.TreeSpec(kind, context, [_spec(child) for child in children])


def _plain(leaf: Any) -> Any:
    if isinstance(leaf, Mapping):
        return pytree.tree_map(_plain, dict(leaf))
    return leaf


def _pack_leaf(leaf: Any) -> Any:
    if isinstance(leaf, numpy.ndarray):
        return _pack_array(leaf)
    if type(leaf) not in (torch.Tensor, torch.nn.Parameter):
        return leaf
    if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
        return leaf
    values = leaf.detach().cpu().resolve_conj().resolve_neg()
    try:
        array = values.numpy()
    except TypeError:
        array = values.view(_BITS[values.dtype.itemsize]).numpy()
    # Strides of a dense layout (channels last) are kept, since kernels choose by them; gaps and overlaps are not.
    stride = None if values.is_contiguous() else torch.empty_like(values, device="meta").stride()
    return _Array(array, leaf.dtype, stride, leaf.requires_grad)


def _pack_array(array: numpy.ndarray[Any, Any]) -> Any:
    """A numeric array as a tensor's; text, objects, dates and what else PyTorch lacks stay as they are."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False) if array.dtype.kind in "iufc" else array
    try:
        dtype = torch.from_numpy(numpy.empty(0, native.dtype)).dtype
    except TypeError:
        return array
    return _Array(native, dtype, None, requires_grad=False)


def _unpack_leaf(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    if not isinstance(leaf, _Array):
        return leaf.copy() if isinstance(leaf, numpy.ndarray) else leaf
    shape = leaf.values.shape
    if leaf.stride is None:
        tensor = torch.empty(shape, dtype=leaf.dtype)
    else:
        tensor = torch.empty_strided(shape, leaf.stride, dtype=leaf.dtype)
    try:
        target = tensor.numpy()
    except TypeError:
        target = tensor.view(_BITS[leaf.dtype.itemsize]).numpy()
    numpy.copyto(target, leaf.values)
    return tensor.requires_grad_(leaf.requires_grad)
