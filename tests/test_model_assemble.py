"""Pieces of a file against Hugging Face's own loader, and pieces that do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import raypipe

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def qwen2_moe() -> nn.Module:
    sizes: dict[str, Any] = {"intermediate_size": 32, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    config = hf.Qwen2MoeConfig(vocab_size=50, num_experts=11, num_key_value_heads=2, **SIZES, **sizes)
    return hf.Qwen2MoeForCausalLM(config)


def dinov2() -> nn.Module:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(image_size=8, patch_size=4, **SIZES))


def folder_of(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.mark.parametrize("make", [qwen2_moe, dinov2])
def test_tensors_are_those_of_the_librarys_loader(make: Any, tmp_path: Path) -> None:
    model = make()
    path = folder_of(model, tmp_path)
    stored = set(load_file(path))
    origin = raypipe.from_pretrained(tmp_path, type(model)).origin(0)
    wanted = {name: t for name, t in model.state_dict().items() if name not in stored}
    assert wanted, "the file has no pieces"
    for name, tensor in model.state_dict().items():
        assert torch.equal(origin.tensor(name), tensor), name


def test_a_rank_reads_the_pieces_of_its_own_tensors_alone(tmp_path: Path) -> None:
    model = qwen2_moe()
    folder_of(model, tmp_path)
    origin = raypipe.from_pretrained(tmp_path, type(model)).origin(0)
    name = "model.layers.1.mlp.experts.down_proj"
    reader: Any = origin.share([name])
    keys = [key for assembly in reader.shelf.assembled for key in assembly.keys]
    assert keys == [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(11)]
    assert set(reader.shelf.where) == set(keys)
    made = pickle.loads(pickle.dumps(reader))()
    assert list(made) == [name]
    assert torch.equal(made[name], model.state_dict()[name])


def test_pieces_are_converted_to_the_asked_dtype(tmp_path: Path) -> None:
    folder_of(qwen2_moe().to(torch.bfloat16), tmp_path)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    wide = raypipe.from_pretrained(tmp_path, hf.Qwen2MoeForCausalLM, dtype=torch.float32).origin(0).tensor(name)
    assert wide.dtype is torch.float32
    assert torch.equal(wide, raypipe.from_pretrained(tmp_path, hf.Qwen2MoeForCausalLM).origin(0).tensor(name).float())


def test_a_missing_piece_and_one_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = folder_of(qwen2_moe(), tmp_path)
    load = raypipe.from_pretrained(tmp_path, hf.Qwen2MoeForCausalLM)
    state = load_file(path)
    key = "model.layers.0.mlp.experts.3.down_proj.weight"
    save_file({k: v for k, v in state.items() if k != key}, path)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj\.weight has the shape \[10, 16, 8\] .* has \[11, 16"):
        load.origin(0)
    save_file(state | {key: torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=r"cannot be put together one tensor at a time .* give the module"):
        load.origin(0)
