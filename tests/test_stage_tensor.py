"""Tensor groups through the trainer, on Ray: the unsplit model's losses, norms and weights."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time

import pytest
import torch
from tensor_models import WIDTH, ends, llama, pairs, small, tokens
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from training import gpt

from raypipe import PipelineTrainer, StageError
from raypipe.errors import CutError, StageLost

pytestmark = pytest.mark.ray


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def batch_of(model, ids):
    if type(model).__name__ in ("Small", "GPT"):
        return {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    return {"input_ids": ids, "labels": ids, "use_cache": False}


def trained_whole(model, batches):
    model = copy.deepcopy(model).train()
    optimizer = adamw(model.parameters())
    losses, norms = [], []
    for batch in batches:
        outputs = model(**batch)
        loss = outputs if isinstance(outputs, torch.Tensor) else outputs.loss
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model.state_dict()


def trained(model, batches, stages, ranks, plan=None, **options):
    told = {"optimizer": adamw, "max_grad_norm": 0.5, "microbatches": 2, "quiet": True, **options}
    with PipelineTrainer(model, stages, tensor_parallel=ranks, tensor_parallel_plan=plan, **told) as trainer:
        metrics = [trainer.train_step(batch) for batch in batches]
        evaluated = trainer.evaluate(batches[:1])
        return [m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], trainer.state_dict(), evaluated


def of_the_example():
    """Its attention counts with whole widths and stays whole."""
    columns, rows = ColwiseParallel(), RowwiseParallel()
    return {"blocks.*.mlp.0": columns, "blocks.*.mlp.2": rows, **ends()}


MODELS = {
    "small": (lambda: small(dropout=0.0), pairs),
    "small_by_vocabulary": (lambda: small(tied=True), lambda: {**pairs(), **ends()}),
    "gpt": (lambda: gpt(tied=True).double(), of_the_example),
    "llama": (lambda: llama(), lambda: None),
    "llama_tied": (lambda: llama(tied=True), lambda: None),
}


def assert_trains_like_unsplit(name, stages, ranks, **options):
    make, plan = MODELS[name]
    model = make()
    batches = [batch_of(model, ids) for ids in tokens()]
    losses, norms, state = trained_whole(model, batches)
    found = trained(model, batches, stages, ranks, plan(), **options)
    # Float32 is compared as coarsely as AdamW amplifies its rounding.
    tolerance = 1e-9 if next(iter(state.values())).dtype == torch.float64 else 1e-4
    assert found[0] == pytest.approx(losses, rel=tolerance)
    assert found[1] == pytest.approx(norms, rel=tolerance)
    assert set(found[2]) == set(state)
    for key, value in state.items():
        assert float((found[2][key] - value).norm() / value.norm().clamp_min(1e-30)) < tolerance, key


@pytest.mark.parametrize("name", ["small_by_vocabulary", "llama"])
def test_a_stage_of_two_ranks(ray_session, name) -> None:
    assert_trains_like_unsplit(name, 1, 2)


@pytest.mark.parametrize("name", ["gpt", pytest.param("llama_tied", marks=pytest.mark.slow)])
def test_two_stages_of_two_ranks(ray_session, name) -> None:
    assert_trains_like_unsplit(name, 2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "small_by_vocabulary"])
@pytest.mark.parametrize("schedule", ["zb_h1", "interleaved_1f1b"])
def test_schedules_with_halves_and_chunks(ray_session, name, schedule) -> None:
    assert_trains_like_unsplit(name, 2 if schedule == "zb_h1" else 1, 2, schedule=schedule)


@pytest.mark.slow
def test_four_ranks(ray_session) -> None:
    assert_trains_like_unsplit("llama", 1, 4)


@pytest.mark.slow
def test_residual_dropout_is_that_of_one_rank(ray_session) -> None:
    model = small(dropout=0.3)
    batches = [batch_of(model, ids) for ids in tokens(2)]
    one = trained(model, batches, 1, 1, seed=5)
    two = trained(model, batches, 1, 2, pairs(), seed=5)
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    assert two[3]["loss"] == pytest.approx(one[3]["loss"], rel=1e-5)
    assert one[0] != pytest.approx(trained_whole(model, batches)[0], rel=1e-3)


def test_dropout_of_split_activations_is_refused_before_anything_is_trained(ray_session) -> None:
    model = small(attention_dropout=0.3)
    with pytest.raises((CutError, StageError), match="dropout"):
        trained(model, [batch_of(model, tokens()[0])], 1, 2, pairs())


@pytest.mark.slow
def test_a_callable_model_predicts_and_trains(ray_session) -> None:
    batch = batch_of(small(), tokens()[0])
    with (
        PipelineTrainer(small, 2, quiet=True, microbatches=2) as one,
        PipelineTrainer(
            small, 2, quiet=True, microbatches=2, tensor_parallel=2, tensor_parallel_plan={**pairs(), **ends()}
        ) as two,
    ):
        asked = {"tokens": batch["tokens"]}
        (wanted,), (found,) = list(one.predict([asked])), list(two.predict([asked]))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert two.train_step(batch)["loss"] == pytest.approx(one.train_step(batch)["loss"], rel=1e-5)
        state = one.state_dict()
        for name, value in two.state_dict().items():
            assert float((value - state[name]).norm() / state[name].norm()) < 1e-4, name


class Reporting(torch.optim.AdamW):
    """Writes its process into a file, and is slow."""

    def step(self, closure=None):
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)
        return super().step(closure)


def keep_training(trainer, batch):
    for _ in range(1000):
        trainer.train_step(batch)


@pytest.mark.slow
def test_a_killed_rank_of_a_group_is_the_one_that_is_named(ray_session, tmp_path) -> None:
    path = tmp_path / "processes"

    def optimizer(parameters):
        made = Reporting(parameters, lr=1e-3)
        made.path = str(path)
        return made

    model = small()
    batch = batch_of(model, tokens()[0])
    with PipelineTrainer(
        model, 1, quiet=True, tensor_parallel=2, tensor_parallel_plan=pairs(), optimizer=optimizer
    ) as trainer:
        trainer.train_step(batch)
        victim = int(path.read_text().split()[-1])
        assert victim != os.getpid()
        threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
        began = time.monotonic()
        with pytest.raises(StageLost):
            keep_training(trainer, batch)
        assert time.monotonic() - began < 60


class Fused(nn.Module):
    """Splits the columns of one layer in two: a rank's half of them is another half."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 64), nn.Linear(32, WIDTH)

    def forward(self, x):
        a, b = self.both(x).chunk(2, -1)
        return self.down(a * b.sigmoid())


def test_a_plan_that_is_wrong_in_silence_is_refused(ray_session) -> None:
    model = small()
    model.blocks[1] = Fused()
    plan = {"blocks.1.both": ColwiseParallel(), "blocks.1.down": RowwiseParallel()}
    with pytest.raises((CutError, StageError), match=r"blocks\.1, split among 2 ranks"):
        trained(model, [batch_of(model, tokens()[0])], 1, 2, plan)


def test_the_local_backend_has_no_tensor_groups() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel=2 with backend='local', .*; use backend='ray'"):
        PipelineTrainer(small(), 1, tensor_parallel=2, backend="local")
