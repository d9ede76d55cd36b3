"""Hugging Face models trained for some steps: bits that do not depend on the cut, Ray, predictions, and generation."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from families import FAMILIES, text_batch
from torch import Tensor, nn
from training import Run, piped, trainer_of, unsplit

from raypipe.driver.cluster import Session

# Attention's key bias has a gradient of rounding errors alone, which a small eps would blow up to full steps.
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, eps=1e-4)


def some_fast(names: Iterable[str], fast: str) -> list[Any]:
    """Each name as a parameter; those that are not in ``fast`` run with the slow tests."""
    return [pytest.param(name, marks=() if name in fast.split() else pytest.mark.slow) for name in names]


@functools.cache
def a_run(name: str, stages: int, schedule: str, backend: str = "local") -> Run:
    """Three steps with dropout and clipping."""
    family = FAMILIES[name]
    batches = [family.batch(8, seed=seed) for seed in range(3)]
    return piped(
        family.build(dropout=0.1),
        batches,
        stages,
        schedule=schedule,
        backend=backend,
        microbatches=4,
        optimizer=adamw,
        max_grad_norm=0.5,
    )


def assert_same_run(name: str, found: Run, wanted: Run) -> None:
    """Bit-equal; where weights are shared among stages, the sum of their gradients has another order."""
    shared = FAMILIES[name].shared
    assert found.losses == (pytest.approx(wanted.losses, rel=1e-6) if shared else wanted.losses)
    for key, tensor in wanted.state.items():
        if shared:
            torch.testing.assert_close(found.state[key], tensor, rtol=1e-6, atol=1e-6, msg=key)
        else:
            assert torch.equal(found.state[key], tensor), key


CUTS = [(1, "1f1b"), (2, "1f1b"), (3, "1f1b"), (4, "1f1b"), (2, "gpipe"), (4, "gpipe")]


@pytest.mark.parametrize("name", some_fast(FAMILIES, "llama vit"))
def test_the_cut_does_not_change_a_bit(name: str) -> None:
    wanted = a_run(name, 1, "gpipe")
    for stages, schedule in CUTS if not FAMILIES[name].shared else CUTS[1:4]:
        assert_same_run(name, a_run(name, stages, schedule), wanted)


def test_dropout_was_on() -> None:
    family = FAMILIES["llama"]
    with trainer_of(family.build(), 1, optimizer=adamw, microbatches=4) as trainer:
        assert trainer.train_step(family.batch(8, seed=0))["loss"] != a_run("llama", 1, "gpipe").losses[0]


@pytest.mark.ray
@pytest.mark.parametrize("name", some_fast(FAMILIES, "mixtral"))
def test_over_ray(ray_session: Session, name: str) -> None:
    stages = 4 if name in ("llama", "vit") else 2
    assert_same_run(name, a_run(name, stages, "1f1b", "ray"), a_run(name, stages, "1f1b"))


@pytest.mark.parametrize("name", some_fast(["gpt2", "llama", "gemma2", "mixtral", "t5", "bart"], "gpt2 t5"))
def test_generation_after_training(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    batches = [family.batch(8, seed=seed) for seed in range(3)]
    loss = lambda model, batch: model(**batch).loss  # noqa: E731
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(unsplit(model, batches, adamw, loss=loss).state)
    state = piped(model, batches, 3, optimizer=adamw, microbatches=4).state
    trained = copy.deepcopy(model)
    trained.load_state_dict(state)
    prompt = {key: batches[0][key][:1, :4] for key in ("input_ids", "attention_mask")}
    assert torch.equal(_generated(trained, prompt), _generated(wanted, prompt))
    assert any(not torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def _generated(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    return model.eval().generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator, no-any-return]


@torch.no_grad()
def _predicted(name: str, batch: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    model = FAMILIES[name].build()
    with trainer_of(model, 3, microbatches=1) as trainer:
        found = next(iter(trainer.predict([{**batch, **options}])))
    return found, model.eval()(**batch, **options)


@pytest.mark.parametrize("name", some_fast(FAMILIES, "bert_classifier whisper"))
def test_predictions(name: str) -> None:
    found, wanted = _predicted(name, FAMILIES[name].batch())
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_cache_comes_whole_or_not_at_all(use_cache: bool) -> None:
    """The keys of another stage's blocks are not there; a cache with a part of them would be wrong in silence."""
    found, wanted = _predicted("llama", text_batch(), use_cache=use_cache)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-6)
    assert (wanted.past_key_values is not None) == use_cache
    assert found.past_key_values is None
