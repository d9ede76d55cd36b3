"""What a tensor group does to a model, as every rank of a pipeline is told it: plain data, checked before the start."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from raypipe.errors import CutError
from raypipe.parallel.heads import Local, split_heads
from raypipe.parallel.tensor_plan import find_styles

__all__ = ["TensorSplit", "find_split"]


@dataclass(frozen=True, slots=True)
class TensorSplit:
    """How the layers of a model are split.

    Attributes:
        size: ranks in a tensor group.
        styles: by module name.
        local: attributes that are smaller on a rank.
        dims: which dimension of each split parameter is shared out, by its first name.
    """

    size: int
    styles: Mapping[str, ParallelStyle]
    local: tuple[Local, ...]
    dims: Mapping[str, int]

    def share(self, name: str, length: int) -> float:
        """The part of a parameter that the first rank holds, which has the most.

        Args:
            name: of the parameter.
            length: of its split dimension.
        """
        return -(-length // self.size) / length if name in self.dims and length else 1.0


def find_split(
    model: nn.Module,
    given: Mapping[str, ParallelStyle] | None,
    size: int,
    units: Collection[str],
    read_outside: Collection[str],
) -> TensorSplit:
    """The split of a model by the user's plan or its own.

    Args:
        model: whole; its weights are not looked at.
        given: the user's ``tensor_parallel_plan``.
        size: ranks in a tensor group.
        units: names of the pipeline's units.
        read_outside: names of parameters that the forward reads outside of units.

    Raises:
        TypeError, ValueError: see ``find_styles`` and ``split_heads``.
        CutError: a module that is no part of a unit would be split, or a weight that is read outside of units, or one
            weight in two ways.
    """
    styles, local = split_heads(model, find_styles(model, given, size), size)
    for name in styles:
        if not any(name == unit or name.startswith(f"{unit}.") for unit in units):
            raise CutError(
                f"tensor_parallel_plan names {name}, which is not inside of one of the model's units "
                f"({', '.join(list(units)[:4])}, ...), and what goes between units is whole on every rank; name "
                "modules in units"
            )
    dims = _dims(model, styles)
    if outside := next((name for name in read_outside if name in dims), None):
        raise CutError(
            f"{outside} is split by tensor_parallel_plan, but the model's forward also reads it outside of its own "
            "module, where it must be whole; leave that module out of tensor_parallel_plan"
        )
    return TensorSplit(size, styles, tuple(local), dims)


def _dims(model: nn.Module, styles: Mapping[str, ParallelStyle]) -> dict[str, int]:
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, int | None]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        style = styles.get(path)
        for attribute, parameter in module.named_parameters(recurse=False):
            places = found.setdefault(first[id(parameter)], {})
            places[f"{path}.{attribute}"] = next(iter(_dim(style, module, attribute)), None)
    for name, places in found.items():
        if len(set(places.values())) > 1:
            raise CutError(
                f"{' and '.join(places)} are one weight ({name}), but tensor_parallel_plan splits them differently; "
                "split an embedding by RowwiseParallel(input_layouts=Replicate()) and its tied head by "
                "ColwiseParallel(output_layouts=Replicate()), or neither"
            )
    return {name: dim for name, places in found.items() for dim in list(places.values())[:1] if dim is not None}


def _dim(style: ParallelStyle | None, module: nn.Module, attribute: str) -> Iterator[int]:
    if isinstance(style, ColwiseParallel):
        yield 1 if isinstance(module, nn.Embedding) else 0
    elif isinstance(style, RowwiseParallel) and isinstance(module, nn.Embedding):
        yield 0
    elif isinstance(style, RowwiseParallel) and attribute == "weight":
        yield 1
