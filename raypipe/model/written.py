"""Real tensors that a value was written into: buffers of zeros, masks that a unit changes in place.

Plain code made them, so they are real; from then on one stage alone knows what they hold, and a fake stands for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model import refusals

__all__ = ["Written"]

T = TypeVar("T")


class Written:
    """The tensors of one recording that were written into.

    Args:
        buffers: names of the model's buffers, by id.
    """

    def __init__(self, buffers: Mapping[int, str]) -> None:
        self._buffers = buffers
        self._fakes: dict[int, Tensor] = {}
        self._memory: set[int] = set()
        self._kept: list[Tensor] = []  # known by address: none may be freed meanwhile

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._fakes

    def add(self, tensor: Tensor, fake: Tensor, name: str, line: str) -> None:
        """The event ``name`` writes a value into ``tensor``.

        Raises:
            CutError: other tensors show the same memory, or it is a buffer of the model.
        """
        if tensor._base is not None:
            refusals.changes_view(name, line)
        if id(tensor) in self._buffers:
            refusals.changes_buffer(self._buffers[id(tensor)], name, line)
        self._fakes[id(tensor)] = fake
        self._memory.add(tensor.untyped_storage()._cdata)
        self._kept.append(tensor)

    def shows(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` shows memory that a value was written into."""
        return bool(self._memory) and tensor.untyped_storage()._cdata in self._memory

    def fake_of(self, tensor: Tensor) -> Tensor:
        """The fake that stands for ``tensor``, or itself."""
        return self._fakes.get(id(tensor), tensor)

    def faked(self, tree: T) -> T:
        """``tree`` with those fakes in it."""
        if not self._fakes:
            return tree
        made: Any = pytree.tree_map_only(Tensor, self.fake_of, tree)
        return made  # type: ignore[no-any-return]
