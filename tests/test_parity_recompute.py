"""Recomputing changes no bit of a training, whatever the schedule, and keeps as many bytes as the plan says."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training import GPT, Run, batches_of_tokens, gpt, piped, trainer_of

from raypipe.driver.cluster import Session
from raypipe.stage.slice import Slice

adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)
SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv")


def model_of(name: str) -> nn.Module:
    return gpt(layers=4, dropout=0.1) if name == "gpt" else FAMILIES[name].build(dropout=0.1, **_MORE.get(name, {}))


_MORE: dict[str, dict[str, Any]] = {"llama": {"num_hidden_layers": 4}}


def batches_of(name: str, count: int = 3) -> list[Any]:
    return batches_of_tokens(count) if name == "gpt" else [FAMILIES[name].batch(8, seed=s) for s in range(count)]


def run(name: str, **options: Any) -> Run:
    told = {"stages": 2, "microbatches": 4, "optimizer": adamw, "max_grad_norm": 0.5, **options}
    return piped(model_of(name), batches_of(name), **told)


@functools.cache
def kept_whole(name: str, schedule: str = "1f1b") -> Run:
    return run(name, schedule=schedule)


def assert_bits(found: Run, wanted: Run) -> None:
    assert (found.losses, found.norms) == (wanted.losses, wanted.norms)
    for key, tensor in wanted.state.items():
        assert torch.equal(found.state[key], tensor), key


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gpt_with_dropout(schedule: str) -> None:
    assert_bits(run("gpt", schedule=schedule, recompute="full"), kept_whole("gpt"))


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("llama", "1f1b"),
        ("t5", "zbv"),
        *(
            pytest.param(name, schedule, marks=pytest.mark.slow)
            for name, schedule in itertools.product(("llama", "t5"), SCHEDULES)
            if (name, schedule) not in (("llama", "1f1b"), ("t5", "zbv"))
        ),
    ],
)
def test_hugging_face_models_with_dropout(name: str, schedule: str) -> None:
    """T5's shared embedding sums in an order of its schedule's own."""
    assert_bits(run(name, schedule=schedule, recompute="full"), kept_whole(name, schedule))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert_masked", "vit"])
@pytest.mark.slow
def test_other_families(name: str) -> None:
    assert_bits(run(name, recompute="full"), kept_whole(name))


def test_a_cache_that_units_fill() -> None:
    """Keys appended a second time would be attended to."""
    model = FAMILIES["llama"].build(use_cache=True)
    batches = batches_of("llama", 2)
    options: dict[str, Any] = {"microbatches": 2, "optimizer": adamw}
    with trainer_of(model, 2, recompute="full", example=batches[0], **options) as trainer:
        assert len(trainer.plan().recomputed.units) >= 3
    assert_bits(piped(model, batches, 2, recompute="full", **options), piped(model, batches, 2, **options))


@pytest.mark.ray
def test_over_ray(ray_session: Session) -> None:
    found = run("gpt", schedule="zbv", recompute=lambda name: name.startswith("blocks"), backend="ray")
    assert_bits(found, kept_whole("gpt"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_model_that_checkpoints_its_layers_itself() -> None:
    wanted = kept_whole("llama")
    model = model_of("llama")
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    found = piped(model, batches_of("llama"), 2, microbatches=4, optimizer=adamw, max_grad_norm=0.5, recompute="full")
    assert_bits(found, wanted)


class Nested(nn.Module):
    """A block that checkpoints a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.BatchNorm1d(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(lambda y: self.outer(torch.tanh(self.inner(y))), self.norm(x), use_reentrant=False)


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_nested_checkpoints_and_running_statistics(schedule: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Nested() for _ in range(4)))
    batches = [(torch.rand(8, 8), torch.rand(8, 8)) for _ in range(3)]
    told: dict[str, Any] = {"loss": nn.functional.mse_loss, "batch_norm": "microbatch", "schedule": schedule}
    told |= {"microbatches": 4, "optimizer": adamw}
    with trainer_of(model, 2, recompute="full", example=batches[0], **told) as trainer:
        assert len(trainer.plan().recomputed.units) == 4
    found, wanted = (piped(model, batches, 2, recompute=how, **told) for how in ("full", "none"))
    assert int(wanted.state["0.norm.num_batches_tracked"]) == 12
    assert_bits(found, wanted)


@contextmanager
def counted(counts: dict[int, int]) -> Iterator[None]:
    """By chunk that runs meanwhile, the bytes that its forward keeps of a microbatch."""
    run = Slice.run

    def counting(self: Slice, batch: Any, planned: Any, chunk: int, received: Any, seeds: Any) -> Any:
        resident = {t.untyped_storage()._cdata for t in (*self.model.parameters(), *self.model.buffers())}
        alive: list[Tensor] = [tensor for tensor in received if tensor.requires_grad]

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage()._cdata not in resident:
                alive.append(tensor)
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            made, outputs = run(self, batch, planned, chunk, received, seeds)
        alive += planned.boundaries[chunk + 1].roots(made)
        sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive}
        # Microbatches are views of one batch; a microbatch's part is its own.
        parts = {t.untyped_storage()._cdata: t.nbytes for t in batch.values()}
        counts[chunk] = sum(parts.get(storage, size) for storage, size in sizes.items())
        return made, outputs

    Slice.run = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Slice.run = run  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_as_many_bytes_as_planned(name: str) -> None:
    """What each chunk keeps of a microbatch, to the byte; and it falls."""
    model, batch = model_of(name), batches_of(name, 1)[0]
    seen = {}
    for how in ("none", "full"):
        counts: dict[int, int] = {}
        with trainer_of(model, 2, recompute=how, microbatches=2, schedule="gpipe", example=batch) as trainer:
            planned = [stage.activations_bytes for stage in trainer.plan().stages]
            with counted(counts):
                trainer.train_step(batch)
        seen[how] = [counts[0], counts[1]]
        assert seen[how] == planned, how
    assert seen["full"][0] < 0.5 * seen["none"][0]


plain_sgd = functools.partial(torch.optim.SGD, lr=0.1, foreach=False)  # no copies of all gradients at one time


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of all storages that kernels make and that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage.nbytes())
        return result

    def freed(self, count: int) -> None:
        self.now -= count


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_the_peak_of_a_step_falls_as_planned(schedule: str) -> None:
    """Whole backwards have one unit's activations at a time; from I to W a microbatch has all of them."""
    planned, measured = [], []
    torch.manual_seed(0)
    model = GPT(vocabulary=61, width=32, layers=6, heads=2, length=32, dropout=0.1, tied=False)
    batches = batches_of_tokens(2, samples=32, length=32)
    for how in ("none", "full"):
        told: dict[str, Any] = {"schedule": schedule, "microbatches": 4, "optimizer": plain_sgd}
        with trainer_of(model, 1, recompute=how, example=batches[0], **told) as trainer:
            stage = trainer.plan().stages[0]
            trainer.train_step(batches[0])
            with Live() as live:
                trainer.train_step(batches[1])
        planned.append(stage.peak_activations_bytes + stage.recompute_bytes)
        measured.append(live.peak)
    # At the end of I, where a chunk's units have all run again, what only I needed is gone.
    near = (0.03 if schedule == "1f1b" else 0.15) * planned[0]
    assert measured[0] - measured[1] == pytest.approx(planned[0] - planned[1], abs=near)
    assert planned[1] < 0.4 * planned[0] if schedule == "1f1b" else planned[1] == planned[0]
