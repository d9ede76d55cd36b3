"""A model whose weights are fake: it can be recorded anywhere, at no cost in memory.

Fake tensors (``torch._subclasses``) know shape, strides, dtype and device and compute nothing. The twin's units and
loose parameters are fake; its other buffers are real, since plain code between units may look at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from raypipe.model.husk import names_of, replace_tensors
from raypipe.model.intercept import Switch, install
from raypipe.model.units import find_units

__all__ = ["Twin"]


class Twin:
    """The fake copy of a model (or of its skeleton of husks).

    Attributes: ``model``, ``units`` by name, ``switch`` of their calls, ``mode`` of all its fakes, ``parameters`` (name
    by id, for every parameter), ``buffers`` likewise, ``unit_parameters`` (names, by unit), ``parameter_memory`` (the
    addresses of the storages of parameters and of units' buffers).
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str] | None = None) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        units = find_units(model, patterns)
        parameters, _ = names_of(model)
        fakes: dict[int, Tensor] = {id(p): self.fake(p, parameter=True) for p in parameters.values()}
        for unit in units.values():
            fakes.update((id(b), self.fake(b)) for b in unit.buffers())
        self.model = replace_tensors(model, fakes)
        modules = dict(self.model.named_modules())
        self.units: Mapping[str, nn.Module] = {name: modules[name] for name in units}
        self.parameters = {id(p): name for name, p in self.model.named_parameters()}
        self.unit_parameters = {
            name: tuple(dict.fromkeys(self.parameters[id(p)] for p in unit.parameters()))
            for name, unit in self.units.items()
        }
        self.buffers = {id(b): name for name, b in self.model.named_buffers()}
        held = [*self.model.parameters(), *(b for unit in self.units.values() for b in unit.buffers())]
        self.parameter_memory = {tensor.untyped_storage()._cdata for tensor in held}
        self.switch: Switch = install(self.units)

    def fake(self, tensor: Tensor, *, parameter: bool = False) -> Tensor:
        """A fake with the same shape, strides, dtype and device."""
        with torch.no_grad():
            made = self.empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if parameter:
            with self.mode:
                return nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    def empty(
        self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A fake tensor of its own memory."""
        with self.mode:
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    @staticmethod
    def is_fake(tensor: Tensor) -> bool:
        """Whether this is a fake."""
        return isinstance(tensor, FakeTensor)
