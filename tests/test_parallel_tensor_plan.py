from __future__ import annotations

import re

import pytest
from tensor_models import ends, llama, pairs, small
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from raypipe.parallel.styles import SharedInput, SummedGradient
from raypipe.parallel.tensor_plan import find_styles


def test_patterns_stand_for_parts_of_names() -> None:
    styles = find_styles(small(), {**pairs(), **ends()}, 2)
    assert {name for name in styles if name.startswith("blocks.1.")} == {
        "blocks.1.attention",
        *(f"blocks.1.attention.{layer}" for layer in ("query", "key", "value", "out")),
        "blocks.1.up",
        "blocks.1.down",
    }
    assert isinstance(styles["embedding"], RowwiseParallel)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"blocks.up": ColwiseParallel()}, "'blocks.up', which matches no module"),
        ({"*.up": ColwiseParallel()}, "'*.up', which matches no module"),
        ({**pairs(), "blocks.0.up": ColwiseParallel()}, "names blocks.0.up twice, by 'blocks.*.up' and 'blocks.0.up'"),
        ({"blocks.*.norm1": ColwiseParallel()}, "blocks.0.norm1 by ColwiseParallel, but it is a LayerNorm"),
        ({"head": ColwiseParallel()}, "head has 61 output features, which 2 ranks cannot share evenly"),
        ({"blocks.*.attention.out": RowwiseParallel()}, None),
        ({"blocks.*.norm1": SequenceParallel()}, None),
    ],
)
def test_plans_that_do_not_fit_the_model(plan, words) -> None:
    if words is None:
        find_styles(small(), plan, 2)
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        find_styles(small(), plan, 2)


def test_rows_of_an_odd_width() -> None:
    model = nn.ModuleDict({"down": nn.Linear(15, 4)})
    with pytest.raises(ValueError, match="down has 15 input features, which 2 ranks cannot share evenly; choose"):
        find_styles(model, {"down": RowwiseParallel()}, 2)


@pytest.mark.parametrize("plan", [{}, {"head": "colwise"}, [ColwiseParallel()], {3: ColwiseParallel()}])
def test_what_is_no_plan(plan) -> None:
    with pytest.raises(TypeError, match="must be a dict of patterns of module names and styles"):
        find_styles(small(), plan, 2)


def test_a_model_without_a_plan_is_told_how_to_write_one() -> None:
    with pytest.raises(ValueError, match=r"Small has no plan of its own; .*'blocks\.\*\.up': ColwiseParallel\(\)"):
        find_styles(small(), None, 2)


def test_a_plan_of_hugging_face_in_pytorchs_styles() -> None:
    styles = find_styles(llama(kind="qwen3"), None, 2)
    assert type(styles["model.layers.1.self_attn.q_proj"]) is ColwiseParallel
    assert isinstance(styles["model.layers.0.mlp.down_proj"], RowwiseParallel)
    assert isinstance(styles["model.layers.0.self_attn.k_norm"], SummedGradient)
    assert all(place.is_replicate() for place in styles["lm_head"].output_layouts)
    assert isinstance(styles["model.layers.0.self_attn"], SharedInput)
    assert isinstance(styles["model.layers.0.mlp"], SharedInput)
    assert "model.layers.0" not in styles


def test_a_word_of_hugging_face_that_is_not_built() -> None:
    model = llama()
    model._tp_plan = {**model._tp_plan, "model.layers.*.mlp.up_proj": "packed_colwise"}
    with pytest.raises(ValueError, match=r"splits model\.layers\.0\.mlp\.up_proj by 'packed_colwise', which is not"):
        find_styles(model, None, 2)


def test_parameters_that_belong_to_no_layer() -> None:
    model = llama()
    model.model.experts = nn.ParameterList([nn.Linear(2, 2).weight])
    model._tp_plan = {"model.experts.*": "grouped_gemm"}
    with pytest.raises(ValueError, match=r"splits the parameters model\.experts\.\*, which belong to no layer"):
        find_styles(model, None, 2)


def test_weight_norm_is_refused() -> None:
    model = nn.ModuleDict({"up": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match="without parametrizations"):
        find_styles(model, {"up": ColwiseParallel()}, 2)
