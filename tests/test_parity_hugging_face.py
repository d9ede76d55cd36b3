"""Hugging Face models of many families, unmodified, against themselves unsplit: one step, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from families import FAMILIES, padded, text_batch
from parity import EVERY, Case, assert_exact, batch_step, cuts_of, split_step
from torch import Tensor

NAMES = list(FAMILIES)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable:FutureWarning"
)  # another name since 5.23


def some_fast(names: Iterable[str], fast: str) -> list[Any]:
    """Each name as a parameter; those that are not in ``fast`` run with the slow tests."""
    return [pytest.param(name, marks=() if name in fast.split() else pytest.mark.slow) for name in names]


def case_of(name: str, batch: dict[str, Tensor] | None = None, **changes: Any) -> Case:
    family = FAMILIES[name]
    return Case(family.build(**changes), family.batch() if batch is None else batch)


@pytest.mark.parametrize("name", NAMES)
def test_some_cuts(name: str) -> None:
    assert_exact(lambda: case_of(name), cuts_of(NAMES.index(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_cut(name: str) -> None:
    assert_exact(lambda: case_of(name), EVERY)


@pytest.mark.parametrize("name", some_fast((name for name in NAMES if name != "albert"), "gpt2 mixtral t5"))
def test_their_own_gradient_checkpointing(name: str) -> None:
    case = case_of(name)
    before = case.model.state_dict()
    case.model.gradient_checkpointing_enable()  # type: ignore[operator]
    checkpointed = [module for module in case.model.modules() if getattr(module, "gradient_checkpointing", False)]
    assert checkpointed
    assert list(before) == list(case.model.state_dict())
    assert_exact(lambda: case, [(3, "1f1b", 4)])


@pytest.mark.parametrize("name", some_fast(["llama", "t5", "gpt_neox"], "llama"))
def test_checkpointing_with_dropout_draws_the_same_numbers_again(name: str) -> None:
    plain = case_of(name, dropout=0.2, attn_implementation="eager")
    wanted = split_step(plain, 2, "1f1b", 2)
    plain.model.gradient_checkpointing_enable()  # type: ignore[operator]
    found = split_step(plain, 3, "1f1b", 2)
    assert found.loss == wanted.loss
    for key, gradient in wanted.gradients.items():
        assert gradient is not None
        torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-4, atol=1e-7)


EDGES = {
    "left padding": text_batch(8, left=True),
    "a full microbatch before a padded one": text_batch(8, lengths=(12, 12, 5, 9)),
    "a padded microbatch before a full one": text_batch(8, lengths=(3, 12, 12, 12, 12, 7, 12, 12)),
    "no padding in any row": text_batch(8, lengths=(12,)),
    "no mask": {k: v for k, v in text_batch(8).items() if k != "attention_mask"},
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", some_fast(["gpt2", "gemma2", "gpt_neox", "mixtral"], "gpt2"))
def test_padding(name: str, edge: str) -> None:
    """Where a mask is full, the model takes a path without one, at the same shapes."""
    assert_exact(lambda: case_of(name, EDGES[edge]), [(3, "1f1b", 4)])


@pytest.mark.parametrize(
    "name", some_fast(["bert_masked", "bert_classifier", "albert", "t5", "bart"], "bert_classifier t5")
)
@pytest.mark.parametrize("lengths", [(12, 12, 5, 9), (12,)], ids=["some full", "all full"])
def test_padding_of_an_encoder(name: str, lengths: tuple[int, ...]) -> None:
    batch = {**FAMILIES[name].batch(), **padded(8, lengths=lengths)}
    assert_exact(lambda: case_of(name, batch), [(3, "1f1b", 4)])


@pytest.mark.parametrize("name", some_fast(["llama", "bert_masked", "mixtral", "t5", "whisper"], "bert_masked"))
def test_eager_attention(name: str) -> None:
    assert_exact(lambda: case_of(name, attn_implementation="eager"), [(3, "gpipe", 2)])


def test_windows_and_caps_of_gemma_matter() -> None:
    """So the rows above are longer than the window, and a cut that lost the one or the other would be seen."""
    wanted = batch_step(case_of("gemma2")).loss
    assert batch_step(case_of("gemma2", sliding_window=64)).loss != wanted
    assert batch_step(case_of("gemma2", final_logit_softcapping=0.01)).loss != wanted


@pytest.mark.parametrize(
    "name", some_fast(["gpt2", "llama", "mixtral", "bert_classifier", "t5", "vit"], "gpt2 mixtral")
)
def test_models_in_bfloat16_come_near(name: str) -> None:
    case = case_of(name)
    case.model.to(torch.bfloat16)
    case = Case(case.model, _halved(case.batch), {"microbatch_weight": "targets"})
    wanted, found = batch_step(case), split_step(case, 3, "1f1b", 4)
    assert found.loss == pytest.approx(wanted.loss, rel=2e-2)
    biggest = max(float(g.norm()) for g in wanted.gradients.values() if g is not None)
    for key, gradient in wanted.gradients.items():
        own = found.gradients[key]
        assert gradient is not None
        assert own is not None
        assert own.dtype is torch.bfloat16
        assert float((own - gradient).norm()) < 0.1 * max(float(gradient.norm()), 0.1 * biggest), key


def _halved(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
