"""Models of every kind made by a callable on the ranks, against the unsplit model with the same weights."""

from __future__ import annotations

import functools
from typing import Any

import home_made_modules
import home_made_networks
import pytest
import torch
from home_made import CASES
from parity import Case, Keeping, Step, assert_same_step, batch_step
from test_parity_trainable import MODELS, Normed, assert_same, batches, model_of, own_loss
from torch import nn
from training import Run, batches_of_tokens, gpt, piped, trainer_of, unsplit

__all__ = ["home_made_modules", "home_made_networks"]  # their cases register themselves

FAST = ("unet", "recurrent", "weight_norm", "batch_norm_frozen", "checkpointed_by_hand", "attention_by_itself")
sgd = functools.partial(torch.optim.SGD, lr=0.1)


def made(name: str) -> nn.Module:
    return CASES[name]().model


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES])
def test_a_step_is_that_of_the_unsplit_model(name: str) -> None:
    case = CASES[name]()
    kept: dict[str, Any] = {}
    options: dict[str, Any] = {"microbatches": 2, "optimizer": lambda named: Keeping(named, kept), **case.options}
    with trainer_of(functools.partial(made, name), min(3, case.most_stages), **options) as trainer:
        start = {key: tensor.clone() for key, tensor in trainer.state_dict().items()}
        loss = trainer.train_step(case.batch)["loss"]
    case.model.load_state_dict(start)
    assert_same_step(Step(loss, kept), batch_step(Case(case.model, case.batch, case.options)))


@pytest.mark.parametrize("name", MODELS)
def test_training_in_part(name: str) -> None:
    given = batches(3)
    with trainer_of(functools.partial(model_of, name), 3, microbatches=3, optimizer=sgd) as trainer:
        start = {key: tensor.clone() for key, tensor in trainer.state_dict().items()}
        metrics = [trainer.train_step(batch) for batch in given]
        found = Run([m["loss"] for m in metrics], [m["grad_norm"] for m in metrics], trainer.state_dict())
    whole = model_of(name)
    whole.load_state_dict(start)
    assert_same(found, unsplit(whole, given, sgd, loss=own_loss), whole)


def normed(*, frozen: bool) -> nn.Module:
    model = Normed().train()
    model.blocks[1].train(not frozen)
    return model


@pytest.mark.parametrize(
    ("frozen", "options"),
    [
        (True, {"microbatches": 3}),
        (False, {"microbatches": 2, "batch_norm": "microbatch"}),
        (False, {"microbatches": 1}),
    ],
    ids=["frozen", "of-the-microbatch", "whole-batch"],
)
def test_batch_norm_is_that_of_a_given_instance(frozen: bool, options: dict[str, Any]) -> None:
    given, make = batches(2), functools.partial(normed, frozen=frozen)
    with trainer_of(make, 3, optimizer=sgd, **options) as trainer:
        start = {key: tensor.clone() for key, tensor in trainer.state_dict().items()}
        losses, end = [trainer.train_step(batch)["loss"] for batch in given], trainer.state_dict()
    whole = make()
    whole.load_state_dict(start)
    wanted = piped(whole, given, 3, optimizer=sgd, **options)
    assert losses == wanted.losses
    assert all(torch.equal(end[key], tensor) for key, tensor in wanted.state.items())
    tracked = end["blocks.1.1.num_batches_tracked"]
    assert tracked == (0 if frozen else 2 * options["microbatches"])


def test_batch_norm_over_microbatches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1\.1 is a Swapped, whose statistics over a microbatch"):
        trainer_of(lambda: Normed(), 2, microbatches=2).train_step(batches(1)[0])


def half() -> nn.Module:
    return gpt().to(torch.bfloat16)


def test_bfloat16_made_inside_the_callable() -> None:
    given = batches_of_tokens(2)
    options: dict[str, Any] = {"optimizer": sgd, "microbatches": 2}
    with trainer_of(half, 3, **options) as trainer:
        start = {key: tensor.clone() for key, tensor in trainer.state_dict().items()}
        losses, end = [trainer.train_step(batch)["loss"] for batch in given], trainer.state_dict()
    whole = half()
    whole.load_state_dict(start)
    wanted = piped(whole, given, 2, **options)
    assert losses == wanted.losses
    assert all(end[key].dtype is tensor.dtype and torch.equal(end[key], tensor) for key, tensor in wanted.state.items())
    exact = unsplit(whole, given, sgd, loss=lambda model, batch: model(**batch))
    assert losses == pytest.approx(exact.losses, rel=1e-2)
