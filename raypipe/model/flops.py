"""The FLOPs of a kernel's forward, and of the backward that it asks for.

A matrix product or a convolution has one such product in its backward for each of its two operands that needs a
gradient: two as a rule, one where the input needs none or the weight is frozen. Fused attention, which computes its
scores again, has five products in its backward for two in its forward (Dao et al., FlashAttention, 2022).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

__all__ = ["flops_of"]

_OPERANDS = {
    "mm": (0, 2),
    "bmm": (0, 2),
    "addmm": (1, 3),
    "baddbmm": (1, 3),
    "_scaled_mm": (0, 2),
    "convolution": (0, 2),
    "_convolution": (0, 2),
    "cudnn_convolution": (0, 2),
    "_slow_conv2d_forward": (0, 2),
}
"""Where the two operands stand among the arguments."""


def flops_of(func: Any, args: Any, kwargs: Any, result: Any) -> tuple[int, int]:
    """FLOPs of a kernel's forward, by PyTorch's own formulas, and of its backward.

    Args:
        func: the kernel.
        args: its arguments.
        kwargs: its keyword arguments.
        result: that it gave.
    """
    packet: Any = getattr(func, "overloadpacket", None)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        # PyTorch's registry lacks it.
        forward = int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))  # type: ignore[no-untyped-call]
    elif packet in flop_registry:
        forward = int(flop_registry[packet](*args, **kwargs, out_val=result))
    else:
        return 0, 0
    name = str(packet.__name__)
    if name in _OPERANDS:
        first, end = _OPERANDS[name]
        return forward, forward * sum(_needs_gradient(operand) for operand in args[first:end])
    if "attention" in name and "backward" not in name:
        return forward, forward * 5 // 2 * any(map(_needs_gradient, args[:3]))
    return forward, 0


def _needs_gradient(operand: Any) -> bool:
    return isinstance(operand, Tensor) and operand.requires_grad
