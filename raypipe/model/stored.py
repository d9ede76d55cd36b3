"""A model whose tensors lie in the files of a folder: what a rank reads, and how it puts pieces together."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from raypipe.model.assemble import Assembly
from raypipe.model.origin import Promised
from raypipe.model.weight_files import read

__all__ = ["Shelf", "Stored"]


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """Where tensors lie.

    Attributes:
        folder: of the files.
        where: the file of each key.
        keys: the key of each tensor that a file has whole, by the model's name.
        assembled: what is put together from pieces.
        dtypes: of the model's tensors, by name.
    """

    folder: Path
    where: dict[str, str]
    keys: dict[str, str]
    assembled: tuple[Assembly, ...]
    dtypes: dict[str, torch.dtype]

    def has(self, name: str) -> bool:
        """Whether this tensor lies here; else it is one that the files lack."""
        return name in self.dtypes

    def only(self, names: Iterable[str]) -> Shelf:
        """The same for these tensors alone, and for those that are made with them."""
        dtypes = {name: self.dtypes[name] for name in names}
        keys = {name: self.keys[name] for name in dtypes if name in self.keys}
        assembled = tuple(a for a in self.assembled if not dtypes.keys().isdisjoint(a.shapes))
        read_here = [*keys.values(), *(key for assembly in assembled for key in assembly.keys)]
        return Shelf(self.folder, {key: self.where[key] for key in read_here}, keys, assembled, dtypes)

    def read(self) -> dict[str, Tensor]:
        """All of them, in memory of their own; the pieces of one assembly at a time."""
        found = read(self.folder, self.where, self.keys.values())
        own = {name: found[key].to(self.dtypes[name], copy=True) for name, key in self.keys.items()}
        for assembly in self.assembled:
            made = assembly.make(read(self.folder, self.where, assembly.keys))
            # A part may be a view of the pieces, which lie in the mapped file.
            own.update(
                (name, part.to(self.dtypes[name], copy=True).contiguous())
                for name, part in made.items()
                if name in self.dtypes
            )
        return {name: own[name] for name in self.dtypes}


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """An ``Origin`` whose tensors lie in files; what they lack is made by recipes."""

    model: nn.Module
    promised: Promised
    shelf: Shelf
    is_whole: bool = False

    def tensor(self, name: str) -> Tensor:
        """Read anew at each call."""
        return self.share([name])()[name]

    def share(self, names: Iterable[str]) -> Callable[[], dict[str, Tensor]]:
        """Where these tensors lie; they are read where it is called."""
        wanted = list(names)
        stored = self.shelf.only(name for name in wanted if self.shelf.has(name))
        return _Reader(stored, self.promised.share([name for name in wanted if not self.shelf.has(name)]))


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    shelf: Shelf
    rest: Callable[[], dict[str, Tensor]]

    def __call__(self) -> dict[str, Tensor]:
        return {**self.shelf.read(), **self.rest()}
