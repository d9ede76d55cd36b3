"""Which calls of torch functions have a weight whose gradient can be left for later, and what they are called with.

A weight is a trainable ``nn.Parameter``, or a view or cast of one (``weight.T``, a chunk of a packed bias). Everything
else that requires a gradient is an input, also where it was made of parameters (a parametrised weight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

__all__ = ["Operands", "find_operands", "is_view", "mark_views", "weights_of"]

_Places = tuple[tuple[int, str], ...]

_SPLIT: dict[Any, _Places] = {
    function: tuple((place, name) for name, place in places.items())
    for functions, places in (
        ((F.linear, F.embedding, F.conv1d, F.conv2d, F.conv3d), {"weight": 1}),
        ((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), {"weight": 1}),
        ((F.layer_norm, F.rms_norm, F.group_norm, torch.layer_norm, torch.rms_norm), {"weight": 2}),
        ((F.bilinear,), {"weight": 2}),
        ((torch.addmm, Tensor.addmm), {"mat1": 1, "mat2": 2}),
        ((torch.baddbmm, Tensor.baddbmm), {"batch1": 1, "batch2": 2}),
        ((torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__), {"input": 0, "other": 1}),
        ((torch.mm, torch.bmm, Tensor.mm, Tensor.bmm), {"input": 0, "mat2": 1}),
        ((torch._grouped_mm, F.grouped_mm), {"mat_b": 1}),
        ((torch.einsum, torch.functional.einsum), {"first": 1, "second": 2}),
    )
    for function in functions
}
"""Where the operands stand that must be weights for a call to be worth splitting: by place and by name."""

_VIEWS = frozenset(
    [
        *(getattr(Tensor, name) for name in ("t", "transpose", "permute", "view", "reshape", "flatten", "unsqueeze")),
        *(getattr(Tensor, name) for name in ("squeeze", "chunk", "split", "unbind", "select", "narrow", "expand")),
        *(getattr(Tensor, name) for name in ("to", "type", "float", "half", "bfloat16", "contiguous", "view_as")),
        *(getattr(torch, name) for name in ("t", "transpose", "permute", "reshape", "flatten", "unsqueeze", "squeeze")),
        *(getattr(torch, name) for name in ("chunk", "split", "unbind", "select", "narrow", "swapaxes")),
        *(getattr(Tensor, name).__get__ for name in ("T", "mT")),
    ]
)
"""They change shape or type and save no tensor, so their part of the graph can be run as often as needed."""


@dataclass(frozen=True, slots=True)
class Operands:
    """What a call that can be split is called with.

    Attributes: ``inputs``, (place or name, tensor) of the arguments that require a gradient and are no weights;
    ``parameters``, the leaves behind its weights, each once.
    """

    inputs: tuple[tuple[int | str, Tensor], ...]
    parameters: tuple[Tensor, ...]


def find_operands(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], places: _Places | None = None
) -> Operands | None:
    """What a call would be split into, or None where it stays whole.

    Whole stay calls without a trainable weight, weights with hooks (which would see their gradient at another time),
    an embedding that renormalises its weight, a group norm of channels last, and under autocast calls on a leaf.
    """
    places = _SPLIT.get(func) if places is None else places
    if places is None or all(_parameter_behind(_argument(args, kwargs, *place)) is None for place in places):
        return None
    if func in _EXCEPT and _EXCEPT[func](args, kwargs):
        return None
    inputs: list[tuple[int | str, Tensor]] = []
    parameters: dict[int, Tensor] = {}
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, argument in given:
        if isinstance(argument, Tensor):
            behind = _parameter_behind(argument)
            if behind is not None:
                parameters[id(behind)] = behind
            elif argument.requires_grad:
                if argument.is_leaf and _casts_once(argument):
                    return None
                inputs.append((place, argument))
        elif isinstance(argument, (list, tuple)) and any(isinstance(leaf, Tensor) for leaf in argument):
            return None
    return Operands(tuple(inputs), tuple(parameters.values()))


def weights_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The trainable parameters that are, or have a view, among the arguments of any function."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    return [found for tensor in tensors if (found := _behind(tensor)) is not None]


def is_view(func: Callable[..., Any]) -> bool:
    """Whether a function gives a view or a cast of its first argument, which is followed to where it is used."""
    return func in _VIEWS


def mark_views(func: Callable[..., Any], args: Sequence[Any], result: Any) -> None:
    """Notes on views and casts of a parameter whose they are."""
    if func in _VIEWS and args and isinstance(args[0], Tensor) and (found := _behind(args[0])) is not None:
        for view in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(view, Tensor) and view.requires_grad and not view.is_leaf:
                view._raypipe_weight = (found, view._version)  # type: ignore[attr-defined]


def _parameter_behind(argument: Any) -> Tensor | None:
    """The parameter that an argument is, or is a view of, if its gradient may wait."""
    found = _behind(argument) if isinstance(argument, Tensor) else None
    if found is None or found._backward_hooks or found._post_accumulate_grad_hooks or argument._backward_hooks:
        return None
    return found


def _behind(tensor: Tensor) -> Tensor | None:
    if isinstance(tensor, nn.Parameter):
        return tensor if tensor.requires_grad and tensor.is_leaf else None
    marked: tuple[Tensor, int] | None = getattr(tensor, "_raypipe_weight", None)
    # One that was changed in place since is made of more than the parameter.
    return marked[0] if marked is not None and marked[1] == tensor._version else None


def _casts_once(leaf: Tensor) -> bool:
    """Whether autocast casts a leaf for all of its users together, and so sums their gradients in the lower type."""
    return (
        torch.is_autocast_enabled(leaf.device.type)
        and torch.is_autocast_cache_enabled()
        and leaf.dtype is torch.float32
    )


def _renormalises(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return _argument(args, kwargs, 3, "max_norm") is not None


def _is_channels_last(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the input may be taken for one; PyTorch 2.13 on a CPU crashes where only its weights' gradients are asked
    for."""
    x: Tensor = _argument(args, kwargs, 0, "input")
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


_EXCEPT: dict[Any, Callable[..., bool]] = {F.embedding: _renormalises, F.group_norm: _is_channels_last}


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if place < len(args) else kwargs.get(name)
