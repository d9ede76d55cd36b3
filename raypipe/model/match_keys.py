"""Which tensor of a file is which of a model: prefixes, ties and Hugging Face's renamed keys."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from raypipe.model.assemble import Assembly, assemblies
from raypipe.model.weight_files import Header

__all__ = ["Names", "match_keys", "names_in_file"]

Names = Mapping[str, str]


def names_in_file(model: nn.Module) -> dict[str, str]:
    """The first name of each parameter and persistent buffer by every name that a file may have for it."""
    first = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
    state = model.state_dict(keep_vars=True)
    return {name: first[id(t)] for name, t in state.items() if isinstance(t, Tensor)}


def match_keys(model: nn.Module, headers: Mapping[str, Header]) -> tuple[dict[str, list[str]], list[Assembly]]:
    """The file's keys of each tensor that lies there whole, by its first name, and what is put together from pieces.

    Warns once of tensors that the file lacks and once of those that the model has no place for.

    Args:
        model: of husks.
        headers: of the file's tensors, by key.

    Raises:
        ValueError: the file's names cannot be matched to the model's.
    """
    names, prefix = names_in_file(model), str(getattr(model, "base_model_prefix", "") or "")
    found: dict[str, list[str]] = {}
    unexpected: list[str] = []
    whole, assembled = _renamed(model, headers, names, prefix)
    for key, name in whole.items():
        if name in names:
            found.setdefault(names[name], []).append(key)
        else:
            unexpected.append(key)
    made = [part for assembly in assembled for part in assembly.shapes]
    unexpected += [part for part in made if part not in names]
    parts = {names[part] for part in made if part in names}
    missing = [first for first in dict.fromkeys(names.values()) if first not in found and first not in parts]
    _refuse_other_names(model, [*whole, *made], prefix, missing, unexpected, len(found) + len(parts))
    _warn(model, missing, unexpected)
    return found, assembled


def _renamed(
    model: nn.Module, headers: Mapping[str, Header], names: Names, prefix: str
) -> tuple[dict[str, str], list[Assembly]]:
    """The model's name of each key. Transformers 5 tells which names an older file has for a module's tensors."""
    renamings, converters = _conversions(model)
    found, pieces = {}, []
    for key in headers:
        name, pattern = key, None
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in converters:
            name, pattern = converter.rename_source_key(name)
            if pattern is not None:
                break
        name = _with_prefix(name, names, prefix)
        if pattern is None:
            found[key] = name
        else:
            pieces.append((name, pattern, key))
    return found, assemblies(pieces, converters, getattr(model, "config", None), headers)


def _with_prefix(name: str, names: Names, prefix: str) -> str:
    if not prefix:
        return name
    bare = name.removeprefix(f"{prefix}.")
    if bare != name and bare in names:
        return bare
    return f"{prefix}.{name}" if f"{prefix}.{name}" in names else name


def _conversions(model: Any) -> tuple[list[Any], list[Any]]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5 files had the model's own names
        return [], []
    found = get_model_conversion_mapping(model)
    return (
        [c for c in found if isinstance(c, WeightRenaming)],
        [c for c in found if not isinstance(c, WeightRenaming)],
    )


def _refuse_other_names(
    model: nn.Module, keys: Collection[str], prefix: str, missing: list[str], unexpected: list[str], matched: int
) -> None:
    """Heads may differ. A base that lacks some names and has others is another model, or one with other names."""
    dot = f"{prefix}."
    has_base = any(name.startswith(dot) for name in names_in_file(model))
    file_has_base = any(key.startswith(dot) for key in keys)
    lost = [name for name in missing if not has_base or name.startswith(dot)]
    strange = [key for key in unexpected if not file_has_base or key.startswith(dot)]
    if (lost and strange) or not matched:
        raise ValueError(
            f"the names in the file are not those of {type(model).__name__}: it lacks {_few(lost or missing)} and has "
            f"{_few(strange or unexpected)} instead; give the model class that the folder was saved from"
        )


def _warn(model: nn.Module, missing: list[str], unexpected: list[str]) -> None:
    new = _unless(missing, getattr(model, "_keys_to_ignore_on_load_missing", None))
    left = _unless(unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
    if new:
        warnings.warn(f"initialised by the trainer's seed, since the folder lacks them: {', '.join(new)}", stacklevel=2)
    if left:
        what = f"left unread, since {type(model).__name__} has no place for them: {', '.join(left)}"
        warnings.warn(what, stacklevel=2)


def _unless(names: list[str], patterns: Iterable[str] | None) -> list[str]:
    return [name for name in names if not any(re.search(pattern, name) for pattern in patterns or ())]


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return (f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown) or "nothing"
