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
