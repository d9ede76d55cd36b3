"""A model of husks of which one unit at a time has its weights, for code that runs units one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from raypipe.model.build import Skeleton, materialise
from raypipe.model.husk import Husk, names_of, replace_tensors
from raypipe.model.recording import Recording

__all__ = ["lent"]


def lent(
    skeleton: Skeleton, tensor: Callable[[str], Tensor], recording: Recording, training: bool
) -> tuple[nn.Module, Callable[[nn.Module], nn.Module]]:
    """A runnable copy, and what gives a unit of it its weights.

    Args:
        skeleton: of the model; not changed.
        tensor: gives a parameter or buffer by its first name.
        recording: of a forward, which tells what is read outside of units; the copy holds that.
        training: the mode to run in.

    Returns:
        The copy, whose units are husks; and a function from such a unit to a copy of it with weights, which live as
        long as that copy.
    """
    outside = {name for event in recording.events for name in event.parameters}
    outside |= names_of(skeleton.model)[0].keys() - {
        name for event in recording.events if event.call is not None for name in _inside(skeleton.model, event.name)
    }
    model = materialise(skeleton, {name: tensor(name) for name in outside})

    def with_weights(unit: nn.Module) -> nn.Module:
        real: dict[int, Tensor] = {}
        for parameter in unit.parameters():
            if isinstance(parameter, Husk):
                values = tensor(parameter.husk_name)
                real[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        real.update((id(b), tensor(b.husk_name)) for b in unit.buffers() if isinstance(b, Husk))
        return replace_tensors(unit, real)

    return (model if model.training and training else model.train(training)), with_weights


def _inside(model: nn.Module, unit: str) -> list[str]:
    return [parameter.husk_name for parameter in model.get_submodule(unit).parameters() if isinstance(parameter, Husk)]
