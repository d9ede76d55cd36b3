"""Whether a unit call may run a second time, as recomputing does: what it does beside returning happens once.

It is found while the call is recorded. What is left whole for one of these reasons is exact, and saves no memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from raypipe.model.hooks import hooks_of
from raypipe.model.trees import PLAIN, held_by, leaves_in

__all__ = ["Once", "copied", "statistics_of"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Once:
    """What a unit is before its call.

    Args:
        unit: that will be called.
        arguments: positional and keyword arguments.

    Attributes: ``eagerly``, whether a second run needs what compiled code cannot do: an object as it was before,
    running statistics kept apart.
    """

    def __init__(self, unit: nn.Module, arguments: Any) -> None:
        self._unit, self._arguments = unit, arguments
        self._hooks = bool(hooks_of(unit))
        self._copies = all(_can_be_copied(leaf) for _, leaf in leaves_in(arguments))
        self._buffers = {name: (buffer, buffer._version) for name, buffer in unit.named_buffers()}
        self._attributes = dict(_attributes(unit))
        objects = any(not isinstance(leaf, (*PLAIN, Tensor)) for _, leaf in leaves_in(arguments))
        self.eagerly = objects or bool(statistics_of(unit))

    def why(
        self,
        changes_argument: bool,
        leaves: bool,
        reads_hidden: bool,
        inside_checkpoint: bool,
        normed: Iterable[Tensor] = (),
    ) -> str:
        """After the call: why it must not run again, or ``""``.

        Args:
            changes_argument: it changed an argument in place.
            leaves: it left tensors in attributes, lists or dicts.
            reads_hidden: it read values that are no arguments.
            inside_checkpoint: the model itself has it run again.
            normed: the tensors that norms with running statistics were given.
        """
        reasons = {
            "has hooks, which would run twice": self._hooks,
            "changes an argument in place": changes_argument,
            "leaves tensors where others find them": leaves,
            "reads tensors that other units keep": reads_hidden,
            "runs inside a checkpoint of the model's own": inside_checkpoint,
            "gets an argument that cannot be copied": not self._copies,
        }
        found = next((text for text, holds in reasons.items() if holds), "")
        return found or self._changed_buffer({id(tensor) for tensor in normed}) or self._changed_attribute()

    def _changed_buffer(self, normed: Collection[int]) -> str:
        kept = {id(buffer) for norm in _norms(self._unit) for buffer in norm.buffers(recurse=False)}
        now = dict(self._unit.named_buffers())
        for name, (buffer, version) in self._buffers.items():
            written = buffer._version != version or id(buffer) in normed
            if now.get(name) is not buffer or (written and id(buffer) not in kept):
                return f"changes its buffer {name}"
        return ""

    def _changed_attribute(self) -> str:
        now = dict(_attributes(self._unit))
        changed = [place for place in now if place not in self._attributes or now[place] != self._attributes[place]]
        return f"changes its attribute {'.'.join(filter(None, changed[0]))}" if changed else ""


def statistics_of(unit: nn.Module) -> list[nn.Module]:
    """PyTorch's batch and instance norms in train mode: they change their buffers, and do not read them."""
    return [norm for norm in _norms(unit) if norm.training and norm.track_running_stats]


def _norms(unit: nn.Module) -> Iterator[_NormBase]:
    for module in unit.modules():
        if isinstance(module, _NormBase) and type(module).forward.__module__.startswith("torch.nn.modules."):
            yield module


def _without_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.grad_fn is None else torch.empty_like(tensor, device="meta")


def copied(thing: Any, stand_in: Callable[[Tensor], Tensor] = _without_memory) -> Any:
    """An object as it is now, for a second run; its tensors are not copied.

    Of values, which an object holds for others (a cache, the keys of other layers), only the shapes stay: the copy must
    not keep their memory. A unit that reads them is left whole.
    """
    if isinstance(thing, (*PLAIN, Tensor, nn.Module)):
        return thing
    return copy.deepcopy(thing, {id(tensor): stand_in(tensor) for tensor in held_by(thing)})


def _can_be_copied(leaf: Any) -> bool:
    try:
        copied(leaf, lambda tensor: tensor)
    except Exception:  # of any code of the object's own
        return False
    return True


def _attributes(unit: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """The numbers, strings and flags that a unit's modules keep."""
    for path, module in unit.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and isinstance(value, PLAIN):
                yield (path, name), value
