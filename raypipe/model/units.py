"""The pieces of a model that are never cut.

Units are the elements of the outermost ``ModuleList``s and ``Sequential``s, and around them the largest modules with
parameters that contain no such list. A module without parameters (rotary table, dropout, activation) is no unit: its
forward is plain code that every stage runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

__all__ = ["find_units"]


def find_units(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Finds the units of a model, by their first name, in the order of registration.

    Args:
        model: any module.
        patterns: names (``fnmatch`` patterns such as ``"encoder.layers.*"``) of modules that are never cut; they take
            the place of the lists' elements.

    Raises:
        ValueError: the model has no parameters, or a pattern matches no module with parameters.
    """
    chosen = _matching(model, patterns) if patterns is not None else None
    units: dict[str, nn.Module] = {}
    _walk(model, "", units, chosen, set())
    if not units:
        raise ValueError(
            f"{type(model).__name__} has no module with parameters, but a pipeline is cut between such modules; "
            "give a model that has weights"
        )
    return units


def _matching(model: nn.Module, patterns: Sequence[str]) -> set[int]:
    found: set[int] = set()
    for pattern in patterns:
        hits = [
            module for name, module in model.named_modules() if fnmatchcase(name, pattern) and _has_parameters(module)
        ]
        if not hits:
            known = ", ".join(find_units(model)) or "none"
            raise ValueError(
                f"units={pattern!r} matches no module with parameters; its units would be by themselves: {known}"
            )
        found.update(map(id, hits))
    return found


def _walk(module: nn.Module, name: str, units: dict[str, nn.Module], chosen: set[int] | None, seen: set[int]) -> None:
    """Adds the units of ``module``; a module that is registered twice is one unit under its first name."""
    if id(module) in seen or not _has_parameters(module):
        return
    seen.add(id(module))
    if _is_unit(module, chosen):
        units[name] = module
        return
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if chosen is None and _is_list(module) and not isinstance(child, nn.ModuleList):
            if id(child) not in seen and _has_parameters(child):
                seen.add(id(child))
                units[path] = child
        else:
            _walk(child, path, units, chosen, seen)


def _is_unit(module: nn.Module, chosen: set[int] | None) -> bool:
    if chosen is not None:
        return id(module) in chosen or not any(id(inner) in chosen for inner in module.modules())
    if isinstance(module, nn.ModuleDict):
        return False  # nobody calls it
    return not any(_is_list(inner) and _has_parameters(inner) for inner in module.modules())


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and not isinstance(module, ParametrizationList)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
