"""What is known of a tensor before it is there; shared by the rooms that plan and those that carry."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a receiver knows of a tensor before it comes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable

    def empty(self) -> torch.Tensor:
        """A buffer for such a tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """The tensor's size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize
