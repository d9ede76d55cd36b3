"""Tensors that a file has in pieces, as Hugging Face's own conversions put them together: experts of a mixture, fused
projections. One group of pieces is read and put together at a time, where it is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raypipe.model.weight_files import Header

__all__ = ["Assembly", "assemblies"]


@dataclass(frozen=True, slots=True, eq=False)
class Assembly:
    """Pieces of a file that become one tensor of the model, or several.

    Attributes:
        target: the model's name of the first tensor that it makes.
        pieces: (the converter's pattern, the file's key), in the order in which they are joined.
        converter: a ``WeightConverter`` of transformers.
        config: the model's.
        shapes: of each tensor that it makes, by the model's name.
    """

    target: str
    pieces: tuple[tuple[str, str], ...]
    converter: Any
    config: Any
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def keys(self) -> list[str]:
        """The file's keys of its pieces."""
        return [key for _, key in self.pieces]

    def make(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors, by name, of the pieces, by key."""
        converter = copy.deepcopy(self.converter)  # it collects what it converts
        for pattern, key in self.pieces:
            converter.add_tensor(self.target, key, pattern, found[key])
        made = converter.convert(self.target, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def assemblies(
    pieces: Iterable[tuple[str, str, str]], converters: Iterable[Any], config: Any, headers: Mapping[str, Header]
) -> list[Assembly]:
    """Groups pieces by what they become; no data is read.

    Args:
        pieces: (target, pattern, key) of each.
        converters: those that the patterns are of.
        config: the model's.
        headers: of the file's tensors, by key.

    Raises:
        ValueError: the pieces do not fit each other, or the conversion needs more than pieces and configuration.
    """
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, list[tuple[str, str]]] = {}
    for target, pattern, key in sorted(pieces, key=lambda piece: _natural(piece[2])):
        groups.setdefault(target, []).append((pattern, key))
    planned = [Assembly(target, tuple(of), by_pattern[of[0][0]], config, {}) for target, of in groups.items()]
    return [replace(assembly, shapes=_shapes(assembly, headers)) for assembly in planned]


def _shapes(assembly: Assembly, headers: Mapping[str, Header]) -> dict[str, tuple[int, ...]]:
    try:
        made = assembly.make({key: torch.empty(headers[key][0], device="meta") for key in assembly.keys})
        return {name: tuple(tensor.shape) for name, tensor in made.items()}
    except Exception as error:
        raise ValueError(
            f"{assembly.keys[0]} of the file is a piece of {assembly.target}, and the pieces cannot be put together "
            f"one tensor at a time ({type(error).__name__}: {error}); load the whole model with its own class's "
            "from_pretrained and give the module"
        ) from None


def _natural(key: str) -> list[tuple[int, str]]:
    """Sorts expert 2 before expert 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
