"""In which precision a model computes, and what its values travel as between stages.

Mixed precision as in Micikevicius et al. (2018), by ``torch.autocast``: matrix products and convolutions run in the low
precision, what needs range or digits in float32. Weights, their gradients and the optimizer's state stay in float32.

Autocast runs without its cache of cast weights. The cache keeps the cast of a leaf for all of its users, so their
gradients would be summed in the low precision: of a weight that is used twice, and of a received tensor, which is a
leaf where the unsplit model has an inner value; a cut would then change bits. And it keeps what was cast without
gradients for those who need them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

__all__ = ["Precision", "refuse_low_weights"]

_DTYPES: Mapping[str, torch.dtype | None] = MappingProxyType(
    {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
)


@dataclass(frozen=True, slots=True)
class Precision:
    """The precision of a run.

    Attributes:
        name: ``"fp32"`` (the model's own types, whatever they are), ``"bf16"`` or ``"fp16"``.
        device_type: of the rank that computes.

    Raises:
        ValueError: the name is another one.
    """

    name: str = "fp32"
    device_type: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in _DTYPES:
            raise ValueError(f"precision is {self.name!r}, but must be {', '.join(map(repr, _DTYPES))}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The low type that autocast casts to; None: no autocast."""
        return _DTYPES[self.name]

    @property
    def boundary(self) -> torch.dtype | None:
        """What float32 values with a gradient travel as between stages, and their gradients back; None: as they are.

        Float16 ends at 65504. Sums of many blocks (a residual stream) and scaled gradients go beyond, and an autocast
        loop keeps those in float32; so under fp16 they travel in float32 too, and no cut changes a bit.
        """
        return torch.bfloat16 if self.name == "bf16" else None

    @property
    def scales_loss(self) -> bool:
        """Whether gradients are so small in the low type that the loss has to be scaled (``stage.loss_scale``)."""
        return self.name == "fp16"

    def autocast(self) -> AbstractContextManager[object]:
        """To be on around every forward and its loss, and not around a backward: that has the types of its forward."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, self.dtype, cache_enabled=False)


def refuse_low_weights(model: nn.Module, precision: Precision) -> None:
    """Refuses weights to train that are not in float32: they would be their own masters, and lose small updates.

    Raises:
        ValueError: there is one, and the precision is a mixed one.
    """
    if precision.dtype is None:
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"precision={precision.name!r} trains weights in float32, but {name} is {parameter.dtype}; call "
                "model.float(), or leave precision out to train in the model's own types"
            )
