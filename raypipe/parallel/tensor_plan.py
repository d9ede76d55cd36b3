"""Which module of a model is split in which way: the user's plan, or the model's own, checked against its modules."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from raypipe.parallel.styles import SharedInput, SummedGradient

__all__ = ["Styles", "check_plan", "find_styles"]

Styles = dict[str, ParallelStyle]
"""Styles by module name, as ``named_modules`` gives it."""

EXAMPLE = "{'blocks.*.up': ColwiseParallel(), 'blocks.*.down': RowwiseParallel()}"


def _translated() -> dict[str, ParallelStyle]:
    """Hugging Face's words for styles (those of transformers 4.57 to 5) in PyTorch's."""
    gathered = ColwiseParallel(output_layouts=Replicate())
    whole_input = RowwiseParallel(input_layouts=Replicate())
    return {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        "colwise_gather_output": gathered,
        "colwise_rep": gathered,
        "rowwise_split_input": whole_input,
        "rowwise_rep": whole_input,
        "embedding_rowwise": whole_input,
        "replicated_with_grad_allreduce": SummedGradient(),
    }


def find_styles(model: nn.Module, given: Mapping[str, ParallelStyle] | None, size: int) -> Styles:
    """The styles of a model's modules.

    Args:
        model: whole; its weights are not looked at.
        given: the user's plan. A pattern has as many parts as the names it matches, each an ``fnmatch`` pattern:
            ``"blocks.*.up"``. None: the model's own plan, as Hugging Face's models have one.
        size: ranks in a tensor group.

    Raises:
        TypeError: ``given`` is no dict of styles.
        ValueError: there is no plan; a pattern matches nothing; two match one module; a layer cannot be split so.
    """
    if given is not None:
        check_plan(given)
    plan = _own_plan(model, size) if given is None else given
    modules = dict(model.named_modules())
    styles: Styles = {}
    by: dict[str, str] = {}
    for pattern, style in plan.items():
        hits = [name for name in modules if _matches(name, pattern)]
        if not hits and given is not None:
            raise ValueError(
                f"tensor_parallel_plan has the pattern {pattern!r}, which matches no module; its parts stand for parts "
                f"of names, as in {EXAMPLE}, and the model has {_some(modules)}"
            )
        for name in hits:
            if name in styles:
                raise ValueError(
                    f"tensor_parallel_plan names {name} twice, by {by[name]!r} and {pattern!r}; keep one of them"
                )
            styles[name], by[name] = style, pattern
    for name, style in styles.items():
        _check_layer(name, modules[name], style, size)
    if given is None:
        styles.update({name: SharedInput() for name, module in modules.items() if _shares(name, module, styles)})
    return styles


def _own_plan(model: nn.Module, size: int) -> dict[str, ParallelStyle]:
    words: Mapping[str, Any] = getattr(model, "_tp_plan", None) or {}
    if not words:
        raise ValueError(
            f"tensor_parallel={size}, but {type(model).__name__} has no plan of its own; give one, for each pair of "
            f"layers the first by columns and the second by rows: tensor_parallel_plan={EXAMPLE}, from "
            "torch.distributed.tensor.parallel"
        )
    known = _translated()
    modules = dict(model.named_modules())
    plan: dict[str, ParallelStyle] = {}
    for pattern, word in words.items():
        hits = [name for name in modules if _matches(name, pattern)]
        if hits and word not in known:
            raise ValueError(
                f"{type(model).__name__}'s own plan splits {hits[0]} by {word!r}, which is not built; give a "
                f"tensor_parallel_plan that leaves it whole, such as {EXAMPLE}"
            )
        if hits:
            plan[pattern] = known[word]
        elif any(_matches(name, pattern) for name, _ in model.named_parameters()):
            raise ValueError(
                f"{type(model).__name__}'s own plan splits the parameters {pattern}, which belong to no layer of their "
                f"own; give a tensor_parallel_plan that leaves them whole, such as {EXAMPLE}"
            )
    return plan


def check_plan(given: Mapping[str, ParallelStyle]) -> None:
    """Refuses what is no plan, before a model is looked at.

    Raises:
        TypeError: it is not a dict of styles by patterns, or an empty one.
    """
    wrong = not isinstance(given, Mapping) or not given
    if wrong or not all(isinstance(n, str) and isinstance(s, ParallelStyle) for n, s in given.items()):
        raise TypeError(
            f"tensor_parallel_plan is {given!r}, but must be a dict of patterns of module names and styles of "
            f"torch.distributed.tensor.parallel, such as {EXAMPLE}"
        )


def _check_layer(name: str, module: nn.Module, style: ParallelStyle, size: int) -> None:
    """Refuses what PyTorch would split unevenly, in silence, or not at all."""
    if not isinstance(style, (ColwiseParallel, RowwiseParallel)):
        return
    if not isinstance(module, (nn.Linear, nn.Embedding)) or any("." in n for n, _ in module.named_parameters()):
        raise ValueError(
            f"tensor_parallel_plan splits {name} by {type(style).__name__}, but it is a {type(module).__name__}; only "
            "Linear and Embedding layers without parametrizations are split, name those"
        )
    wide = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if isinstance(style, ColwiseParallel):
        split = "output" if wide is nn.Linear else "embedding"
        features = module.weight.shape[0 if wide is nn.Linear else 1]
        uneven_is_known = all(placement.is_replicate() for placement in style.output_layouts)
    else:
        split = "input" if wide is nn.Linear else "vocabulary"
        features = module.weight.shape[1 if wide is nn.Linear else 0]
        uneven_is_known = wide is nn.Embedding
    if features % size and not uneven_is_known:  # a local tensor does not tell that another rank's is shorter
        raise ValueError(
            f"{name} has {features} {split} features, which {size} ranks cannot share evenly; choose a "
            f"tensor_parallel that divides {features}, or leave {name} out of tensor_parallel_plan"
        )


def _shares(name: str, module: nn.Module, styles: Styles) -> bool:
    """Whether a module gives one input to several column-parallel children and does nothing else with it."""
    children = {f"{name}.{child}".lstrip("."): inner for child, inner in module.named_children()}
    columns = [child for child in children if isinstance(styles.get(child), ColwiseParallel)]
    others = [
        child for child, inner in children.items() if child not in styles and any(True for _ in inner.parameters())
    ]
    own = any(True for _ in module.parameters(recurse=False))
    return name not in styles and len(columns) > 1 and not others and not own


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))


def _some(modules: Mapping[str, nn.Module]) -> str:
    layers = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Embedding))]
    return ", ".join(layers[:6]) + (", ..." if len(layers) > 6 else "") if layers else "no Linear or Embedding"
