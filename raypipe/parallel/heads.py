"""Attention heads among the ranks of a tensor group: which numbers change inside of an attention module.

A rank has its share of the query heads. Key-value heads are shared out where there are enough of them; where there are
fewer than ranks, each rank works with the one that its queries belong to (``styles.KeyValueParallel``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle

from raypipe.parallel.styles import KeyValueParallel

__all__ = ["Local", "split_heads"]

_QUERIES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_GROUPS = ("num_key_value_groups", "num_queries_per_kv", "n_rep")
"""Names under which attention modules keep their numbers of heads, and of query heads to each key-value head."""


@dataclass(frozen=True, slots=True)
class Local:
    """A rank's own value of a module's attribute."""

    module: str
    attribute: str
    value: int


def split_heads(
    model: nn.Module, styles: Mapping[str, ParallelStyle], size: int
) -> tuple[dict[str, ParallelStyle], list[Local]]:
    """Shares out the heads of every module that has column-parallel projections and a number of heads.

    Args:
        model: whole.
        styles: by module name.
        size: ranks in a tensor group.

    Returns:
        The styles, those of keys and values changed where their heads are fewer than ranks; and the attributes that
        are smaller on a rank.

    Raises:
        ValueError: the heads cannot be shared out.
    """
    changed, local = dict(styles), list[Local]()
    for name, module in model.named_modules():
        children = {f"{name}.{child}".lstrip("."): inner for child, inner in module.named_children()}
        columns = {
            child: inner
            for child, inner in children.items()
            if isinstance(inner, nn.Linear) and _leaves_split(styles.get(child))
        }
        heads = _number(module, _QUERIES, "num_attention_heads")
        if not columns or heads is None:
            continue
        keys = _number(module, _KEYS, "num_key_value_heads") or heads
        _check(name, heads, keys, size)
        own = keys // size if keys % size == 0 else 1
        local += [Local(name, a, heads // size) for a in _QUERIES if _is_number(module, a)]
        local += [Local(name, a, own) for a in _KEYS if _is_number(module, a)]
        local += [Local(name, a, heads // size // own) for a in _GROUPS if _is_number(module, a)]
        if keys % size:
            changed.update(_few_keys(name, module, columns, heads, keys, size))
    return changed, local


def _few_keys(
    name: str, module: nn.Module, columns: Mapping[str, nn.Linear], heads: int, keys: int, size: int
) -> dict[str, ParallelStyle]:
    widest = max(inner.out_features for inner in columns.values())
    head_dim = _number(module, ("head_dim",), "head_dim") or widest // heads
    narrow = [child for child, inner in columns.items() if inner.out_features == keys * head_dim]
    if len(narrow) != 2 or (keys * head_dim) % size:
        raise ValueError(
            f"{name} has {keys} key-value heads of {head_dim} features for {size} ranks, and its projections of keys "
            f"and values are not two layers that {size} ranks can share; use a tensor_parallel of at most {keys}"
        )
    return {child: KeyValueParallel(keys, head_dim) for child in narrow}


def _check(name: str, heads: int, keys: int, size: int) -> None:
    if heads % size or (keys % size and size % keys):
        kind = f"{heads} attention heads" if keys == heads else f"{heads} query and {keys} key-value heads"
        raise ValueError(
            f"{name} has {kind}, which {size} ranks cannot share: tensor_parallel must divide the query heads, and "
            "divide the key-value heads or be a multiple of them; choose another tensor_parallel, or leave the module "
            "out of tensor_parallel_plan"
        )


def _leaves_split(style: ParallelStyle | None) -> bool:
    return isinstance(style, ColwiseParallel) and not all(each.is_replicate() for each in style.output_layouts)


def _number(module: nn.Module, names: tuple[str, ...], in_config: str) -> int | None:
    """A number of the module, or of the configuration of a module that is an attention."""
    for name in names:
        if _is_number(module, name):
            return int(getattr(module, name))
    is_attention = any(_is_number(module, name) for name in (*_GROUPS, "head_dim", "head_size", "attention_head_size"))
    value = getattr(getattr(module, "config", None), in_config, None) if is_attention else None
    return value if isinstance(value, int) else None


def _is_number(module: nn.Module, name: str) -> bool:
    value = vars(module).get(name)
    return isinstance(value, int) and not isinstance(value, bool)
