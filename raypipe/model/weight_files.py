"""The safetensors files of a folder in Hugging Face's format: which tensor lies where, and reading single ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

__all__ = ["Header", "headers_of", "keys_by_file", "read"]

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"

Header = tuple[tuple[int, ...], str]
"""A tensor's shape and its dtype as safetensors writes it, such as ``"BF16"``."""


def keys_by_file(folder: Path) -> dict[str, str]:
    """The file of every tensor, by its key.

    Raises:
        FileNotFoundError: there are no safetensors, or a shard of the index is not there.
        ValueError: the folder's weights are pickles, or a shard lacks a key of the index.
    """
    if (folder / ONE).is_file():
        with _open(folder / ONE) as file:
            return dict.fromkeys(file.keys(), ONE)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise ValueError(
                f"{folder} has its weights in {pickles[0]}, a pickle, which can run code and is read only as a whole; "
                "convert it: load the model once with its library and call model.save_pretrained(another_folder)"
            )
        raise FileNotFoundError(f"{folder} has neither {ONE} nor {INDEX}; make one by model.save_pretrained(folder)")
    where: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in sorted(set(where.values())):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}, which its {INDEX} names; copy that file there")
        with _open(folder / name) as file:
            lacking = sorted({key for key, of in where.items() if of == name} - set(file.keys()))
        if lacking:
            raise ValueError(f"{name} in {folder} lacks {lacking[0]}, which {INDEX} says it has; save the folder again")
    return where


def headers_of(folder: Path, where: dict[str, str]) -> dict[str, Header]:
    """Shape and dtype of each tensor; no data is read."""
    found: dict[str, Header] = {}
    for name in sorted(set(where.values())):
        with _open(folder / name) as file:
            for key in (key for key, of in where.items() if of == name):
                part = file.get_slice(key)
                found[key] = (tuple(part.get_shape()), part.get_dtype())
    return found


def read(folder: Path, where: dict[str, str], keys: Iterable[str]) -> dict[str, Tensor]:
    """These tensors, which may lie in the memory of a mapped file."""
    wanted = list(keys)
    found: dict[str, Tensor] = {}
    for name in sorted({where[key] for key in wanted}):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is not on this machine; put the folder at the same path on every machine"
            )
        with _open(folder / name) as file:
            found.update((key, file.get_tensor(key)) for key in wanted if where[key] == name)
    return found


def _open(path: Path) -> Any:
    import safetensors

    return safetensors.safe_open(str(path), framework="pt")
