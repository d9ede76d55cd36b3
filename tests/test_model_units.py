from __future__ import annotations

import pytest
import torch
from torch import nn

from raypipe.model.units import find_units


class GPTLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "blocks": nn.ModuleList([nn.Linear(4, 4)] * 2)})
        self.rotary, self.head = nn.Identity(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 8))
        self.blocks_by_depth = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4)]), nn.Sequential(nn.Linear(4, 4))])
        self.cls_token = nn.Parameter(torch.zeros(4))


def test_elements_of_lists_and_the_largest_modules_around_them() -> None:
    assert list(find_units(GPTLike())) == [
        "parts.embedding",
        "parts.blocks.0",  # and parts.blocks.1, the same module
        "head.0",
        "head.2",
        "blocks_by_depth.0.0",
        "blocks_by_depth.1",
    ]


def test_a_parametrization_is_no_list() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(find_units(model)) == ["0", "1"]


def test_a_dict_of_modules_is_opened_since_nobody_calls_it() -> None:
    model = nn.Module()
    model.heads = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    assert list(find_units(model)) == ["heads.a", "heads.b", "blocks.0"]


def test_patterns_take_the_place_of_elements() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    assert list(find_units(model)) == ["layers.0", "layers.1"]
    finer = find_units(model, ["layers.*.self_attn", "layers.*.linear?"])
    assert list(finer)[:3] == ["layers.0.self_attn", "layers.0.linear1", "layers.0.linear2"]
    assert "layers.0.norm1" in finer
    assert list(find_units(model, ["layers"])) == ["layers"]


def test_what_cannot_be_cut_is_said() -> None:
    with pytest.raises(ValueError, match=r"units='blok\*' matches no module .* by themselves: 0, 1"):
        find_units(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["blok*"])
    with pytest.raises(ValueError, match="ReLU has no module with parameters"):
        find_units(nn.ReLU())
