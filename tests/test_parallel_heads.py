from __future__ import annotations

import pytest
from tensor_models import llama, pairs, small
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from raypipe.parallel.heads import Local, split_heads
from raypipe.parallel.styles import KeyValueParallel
from raypipe.parallel.tensor_plan import find_styles


def shared_out(model, plan, size):
    return split_heads(model, find_styles(model, plan, size), size)


def test_a_rank_counts_its_own_heads() -> None:
    _, local = shared_out(small(), pairs(), 2)
    assert local == [Local(f"blocks.{block}.attention", "num_heads", 2) for block in (0, 1)]


def test_groups_stay_where_key_value_heads_are_shared_out() -> None:
    styles, local = shared_out(llama(4, 2), None, 2)
    assert [(each.attribute, each.value) for each in local] == [("num_key_value_groups", 2)] * 2
    assert type(styles["model.layers.0.self_attn.k_proj"]) is ColwiseParallel


@pytest.mark.parametrize(("heads", "keys", "groups"), [(4, 1, 1), (4, 2, 1), (8, 2, 2)])
def test_one_key_value_head_a_rank_where_they_are_few(heads, keys, groups) -> None:
    styles, local = shared_out(llama(heads, keys), None, 4)
    assert {(each.attribute, each.value) for each in local} == {("num_key_value_groups", groups)}
    few = [name for name, style in styles.items() if isinstance(style, KeyValueParallel)]
    assert sorted(few) == [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in (0, 1) for kind in "kv"]


@pytest.mark.parametrize(
    ("heads", "keys", "size", "words"),
    [(3, 3, 2, "3 attention heads, which 2 ranks"), (6, 3, 2, "6 query and 3 key-value heads, which 2 ranks")],
)
def test_heads_that_cannot_be_shared_out(heads, keys, size, words) -> None:
    with pytest.raises(ValueError, match=f"self_attn has {words} cannot share: .*choose another tensor_parallel"):
        shared_out(llama(heads, keys, width=24), None, size)


def test_heads_of_attention_that_is_not_split_do_not_matter() -> None:
    plan = {name: style for name, style in pairs().items() if "attention" not in name}
    assert shared_out(small(heads=1), plan, 2)[1] == []


def test_few_key_value_heads_that_stay_whole_are_refused() -> None:
    """Their gradients would be those of a rank's own queries, in silence."""
    plan = {"model.layers.*.self_attn.q_proj": ColwiseParallel(), "model.layers.*.self_attn.o_proj": RowwiseParallel()}
    with pytest.raises(
        ValueError, match="its projections of keys and values are not two layers that 2 ranks can share"
    ):
        shared_out(llama(4, 1), plan, 2)
