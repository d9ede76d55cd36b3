"""A model that a callable builds on the ranks, against itself however it is cut and against the unsplit model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor, nn
from training import batches_of_tokens, gpt, piped, trainer_of, unsplit

from raypipe.driver.cluster import Session

sgd = functools.partial(torch.optim.SGD, lr=0.1)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(**batch)
    loss: Tensor = outputs if isinstance(outputs, Tensor) else outputs.loss
    return loss


def initial(make: Any, stages: int, batch: Any, **options: Any) -> dict[str, Any]:
    """The weights after a prediction, which changes none: as the ranks made them."""
    with trainer_of(make, stages, **options) as trainer:
        next(iter(trainer.predict([batch])))
        state: dict[str, Any] = trainer.state_dict()
        return state


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_do_not_depend_on_the_number_of_stages(tied: bool) -> None:
    make, batch = functools.partial(gpt, tied=tied), batches_of_tokens(1)[0]
    with trainer_of(make, 2, seed=7) as trainer:
        unstarted = trainer.state_dict()
    for stages in (1, 2, 3, 4):
        assert_equal(initial(make, stages, batch, seed=7), unstarted)
    other = initial(make, 2, batch, seed=8)
    assert not torch.equal(other["embedding.weight"], unstarted["embedding.weight"])


@pytest.mark.ray
def test_weights_are_the_same_over_ray(ray_session: Session) -> None:
    make, batch = functools.partial(gpt, tied=True), batches_of_tokens(1)[0]
    assert_equal(initial(make, 3, batch, backend="ray"), initial(make, 2, batch))


@pytest.mark.parametrize(
    "name",
    ["gpt2", "t5", "vit", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "bert_masked", "whisper"))],
)
def test_training_is_that_of_the_unsplit_model(name: str) -> None:
    family = FAMILIES[name]
    assert_trains_alike(family.build, [family.batch()])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_gpt_trains_as_the_unsplit_model(tied: bool) -> None:
    assert_trains_alike(functools.partial(gpt, tied=tied), batches_of_tokens(2))


def assert_trains_alike(make: Any, batches: list[Any]) -> None:
    options: dict[str, Any] = {"optimizer": sgd, "microbatches": 2}
    with trainer_of(make, 3, **options) as trainer:
        start = trainer.state_dict()
        losses = [trainer.train_step(batch)["loss"] for batch in batches]
        end = trainer.state_dict()
    whole: nn.Module = make()
    whole.load_state_dict(start)  # no key is missing or unexpected
    wanted = unsplit(whole, batches, sgd, loss=own_loss)
    assert losses == pytest.approx(wanted.losses, rel=1e-6)
    for key, tensor in wanted.state.items():
        if tensor.is_floating_point():
            # The bias of an attention's keys has a gradient of rounding errors alone.
            assert (end[key] - tensor).norm() < 1e-5 * tensor.norm().clamp_min(1e-3), key
    given = piped(whole, batches, 3, **options)
    assert given.losses == losses
    assert_equal(end, given.state)


class Driver(nn.Module):
    def __init__(self, *, foreign: Any = None) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        if foreign is not None:
            self.extra = nn.Parameter(foreign())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: 3, TypeError, "returned a int"),
        (nn.Linear, TypeError, "the class Linear"),
        (3, TypeError, "model is a int"),
        (lambda: 1 // 0, ZeroDivisionError, "division"),
        (lambda size: nn.Linear(size, size), TypeError, "argument"),
        (lambda: Driver(foreign=lambda: torch.empty(3, device="meta")), ValueError, "extra .* is on the device meta"),
        (lambda: Driver(foreign=lambda: torch.from_numpy(__import__("numpy").ones(2**24))), ValueError, "128 MiB"),
    ],
)
def test_a_callable_that_cannot_be_used_is_refused_in_one_sentence(
    make: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trainer_of(make, 2)
