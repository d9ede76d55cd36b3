"""What Hugging Face's hooks collect, through the trainer: trained with, and predicted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from training import relative

from raypipe import PipelineTrainer


def mixtral() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        use_cache=False,
    )
    return transformers.MixtralForCausalLM(config)


def test_router_logits_train_as_unsplit() -> None:
    model = mixtral()
    ids = torch.randint(0, 64, (4, 7))
    batch = {"input_ids": ids, "labels": ids}
    whole = copy.deepcopy(model).train()
    loss = whole(**batch).loss
    loss.backward()
    optimizer = torch.optim.SGD(whole.parameters(), lr=1.0)
    optimizer.step()
    with PipelineTrainer(
        model,
        stages=3,
        microbatches=1,
        backend="local",
        optimizer=lambda named: torch.optim.SGD(named, lr=1.0),
    ) as trainer:
        assert trainer.train_step(batch)["loss"] == pytest.approx(loss.item(), rel=1e-6)
        found = trainer.state_dict()
    for name, tensor in whole.state_dict().items():
        assert relative(found[name], tensor) < 1e-5, name


def test_hidden_states_are_predicted_as_unsplit() -> None:
    model = mixtral().eval()
    model.config.output_router_logits = False  # a row for each token: microbatches' could not be joined
    ids = torch.randint(0, 64, (4, 7))
    batch = {"input_ids": ids, "output_hidden_states": True}
    with torch.no_grad():
        wanted = model(**batch).hidden_states
    with PipelineTrainer(model, stages=2, microbatches=2, backend="local") as trainer:
        (found,) = trainer.predict([batch])
    assert len(found["hidden_states"]) == len(wanted) == 3
    for one, other in zip(found["hidden_states"], wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("stages", [1, 3])
def test_router_logits_by_microbatches_that_count_by_their_samples(stages: int) -> None:
    model = mixtral()
    ids = torch.randint(0, 64, (6, 7))
    labels = ids.clone()
    labels[0, 3:] = -100
    whole = copy.deepcopy(model).train()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 6)):  # the loss compares tokens with each other: this is another loss, said so
        loss = whole(input_ids=ids[rows], labels=labels[rows]).loss * 3 / 6
        loss.backward()
        total += loss.item()
    torch.optim.SGD(whole.parameters(), lr=1.0).step()
    with PipelineTrainer(
        model,
        stages=stages,
        microbatches=2,
        microbatch_weight="samples",
        backend="local",
        optimizer=lambda named: torch.optim.SGD(named, lr=1.0),
    ) as trainer:
        assert trainer.train_step({"input_ids": ids, "labels": labels})["loss"] == pytest.approx(total, rel=1e-6)
        found = trainer.state_dict()
    for name, tensor in whole.state_dict().items():
        assert relative(found[name], tensor) < 1e-5, name


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        use_cache=False,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, use_cache=False, decoder_start_token_id=0
    )
    config._attn_implementation = "eager"
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("make", [llama, t5])
def test_hidden_states_and_attentions_are_predicted_as_unsplit(make: Any, stages: int) -> None:
    model = make().eval()
    ids = torch.randint(0, 64, (4, 7))
    batch = {"input_ids": ids, "output_hidden_states": True, "output_attentions": True}
    if make is t5:
        batch["decoder_input_ids"] = torch.randint(0, 64, (4, 5))
    with torch.no_grad():
        wanted = model(**batch)
    names = [name for name in wanted if name.endswith(("hidden_states", "attentions"))]
    assert len(names) == (5 if make is t5 else 2)
    with PipelineTrainer(model, stages=stages, microbatches=2, backend="local") as trainer:
        (found,) = trainer.predict([batch])
    for name in names:
        assert len(found[name]) == len(wanted[name])
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-6)
