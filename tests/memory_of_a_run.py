"""A driver as a process of its own: ``python memory_of_a_run.py KIND WIDTH FOLDER`` prints its memory as JSON.

``KIND`` is how the model is given; ``FOLDER`` holds a folder ``notes``, and ``weights`` for a pretrained model. Peaks
are Linux's VmHWM, in bytes: all pages of a process that were resident at once, those of mapped files and of the object
store that it has touched included. Each rank's are noted by its optimizer, which is made when the rank has its weights,
and steps with their gradients beside them.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raypipe import PipelineTrainer, from_pretrained

BLOCKS, STAGES = 12, 4
CALLS = {"pretrained": [4, 3, 3, 5]}  # embedding, blocks, norm, head


def peak() -> int:
    """Of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def build(width: int) -> nn.Sequential:
    """Equal blocks of ``width * width`` float32 numbers."""
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(BLOCKS)))


def save_llama(width: int, folder: Path) -> int:
    """A Llama whose blocks hold nearly all of it, in a folder of several files; its bytes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width + width // 4,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="50MB")
    return sum(tensor.numel() * 4 for tensor in model.parameters())


def of_folder(folder: str) -> Any:
    """As a user gives it."""
    import transformers

    return from_pretrained(folder, transformers.LlamaForCausalLM)


def batch_of(kind: str, width: int) -> Any:
    """Two samples."""
    generator = torch.Generator().manual_seed(0)
    if kind != "pretrained":
        return tuple(torch.randn(2, width, generator=generator) for _ in range(2))
    tokens = torch.randint(0, 64, (2, 8), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


class Noting(torch.optim.SGD):
    """SGD without state, which notes its process's peak when it is made and after its first step."""

    def __init__(self, parameters: Any, folder: str) -> None:
        named = list(parameters)
        super().__init__([parameter for _, parameter in named], lr=0.01)
        self._built, self._file = peak(), Path(folder) / named[0][0]

    def step(self, closure: Any = None) -> None:
        """Steps, and notes."""
        super().step(closure)
        self._file.write_text(json.dumps({"built": self._built, "stepped": peak()}))


def models(kind: str, width: int, folder: str) -> Callable[[], Any]:
    """What is given as ``model``, by how it is given."""
    given: dict[str, Callable[[], Any]] = {
        "pretrained": functools.partial(of_folder, folder),
        "callable": lambda: functools.partial(build, width),
        "instance": lambda: build(width),
    }
    return given[kind]


def first_block(parameter: str) -> int:
    """Where a rank's first parameter stands in the model; the embedding has no number."""
    return next((int(part) for part in parameter.split(".") if part.isdigit()), -1)


def main(kind: str, width: int, folder: str) -> None:
    """One step on Ray."""
    batch, notes = batch_of(kind, width), Path(folder) / "notes"
    model = models(kind, width, str(Path(folder) / "weights"))()
    optimizer = functools.partial(Noting, folder=str(notes))
    began = time.monotonic()
    with PipelineTrainer(
        model,
        stages=STAGES,
        loss=None if kind == "pretrained" else nn.functional.mse_loss,
        optimizer=optimizer,
        microbatches=2,
        balance=CALLS.get(kind, [BLOCKS // STAGES] * STAGES),
        datasets={"train": [batch]},
        quiet=True,
    ) as trainer:
        trainer.plan()
        planned, planning = peak(), time.monotonic() - began
        trainer.train_step(batch)
        ranks = {first_block(path.name): json.loads(path.read_text()) for path in notes.iterdir()}
        told = {
            "seconds": [planning, time.monotonic() - began],
            "planned": planned,
            "driver": peak(),
            "ranks": [ranks[key] for key in sorted(ranks)],
        }
        print("\n" + json.dumps(told), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
