"""How a model is called with a batch, and where its loss is.

| batch | call | loss |
| --- | --- | --- |
| a mapping | ``model(**batch)`` | the model's own, or ``loss(outputs, batch)`` |
| a pair (inputs, targets) | ``model(inputs)``, or ``model(*inputs)`` for a tuple | ... or ``loss(outputs, targets)`` |
| anything, with ``forward`` | ``forward(model, batch)`` | as for a mapping |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from raypipe.errors import BatchError
from raypipe.model.precision import Precision

__all__ = ["Caller"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Calls a model as its batches ask for, and finds the loss in what it returns.

    It holds no tensors of its own and survives cloudpickle where ``forward`` and ``loss`` do.

    Args:
        forward: ``forward(model, batch) -> outputs``, for a model that is called in its own way.
        loss: ``loss(outputs, targets) -> scalar`` for batches that are pairs, ``loss(outputs, batch)`` otherwise.
        precision: that both run in, here and on every rank.

    Raises:
        TypeError: one of them is neither callable nor None.
    """

    forward: Callable[[nn.Module, Any], Any] | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        for name, what in (("forward", "forward(model, batch)"), ("loss", "loss(outputs, targets)")):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise TypeError(f"{name} is {value!r}, but must be a callable {what} or None")

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """Calls the model.

        Raises:
            BatchError: the batch is neither a mapping nor a pair, and there is no ``forward``.
        """
        self.check(batch)
        with self.precision.autocast():
            return self._called(model, batch)

    def _called(self, model: nn.Module, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        if isinstance(batch, Mapping):
            return model(**batch)
        inputs = batch[0]
        # A DataLoader's collation turns a sample's tuple of inputs into a list, as it does the pair itself.
        if isinstance(inputs, tuple) or (isinstance(inputs, list) and isinstance(batch, list)):
            return model(*inputs)
        return model(inputs)

    def check(self, batch: Any) -> None:
        """Refuses a batch of an unknown kind.

        Raises:
            BatchError: the batch is neither a mapping nor a pair, and there is no ``forward``.
        """
        if self.forward is None and not isinstance(batch, Mapping) and not _is_pair(batch):
            raise BatchError(
                f"the batch is {_kind(batch)}, but must be a dict for model(**batch) or a pair (inputs, targets); "
                "give forward(model, batch) to call the model in another way"
            )

    def loss_of(self, outputs: Any, batch: Any) -> Tensor:
        """The loss of a batch, a tensor of shape [].

        Raises:
            ValueError: there is no loss in the outputs, or it is not a scalar tensor of a floating dtype.
        """
        if self.loss is None:
            return _checked(_own_loss(outputs), "the model's loss")
        second = batch[1] if self.forward is None and _is_pair(batch) else batch
        with self.precision.autocast():
            return _checked(self.loss(outputs, second), "what loss() returned")


def _is_pair(batch: Any) -> bool:
    return isinstance(batch, (tuple, list)) and len(batch) == 2


def _own_loss(outputs: Any) -> Any:
    """The loss that the model returned: ``outputs.loss``, ``outputs["loss"]``, or a scalar output."""
    if isinstance(outputs, Tensor):
        if outputs.dim() == 0:
            return outputs
    else:
        found = getattr(outputs, "loss", None)
        if found is None and isinstance(outputs, Mapping):
            found = outputs.get("loss")
        if found is not None:
            return found
    raise ValueError(
        f"the model returned {_kind(outputs)}, in which there is no loss: give loss(outputs, targets) to the trainer, "
        "or let the model return a scalar or an output with .loss (Hugging Face models do if the batch has labels)"
    )


def _checked(loss: Any, what: str) -> Tensor:
    if not isinstance(loss, Tensor):
        raise ValueError(f"{what} is {_kind(loss)}, but must be a scalar tensor")
    if loss.dim() != 0:
        raise ValueError(f"{what} has shape {list(loss.shape)}, but must be a scalar: average or sum it")
    if not torch.is_floating_point(loss):
        raise ValueError(f"{what} has dtype {loss.dtype}, but must be of a floating dtype to have a gradient")
    return loss


def _kind(value: Any) -> str:
    """A value in words: its type, and its keys, length or shape."""
    name = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a {name} with keys {list(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {name} of {len(value)}"
    return "None" if value is None else f"a {name}"
