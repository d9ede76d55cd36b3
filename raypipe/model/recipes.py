"""How a tensor is made, as data: the operations that it depends on, with a seed for each that draws.

A recipe is pickled and made on whichever rank holds the tensor. Tensors stand in it as views of numbered memories, so
aliases, in-place changes and ties need no care of their own: a memory is made by replaying what wrote to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes  # no public way to run below the modes in force

__all__ = ["Constant", "Recipe", "Step", "View", "seed_of", "undisturbed"]


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of a numbered memory."""

    memory: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """A tensor that came into the model ready-made."""

    value: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation.

    Attributes:
        name: of the operation, with its overload.
        args: positional arguments, with ``View`` or ``Constant`` for tensors.
        kwargs: by name, likewise.
        outputs: views that its results are, in the order of their leaves; None where one is no tensor.
        makes: memories that begin here.
        writes: memories that it changes.
        reads: memories that it depends on, those that it changes too where their old values matter.
        seed: of what it draws, or None.
    """

    name: tuple[str, str, str]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[View | None, ...]
    makes: frozenset[int]
    writes: frozenset[int]
    reads: frozenset[int]
    seed: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """What makes one tensor: ``steps`` in order, then ``target``."""

    steps: tuple[Step, ...]
    target: View | Constant

    def make(self) -> Tensor:
        """The tensor, in memory of its own. The same bits in every process; random states stay as they are."""
        if isinstance(self.target, Constant):
            return self.target.value.clone()
        last = {memory: number for number, step in enumerate(self.steps) for memory in step.reads | step.writes}
        memories: dict[int, torch.UntypedStorage] = {}
        with undisturbed():
            for number, step in enumerate(self.steps):
                _run(step, memories)
                for memory in [m for m in memories if last.get(m, -1) <= number and m != self.target.memory]:
                    del memories[memory]
            made = _shown(self.target, memories)
            whole = made.numel() * made.element_size() == made.untyped_storage().nbytes()
            return made if whole else made.clone()


def seed_of(seed: int, number: int) -> int:
    """The seed of the ``number``-th operation that draws: a hash, so that neighbours have nothing in common."""
    digest = hashlib.blake2b(f"raypipe {seed} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def undisturbed() -> Iterator[None]:
    """Below all modes, without gradients, on one thread (their number changes a QR); the generator is put back."""
    threads, state = torch.get_num_threads(), torch.default_generator.get_state()
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.default_generator.set_state(state)


def _run(step: Step, memories: dict[int, torch.UntypedStorage]) -> None:
    if step.seed is not None:
        torch.default_generator.manual_seed(step.seed)
    args, kwargs = pytree.tree_map_only(
        (View, Constant), lambda leaf: _shown(leaf, memories), (step.args, dict(step.kwargs))
    )
    namespace, packet, overload = step.name
    result = getattr(getattr(getattr(torch.ops, namespace), packet), overload)(*args, **kwargs)
    for leaf, view in zip(pytree.tree_leaves(result), step.outputs, strict=True):
        if view is None or view.memory not in step.makes or view.memory in memories:
            continue
        if tuple(leaf.stride()) != view.stride or leaf.storage_offset() != view.offset:
            leaf = leaf.new_empty(0).set_(_laid_out(leaf, view), view.offset, view.shape, view.stride)
        if packet.startswith(("empty", "new_empty")):
            leaf.zero_()  # what is never written would be another thing in each process
        memories[view.memory] = leaf.untyped_storage()


def _laid_out(tensor: Tensor, view: View) -> torch.UntypedStorage:
    """A memory in which the tensor lies with the strides that it was planned with."""
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.shape, view.stride, strict=True))
    memory = tensor.new_zeros(last + 1)
    memory.as_strided(view.shape, view.stride, view.offset).copy_(tensor)
    return memory.untyped_storage()


def _shown(leaf: View | Constant, memories: Mapping[int, torch.UntypedStorage]) -> Tensor:
    if isinstance(leaf, Constant):
        return leaf.value.clone()
    return torch.empty(0, dtype=leaf.dtype).set_(memories[leaf.memory], leaf.offset, leaf.shape, leaf.stride)
