"""Splits the layers of a stage among the ranks of its tensor group; each rank keeps its own slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from raypipe.parallel.group import TensorGroup
from raypipe.parallel.heads import Local
from raypipe.parallel.styles import SummedGradient, arrived

__all__ = ["split_layers", "summed_parameters"]

_Place = tuple[nn.Module, str]


def split_layers(
    model: nn.Module, group: TensorGroup, styles: Mapping[str, ParallelStyle], local: Iterable[Local] = ()
) -> None:
    """Splits the modules named in ``styles``, in place.

    Args:
        model: with whole weights, equal on all ranks, in the named modules; other modules are not touched.
        group: the ranks that share them.
        styles: by module name.
        local: attributes that are smaller on a rank.

    Raises:
        ValueError: a weight is shared by modules that would hold different slices of it.
    """
    modules = dict(model.named_modules())
    ties = _ties(model)
    trainable = {id(m): {n: p.requires_grad for n, p in m.named_parameters()} for m in map(modules.get, styles) if m}
    for name, style in styles.items():
        module = modules[name]
        parallelize_module(module, group.mesh, style, src_data_rank=None)
        for inner, wanted in trainable[id(module)].items():  # SequenceParallel makes frozen parameters trainable
            module.get_parameter(inner).requires_grad_(wanted)
        module.register_forward_hook(arrived)
    for places in ties:
        _tie_again(model, places)
    _let_go(model)
    for each in local:
        setattr(modules[each.module], each.attribute, each.value)


def summed_parameters(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> set[str]:
    """Names of the parameters whose gradients are parts of a sum; see ``styles.SummedGradient``."""
    modules = dict(model.named_modules())
    inside = {id(p) for n, s in styles.items() if isinstance(s, SummedGradient) for p in modules[n].parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def _ties(model: nn.Module) -> list[list[_Place]]:
    """The places of each parameter that has several."""
    places: dict[int, list[_Place]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name))
    return [each for each in places.values() if len(each) > 1]


def _tie_again(model: nn.Module, places: list[_Place]) -> None:
    """PyTorch splits each of a tied weight's places for itself, and unties them in silence."""
    made = [module._parameters[name] for module, name in places]
    if any(_placed(parameter) != _placed(made[0]) for parameter in made):
        names = {id(module): name for name, module in model.named_modules()}
        other = next(p for p, m in zip(places, made, strict=True) if _placed(m) != _placed(made[0]))
        one, two = (f"{names[id(module)]}.{name}" for module, name in (places[0], other))
        raise ValueError(
            f"{one} and {two} are one weight, but tensor_parallel_plan splits them differently; split an embedding by "
            "RowwiseParallel(input_layouts=Replicate()) and its tied head by "
            "ColwiseParallel(output_layouts=Replicate()), or neither"
        )
    for module, name in places[1:]:
        module._parameters[name] = made[0]


def _placed(parameter: Tensor | None) -> object:
    return parameter.placements if isinstance(parameter, DTensor) else None


@torch.no_grad()
def _let_go(model: nn.Module) -> None:
    """A slice must not keep the memory of the whole weight that it was cut from."""
    fresh: dict[int, nn.Parameter] = {}
    for module in model.modules():
        held: dict[str, Any] = dict(module._parameters)
        for name, parameter in held.items():
            if isinstance(parameter, DTensor) and _keeps_more(parameter.to_local()):
                if id(parameter) not in fresh:
                    fresh[id(parameter)] = _moved(parameter)
                module._parameters[name] = fresh[id(parameter)]


def _keeps_more(own: Tensor) -> bool:
    return own.untyped_storage().nbytes() > own.numel() * own.element_size()


def _moved(parameter: DTensor) -> nn.Parameter:
    own = DTensor.from_local(
        parameter.to_local().clone(),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return nn.Parameter(own, requires_grad=parameter.requires_grad)
