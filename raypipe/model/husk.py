"""Parameters that know what they are and hold nothing.

A stage holds the whole model's objects, but only its own weights. In the place of every other parameter stands a husk:
it knows shape, dtype and device, and raises on any use of its data. A copy of a module with some tensors replaced is
made by ``deepcopy`` with a prepared memo, which also reaches the references that ``nn.LSTM`` keeps in plain lists.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from raypipe.errors import CutError

__all__ = ["Husk", "husk_of", "names_of", "replace_tensors"]

M = TypeVar("M", bound=nn.Module)


class Husk(Tensor):
    """A tensor without storage that raises on any use of its data.

    Attributes: ``husk_name``, the name of the parameter or buffer in the unsplit model.
    """

    husk_name: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # Parameter(), .data and requires_grad_ ask for it; no data is read
            return husk_of(args[0], args[0].husk_name, is_parameter=False)
        names = [a.husk_name for a in args if isinstance(a, Husk)]
        raise CutError(
            f"{func} reads {', '.join(names) or 'a weight'}, which another stage holds: the model uses it outside of "
            "its own module in a way that was not seen when it was planned; name the modules that belong together in "
            "units=[...]"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = (tuple(self.shape), self.stride(), self.dtype, str(self.device), self.requires_grad)
        return _rebuild, (*state, self.husk_name, getattr(self, "_is_param", False))

    def __deepcopy__(self, memo: dict[int, Any]) -> Husk:
        return memo.setdefault(id(self), husk_of(self, self.husk_name, getattr(self, "_is_param", False)))  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Husk({self.husk_name}, shape={tuple(self.shape)}, dtype={self.dtype})"


def husk_of(tensor: Tensor, name: str, is_parameter: bool) -> Husk:
    """A husk with the shape, strides, dtype and device of ``tensor``."""
    return _rebuild(
        tuple(tensor.shape), tensor.stride(), tensor.dtype, str(tensor.device), tensor.requires_grad, name, is_parameter
    )


def _rebuild(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    requires_grad: bool,
    name: str,
    is_parameter: bool,
) -> Husk:
    husk: Husk = Tensor._make_wrapper_subclass(
        Husk, shape, strides=stride, dtype=dtype, device=torch.device(device), requires_grad=requires_grad
    )
    husk.husk_name = name
    if is_parameter:
        husk._is_param = True  # isinstance(husk, nn.Parameter) holds
    return husk


def names_of(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and buffers by their first name; one that has several names is there once."""
    return dict(model.named_parameters()), dict(model.named_buffers())


def replace_tensors(model: M, replacements: Mapping[int, Tensor]) -> M:
    """A copy of ``model`` in which the tensor with each ``id`` is replaced, wherever it is referred to.

    Everything else is copied, as ``copy.deepcopy`` does.
    """
    memo: dict[int, Any] = dict(replacements)
    return copy.deepcopy(model, memo)
