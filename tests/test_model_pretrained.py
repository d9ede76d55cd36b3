"""Models from a folder against Hugging Face's own loading, who reads what, and refusals."""

from __future__ import annotations

import functools
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import trainer_of

import raypipe
from raypipe.driver.cluster import Session
from raypipe.model.pretrained import Pretrained

BERT = hf.BertForSequenceClassification
sgd = functools.partial(torch.optim.SGD, lr=0.1)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
IDS = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": IDS, "labels": IDS}
IMAGES = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), "labels": IDS[:, 0] % 2}
NAMES = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


def llama(**more: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES, **more))


def gpt2() -> nn.Module:
    drops = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, **drops, **NAMES))


def t5() -> nn.Module:
    config = hf.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=50, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return hf.T5ForConditionalGeneration(config)


def mixtral() -> nn.Module:
    """Twelve experts: sorted as text, 10 and 11 come before 2."""
    config = hf.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=12, **SIZES)
    return hf.MixtralForCausalLM(config)


def vit() -> nn.Module:
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=8, patch_size=4, **SIZES, **drops))


def bert_config() -> Any:
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertConfig(vocab_size=50, **SIZES, **drops)


def saved(model: Any, folder: Path, shard: str = "8KB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def assert_trains_alike(model: Pretrained, batch: dict[str, Tensor], stages: int, **options: Any) -> None:
    with trainer_of(model, stages, optimizer=sgd, microbatches=2, **options) as trainer:
        start = trainer.state_dict()
        loss = trainer.train_step(batch)["loss"]
        end = trainer.state_dict()
    whole = model().train()
    for key, tensor in whole.state_dict().items():
        assert (key.startswith("classifier") and type(whole) is BERT) or torch.equal(start[key], tensor), key
    whole.load_state_dict(start)  # a new head is drawn by each loader in its own way
    optimizer = sgd(list(whole.parameters()))
    wanted = whole(**batch).loss
    wanted.backward()
    optimizer.step()
    assert loss == pytest.approx(wanted.item(), rel=1e-6)
    for key, tensor in whole.state_dict().items():
        moved, same = tensor - start[key], end[key] - start[key]
        assert (moved - same).norm() <= 1e-5 * tensor.norm().clamp_min(1e-3), key


@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize(
    ("make", "batch"), [(llama, TOKENS), (gpt2, TOKENS), (t5, TOKENS), (vit, IMAGES), (mixtral, TOKENS)]
)
def test_training_is_that_of_the_loaded_model(
    make: Callable[[], nn.Module], batch: dict[str, Tensor], stages: int, tmp_path: Path
) -> None:
    kind = type(made := make())
    assert_trains_alike(raypipe.from_pretrained(saved(made, tmp_path), kind), batch, stages)


@pytest.mark.filterwarnings("ignore:initialised by")
def test_a_classifier_trains_from_its_base_models_folder(tmp_path: Path) -> None:
    model = raypipe.from_pretrained(saved(hf.BertModel(bert_config()), tmp_path), BERT)
    assert_trains_alike(model, {"input_ids": IDS, "labels": IDS[:, 0] % 2}, 3)


@pytest.mark.ray
def test_over_ray(tmp_path: Path, ray_session: Session) -> None:
    model = raypipe.from_pretrained(saved(llama(), tmp_path), hf.LlamaForCausalLM)
    assert_trains_alike(model, TOKENS, 2, backend="ray")


def test_the_object_can_be_pickled_and_auto_classes_are_resolved(tmp_path: Path) -> None:
    auto = raypipe.from_pretrained(saved(llama(), tmp_path), hf.AutoModelForCausalLM)
    assert type(pickle.loads(pickle.dumps(auto)).origin(0).model) is hf.LlamaForCausalLM


def test_a_new_head_is_initialised_by_the_seed_and_named(tmp_path: Path) -> None:
    base = hf.BertModel(bert_config())
    model = raypipe.from_pretrained(saved(base, tmp_path), hf.BertForSequenceClassification)
    with pytest.warns(UserWarning, match="lacks them: classifier.weight, classifier.bias"):
        origin = model.origin(3)
    assert torch.equal(origin.tensor("bert.pooler.dense.weight"), base.pooler.dense.weight)
    with pytest.warns(UserWarning, match="lacks them"):
        again, other = model.origin(3), model.origin(4)
    head = origin.tensor("classifier.weight")
    assert torch.equal(head, again.tensor("classifier.weight"))
    assert not torch.equal(head, other.tensor("classifier.weight"))


def test_a_head_that_has_no_place_is_named(tmp_path: Path) -> None:
    whole = hf.BertForSequenceClassification(bert_config())
    model = raypipe.from_pretrained(saved(whole, tmp_path), hf.BertModel)
    with pytest.warns(UserWarning, match="no place for them: classifier.bias, classifier.weight"):
        origin = model.origin(0)
    assert torch.equal(origin.tensor("pooler.dense.weight"), whole.bert.pooler.dense.weight)


def test_ranks_read_only_their_own_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = raypipe.from_pretrained(saved(llama(), tmp_path), hf.LlamaForCausalLM)
    seen: list[str] = []
    real = safetensors.safe_open

    class Spy:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real(*args, **kwargs)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *args: Any) -> None:
            pass

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def get_tensor(self, key: str) -> Tensor:
            seen.append(key)
            return self.file.get_tensor(key)

    monkeypatch.setattr(safetensors, "safe_open", Spy)
    origin = model.origin(0)
    assert seen == []
    with trainer_of(model, 3, microbatches=2, microbatch_weight="targets", example=TOKENS) as trainer:
        plan, held = trainer.plan(), [trainer.plan().held_by(stage) for stage in range(3)]
    assert plan is not None
    for names in held:
        seen.clear()
        shared = pickle.loads(pickle.dumps(origin.share(names)))()
        assert set(shared) == set(names)
        assert sorted(seen) == sorted(names)
    with trainer_of(model, 3, microbatches=2, microbatch_weight="targets") as trainer:
        seen.clear()
        trainer.train_step(TOKENS)
        assert sorted(seen) == sorted(name for names in held for name in names)


