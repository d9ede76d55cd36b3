"""Parameters that show the same memory without being one tensor: a stage would get copies that drift apart."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["refuse_overlap"]


def refuse_overlap(parameters: Mapping[str, Tensor]) -> None:
    """Refuses two parameters whose memory overlaps; one tensor under two names is one parameter, and shared.

    Args:
        parameters: by first name; real or fake, but no husks.

    Raises:
        ValueError: two overlap; the sentence names them.
    """
    ranges = []
    for name, tensor in parameters.items():
        if tensor.numel() and tensor.layout is torch.strided:
            start = tensor.storage_offset()
            end = start + 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            ranges.append((tensor.untyped_storage()._cdata, start * size, end * size, name))
    ranges.sort()
    for (memory, _, end, name), (other_memory, start, _, other) in pairwise(ranges):
        if memory == other_memory and start < end:
            raise ValueError(
                f"the parameters {name} and {other} are two tensors in the same memory, so that a change of one is a "
                "change of the other, but stages hold copies; make them one parameter (module.weight = other.weight), "
                "or clone one of them"
            )
