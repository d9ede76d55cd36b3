"""What of a model has its weight gradients apart: told from one forward, on real or on fake tensors.

For a plan to say what a zero-bubble schedule can move: a weight half without work fills no bubble.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from raypipe.model.functions import function_name
from raypipe.model.split_backward import SplitCalls
from raypipe.model.split_functions import Operands, is_view, weights_of

__all__ = ["Coverage", "coverage"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which of the trainable parameters that a forward used have a gradient that waits for the weight half.

    Attributes: ``split``, those whose every use is split, with their bytes; ``whole``, the others, with theirs;
    ``functions``, the names of the functions that keep each of those whole, in the order of their calls.
    """

    split: Mapping[str, int]
    whole: Mapping[str, int]
    functions: Mapping[str, tuple[str, ...]]

    def share(self, names: Iterable[str] | None = None) -> float:
        """The share of bytes, of the parameters named or of all, that are split; 1.0 where none is trained."""
        chosen = {*self.split, *self.whole} if names is None else set(names)
        split, whole = (
            sum(size for name, size in sizes.items() if name in chosen) for sizes in (self.split, self.whole)
        )
        return split / (split + whole) if split + whole else 1.0


def coverage(run: Callable[[], Any], named_parameters: Mapping[str, Tensor]) -> Coverage:
    """Looks at what a forward does with parameters; nothing is split.

    Args:
        run: a forward, or a recording of one, with grad mode on. What ``torch.compile`` compiled is not seen.
        named_parameters: the parameters by name. A shared one counts once, under its first name.

    Returns:
        The coverage of those of them that ``run`` used.
    """
    with _Looking() as seen:
        run()
    names: dict[int, str] = {}
    for name, parameter in named_parameters.items():
        names.setdefault(id(parameter), name)
    kept = {names[number]: tuple(functions) for number, functions in seen.kept.items() if number in names}
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in named_parameters.items()}
    split = {
        names[number]: sizes[names[number]] for number in seen.split if number in names and number not in seen.kept
    }
    return Coverage(split, {name: sizes[name] for name in kept}, kept)


class _Looking(SplitCalls):
    """By id of the parameter: those that a split call used; and those that another function used, with its name."""

    def __init__(self) -> None:
        super().__init__()
        self.split: dict[int, Tensor] = {}
        self.kept: dict[int, dict[str, None]] = {}
        self._alive: list[Tensor] = []

    def in_halves(self, func: Any, args: Any, kwargs: dict[str, Any], operands: Operands) -> Any:
        self.split.update((id(p), p) for p in operands.parameters)
        result = func(*args, **kwargs)
        waiting = {id(p) for p in operands.parameters}
        self._keep(func, [p for p in weights_of(args, kwargs) if id(p) not in waiting])
        return result

    def whole(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        leaves = pytree.tree_leaves(result)
        if not is_view(func) and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            self._keep(func, weights_of(args, kwargs))
        return result

    def _keep(self, func: Any, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            self._alive.append(parameter)
            self.kept.setdefault(id(parameter), {})[function_name(func)] = None
