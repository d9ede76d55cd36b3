"""The whole numbers that a unit is given by the batch: lengths, masks, positions.

Inside a unit all is fake, but code there may ask such a tensor for its data (the lengths of packed sequences). What is
made of the batch's whole numbers alone is computed beside the fakes, so that it can be answered as the batch has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["Known"]

_MOST = 1 << 16
"""Elements of a tensor that is followed: masks of attention may be large, and nobody asks them."""


class Known:
    """Real data for some fakes, during one call of a unit."""

    def __init__(self) -> None:
        self._real: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # known by address: none may be freed meanwhile

    def tell(self, fake: Tensor, real: Tensor) -> None:
        """``fake`` stands for ``real``, which depends on no value."""
        if _followed(real):
            with _disable_current_modes():
                self._note(fake, real.detach().clone())

    def of(self, fake: Tensor, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
        """The real data, a copy of its own; or what ``otherwise`` makes."""
        real = self._real.get(id(fake))
        return otherwise(fake) if real is None else real.clone()

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """A kernel ran on fakes and gave ``result``; runs it on the real data too, where that is known of all."""
        if not self._real:
            return
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [id(tensor) in self._real for tensor in tensors]
        changes = func._schema.is_mutable
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if not all(known) or random or not made or not all(map(_followed, made)):
            if changes and self._writes_known(func, args, kwargs):  # of what shares memory nothing is known any more
                self._real.clear()
            return
        with _disable_current_modes():
            own = pytree.tree_map_only(FakeTensor, lambda fake: self._real[id(fake)], (args, kwargs))
            found = [leaf for leaf in pytree.tree_leaves(func(*own[0], **own[1])) if isinstance(leaf, Tensor)]
            for fake, real in zip(made, found, strict=True):
                self._note(fake, real)

    def _writes_known(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the kernel changes memory of which something is known; its indices may be known and stay so."""
        given = {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        memory = {fake.untyped_storage()._cdata for fake in self._kept[::2]}
        return any(t.untyped_storage()._cdata in memory for t in pytree.tree_leaves(written) if isinstance(t, Tensor))

    def _note(self, fake: Tensor, real: Tensor) -> None:
        self._real[id(fake)] = real
        self._kept += (fake, real)


def _followed(tensor: Tensor) -> bool:
    return not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.numel() <= _MOST
