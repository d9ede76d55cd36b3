from __future__ import annotations

import copy

import pytest
import torch
from tensor_models import llama, loss_of, pairs, small, split, tokens, train_split, train_whole
from test_parallel_apply import assert_same_training
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from raypipe.parallel.heads import split_heads
from raypipe.parallel.styles import KeyValueParallel
from raypipe.parallel.tensor_plan import find_styles


@pytest.mark.parametrize(("heads", "keys"), [(4, 1), (4, 2), (8, 2)])
def test_fewer_key_value_heads_than_ranks(tensor_team, heads, keys) -> None:
    model = llama(heads, keys).double()
    wanted = train_whole(model)
    for found in tensor_team(4).run(train_split, model):
        assert_same_training(found, wanted, 1e-5)


def test_key_value_heads_get_the_gradients_of_all_their_queries(tensor_team) -> None:
    model = llama(4, 1).double()
    whole = copy.deepcopy(model)
    loss_of(whole, tokens()[0]).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    for found in tensor_team(4).run(gradients, model):
        for name, gradient in wanted.items():
            assert float((found[name] - gradient).norm() / gradient.norm()) < 1e-5, name


def gradients(group, model):
    model = copy.deepcopy(model)
    shards = split(model, group)
    loss_of(model, tokens()[0]).backward()
    shards.collect()
    return {name: whole_gradient(model, shards, name) for name in shards.parameters}


def whole_gradient(model, shards, name):
    from torch.distributed.tensor import DTensor

    parameter = model.get_parameter(name)
    own = shards.parameters[name].grad
    if not isinstance(parameter, DTensor):
        return own
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(
        own, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def test_keys_and_values_are_split_by_features_where_heads_are_few() -> None:
    model = llama(4, 1)
    styles, local = split_heads(model, find_styles(model, None, 4), 4)
    key = styles["model.layers.0.self_attn.k_proj"]
    assert isinstance(key, KeyValueParallel)
    assert (key.heads, key.head_dim) == (1, 8)
    assert {(each.attribute, each.value) for each in local} == {("num_key_value_groups", 1)}


def embedded(group, model, ids):
    model = copy.deepcopy(model)
    split(model, group, {"embedding": __import__("tensor_models").ends()["embedding"]})
    made = model.embedding(ids)
    made.sum().backward()
    return type(made) is torch.Tensor, isinstance(made, AsyncCollectiveTensor), made.requires_grad


def test_what_leaves_a_layer_is_an_ordinary_tensor(tensor_team) -> None:
    assert tensor_team(2).run(embedded, small(), torch.arange(4)) == [(True, False, True)] * 2


def shared(group, model):
    from torch.distributed.tensor.debug import CommDebugMode

    split(model, group)
    ids = torch.arange(8).view(2, 4)
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    layer = model.model.layers[0]
    rotary = model.model.rotary_emb(embedded, torch.arange(4)[None])
    out = layer(embedded, position_embeddings=rotary, attention_mask=None)
    with CommDebugMode() as mode:
        out.sum().backward()
    return mode.get_total_counts()


def test_an_input_of_several_columns_has_its_gradient_summed_once(tensor_team) -> None:
    assert tensor_team(2).run(shared, llama()) == [2, 2]


def test_pairs_name_their_styles() -> None:
    assert set(find_styles(small(), pairs(), 2)) >= {"blocks.1.attention.query", "blocks.0.down"}
