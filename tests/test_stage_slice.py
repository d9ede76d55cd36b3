"""Slices of whole models: the example GPT, and Hugging Face's as they are."""

from __future__ import annotations

import copy
from pipes import Pipe, Stack, assert_equal_cuts, assert_exact, batch
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import batches_of_tokens, gpt

from raypipe.errors import CutError
from raypipe.model.husk import Husk
from raypipe.stage.slice import signature


def tokens() -> dict[str, Tensor]:
    return batches_of_tokens(1, 2)[0]


@pytest.mark.parametrize("tied", [True, False])
def test_the_example_gpt(tied: bool) -> None:
    assert_exact(gpt(dropout=0.0, tied=tied), tokens(), chunks=(1, 2, 4) if tied else (3,))


def test_the_example_gpt_with_dropout_is_the_same_for_every_cut() -> None:
    assert_equal_cuts(gpt(dropout=0.3, tied=False), tokens(), chunks=(1, 3))


def test_a_slice_holds_its_own_weights_only() -> None:
    pipe = Pipe(gpt(tied=True), tokens(), 3)
    names = [set(piece.parameters) for piece in pipe.slices]
    assert names[0] & names[2] == {"embedding.weight"}
    assert not names[0] & names[1]
    assert set.union(*names) == set(dict(gpt(tied=True).named_parameters()))
    for piece in pipe.slices:
        assert all(name in piece.parameters or isinstance(p, Husk) for name, p in piece.model.named_parameters())


def test_a_recording_is_made_once_for_a_signature() -> None:
    pipe, given = Pipe(gpt(), tokens(), 2), tokens()
    piece = pipe.slices[0]
    planned = piece.planned(given)
    assert piece.planned({name: t + 1 for name, t in given.items()}) is planned
    assert piece.planned({name: t[:, :8] for name, t in given.items()}) is not planned
    with torch.no_grad():
        assert piece.planned(given) is not planned
    piece.set_training(False)
    assert piece.planned(given) is not planned
    assert signature({"a": [1], "b": "x"}) != signature({"a": [1.0], "b": "x"})


def test_another_number_of_unit_calls_is_refused() -> None:
    def run(model: Any, x: Tensor) -> Tensor:
        for block in model.blocks[: len(x)]:
            x = block(x)
        return x

    piece = Pipe(Stack(run), batch(), 2).slices[0]
    with pytest.raises(CutError, match=r"makes 2 unit calls for this batch and made 4"):
        piece.planned({name: t[:2] for name, t in batch().items()})


def family(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A Hugging Face model of a few thousand weights, and a batch with padding and ignored labels."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 90, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": 16}
    made = {
        "GPT2": lambda t: t.GPT2LMHeadModel(
            t.GPT2Config(
                n_embd=32, n_layer=2, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small
            )
        ),
        "Llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(num_key_value_heads=2, **llama, **small)),
        "Mixtral": lambda t: t.MixtralForCausalLM(
            t.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **llama, **small)
        ),
        "T5": lambda t: t.T5ForConditionalGeneration(
            t.T5Config(
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                dropout_rate=0,
                decoder_start_token_id=0,
                **small,
            )
        ),
        "Albert": lambda t: t.AlbertForMaskedLM(t.AlbertConfig(**bert, **llama, **small)),
    }
    model = made[name](transformers).train()
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(8) < torch.tensor([[5], [8]])).long()
    return model, {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mixtral", "T5", "Albert"])
def test_hugging_face_models_as_they_are(name: str) -> None:
    model, given = family(name)
    assert_exact(model, given, chunks=(3,))


def test_hugging_face_checkpointing() -> None:
    model, given = family("Llama")
    model.config.attention_dropout = 0.3
    pipe = Pipe(model, given, 2)
    loss, gradients = pipe.train(given)
    for reentrant in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = lambda function, *args, reentrant=reentrant: (
                    torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)
                )
        own_loss, own = Pipe(model, given, 3).train(given)
        assert torch.equal(own_loss, loss)
        torch.testing.assert_close(own, gradients)


def capturing(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
            attn_implementation="eager",
        )
        return transformers.ViTModel(config), {"pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "Bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=90
        )
        config._attn_implementation = "eager"
        return transformers.BertModel(config), {"input_ids": torch.arange(10).view(2, 5)}
    model, given = family(name)
    model.set_attn_implementation("eager")
    return model, {key: tensor for key, tensor in given.items() if key != "labels" or name == "T5"}


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert", "T5", "ViT", "Mixtral"])
def test_hidden_states_and_attentions_are_the_unsplit_models(name: str) -> None:
    model, given = capturing(name)
    asked = {**given, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    if name in ("Bert", "ViT"):
        del asked["use_cache"]
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(**asked)
    keys = [key for key in wanted if key.endswith(("hidden_states", "attentions")) and len(wanted[key])]
    assert len(keys) >= 2
    for chunks in (1, 3):
        got = Pipe(model, asked, chunks).predict(asked)
        for key in keys:
            assert len(got[key]) == len(wanted[key])
            for one, other in zip(got[key], wanted[key], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_router_logits_train_exactly(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, given = family("Mixtral")
    if name == "Qwen3Moe":
        config = transformers.Qwen3MoeConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_experts=4,
            num_experts_per_tok=2,
            vocab_size=90,
            router_aux_loss_coef=0.5,
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    model.config.output_router_logits = True
    assert_exact(model, given)


def test_a_cache_is_not_returned_in_part() -> None:
    model, given = family("Mixtral")
    del given["labels"]
    assert Pipe(model, given, 2).predict(given).past_key_values is None
