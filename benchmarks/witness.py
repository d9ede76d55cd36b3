"""What a rank's process holds, told from inside it: an optimizer that writes it down after each step."""

from __future__ import annotations

import ctypes
import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["Note", "Witness", "read_witness", "witness"]

Note = dict[str, Any]
"""Of one rank: ``names``, and bytes: ``weights``, ``parameters_here``, ``peak_building``, ``peak``."""

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Witness(torch.optim.SGD):
    """SGD that changes nothing and notes, in a file of ``folder``, memory and weights of its process.

    It is made when the rank has got its weights. ``alive``: from then on what is freed goes back at once, so that the
    process's memory is what is alive in it; else it is as a user has it.
    """

    def __init__(self, parameters: Any, folder: str, alive: bool) -> None:
        parameters = list(parameters)
        if alive:
            _give_back_at_once()
        super().__init__([p for _, p in parameters], lr=0.0)
        self._folder = Path(folder)
        self._noted: Note = {
            "names": [name for name, _ in parameters],
            "weights": sum(p.numel() * p.element_size() for _, p in parameters),
            "peak_building": _memory("VmHWM"),
        }

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Notes, and steps."""
        super().step(closure)
        if "parameters_here" not in self._noted:
            self._noted["parameters_here"] = _parameter_bytes()
        self._noted["peak"] = _memory("VmHWM")
        (self._folder / f"{os.getpid()}.json").write_text(json.dumps(self._noted))


def witness(folder: str, alive: bool = True) -> Callable[[Any], Witness]:
    """An ``optimizer`` for a trainer."""
    return _Maker(folder, alive)


def read_witness(folder: str) -> list[Note]:
    """What each rank noted last, by stage: parameters are named by their place in the model."""
    # The driver tries the optimizer too, to know the size of its state.
    paths = [path for path in Path(folder).glob("*.json") if path.stem != str(os.getpid())]
    notes = [json.loads(path.read_text()) for path in paths]
    return sorted(notes, key=lambda note: int(note["names"][0].partition(".")[0]))


class _Maker:
    def __init__(self, folder: str, alive: bool) -> None:
        self._folder, self._alive = folder, alive

    def __call__(self, parameters: Any) -> Witness:
        return Witness(parameters, self._folder, self._alive)


def _memory(key: str) -> int:
    """Bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}; this benchmark needs Linux")


def _give_back_at_once() -> None:
    """From now on glibc maps every tensor of 256 KiB or more by itself.

    A rank keeps what is freed for later, in pieces: the process's memory is then not that of what it holds.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 256 * 1024)


def _parameter_bytes() -> int:
    """Of all parameters with memory of their own that this process holds, whoever holds them.

    A husk, and a parameter of a recording, is a class of its own and has none.
    """
    gc.unfreeze()  # a rank freezes what it has when it starts, and the collector then does not list it
    found = {id(each): each for each in gc.get_objects() if type(each) is nn.Parameter}
    return sum(each.numel() * each.element_size() for each in found.values())