def test_round_trip_and_generate(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "a")
    with trainer_of(raypipe.from_pretrained(folder, hf.LlamaForCausalLM), 3, optimizer=sgd) as trainer:
        trainer.train_step(TOKENS)
        state = trainer.state_dict()
    whole: Any = hf.LlamaForCausalLM.from_pretrained(folder)
    whole.load_state_dict(state)
    assert whole.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[0] == 1
    again = raypipe.from_pretrained(saved(whole, tmp_path / "b"), hf.LlamaForCausalLM).origin(0)
    assert all(torch.equal(again.tensor(name), tensor) for name, tensor in state.items())


def test_dtype_is_the_saved_one_unless_said(tmp_path: Path) -> None:
    folder = saved(llama().to(torch.bfloat16), tmp_path)
    name = "model.norm.weight"
    assert raypipe.from_pretrained(folder, hf.LlamaForCausalLM).origin(0).tensor(name).dtype is torch.bfloat16
    wide = raypipe.from_pretrained(folder, hf.LlamaForCausalLM, dtype=torch.float32).origin(0)
    assert wide.tensor(name).dtype is torch.float32


def test_other_shapes_and_other_names_are_refused(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path, "1GB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(ValueError, match=r"has the shape \[50, 16\] .* has \[60, 16\]"):
        trainer_of(raypipe.from_pretrained(folder, hf.LlamaForCausalLM), 2)
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    save_file({k.replace("mlp", "ffn"): v for k, v in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model.layers.0.mlp.* and has model.layers.0.ffn"):
        trainer_of(raypipe.from_pretrained(folder, hf.LlamaForCausalLM), 2)


def test_tied_names_that_differ_are_refused_and_either_is_read(tmp_path: Path) -> None:
    folder = saved(llama(tie_word_embeddings=True), tmp_path, "1GB")
    path, head, embedding = folder / "model.safetensors", "lm_head.weight", "model.embed_tokens.weight"
    state = load_file(path)
    value = state.pop(embedding)
    save_file(state | {head: value}, path)
    model = raypipe.from_pretrained(folder, hf.LlamaForCausalLM)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(model.origin(0).tensor(embedding), value)
    save_file(state | {head: value, embedding: value + 1}, path)
    with pytest.raises(ValueError, match=r"differ in .* but are one tensor"):
        model.origin(0)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    load = raypipe.from_pretrained
    with pytest.raises(TypeError, match="must be a model class of Hugging Face's"):
        load(tmp_path, nn.Linear)
    with pytest.raises(FileNotFoundError, match="names on a hub are not taken"):
        load("meta/llama", hf.LlamaForCausalLM)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path, hf.LlamaForCausalLM)
    folder = saved(llama(), tmp_path / "a")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="lacks more, which"):
        load(folder, hf.LlamaForCausalLM)
    gone = sorted(folder.glob("*.safetensors"))
    gone[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {gone[0].name}"):
        load(folder, hf.LlamaForCausalLM)
    index.unlink()
    for path in gone[1:]:
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has neither"):
        load(folder, hf.LlamaForCausalLM)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="a pickle, which can run code"):
        load(folder, hf.LlamaForCausalLM)
