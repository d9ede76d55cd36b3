"""The one order in which ranks' tensors are summed, so that every transport gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["sum_in_rank_order"]


def sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Adds ``parts[1]``, ``parts[2]``, ... to ``parts[0]``, in place, in that order.

    Args:
        parts: one tensor of equal shape and dtype for each rank, in order of ranks; not empty.

    Returns:
        ``parts[0]``, which now holds the sum.
    """
    total = parts[0]
    with torch.no_grad():
        for part in parts[1:]:
            total.add_(part)
    return total
