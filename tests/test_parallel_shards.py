from __future__ import annotations

import copy

import pytest
import torch
from tensor_models import ends, llama, loss_of, pairs, small, split, tokens, train_split, train_whole
from test_parallel_apply import assert_same_training, sequence_parallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import PrepareModuleOutput

from raypipe.errors import CutError
from raypipe.parallel.apply import split_layers
from raypipe.parallel.shards import Shards
from raypipe.parallel.styles import SummedGradient
from raypipe.parallel.tensor_plan import find_styles


def in_this_way(group, model, plan, way):
    return train_split(group, model, plan, **{way: True})


@pytest.mark.parametrize("way", ["foreach", "fused"])
def test_the_optimizer_gets_plain_tensors(tensor_team, way) -> None:
    model = small().double()
    wanted = train_whole(model, **{way: True})
    for found in tensor_team(2).run(in_this_way, model, {**pairs(), **ends()}, way):
        assert_same_training(found, wanted, 1e-9)


def kinds(group, model, plan):
    shards = split(copy.deepcopy(model), group, plan)
    return {n: (shards.is_split(n), isinstance(p, DTensor), p.shape) for n, p in shards.parameters.items()}


def test_what_is_split_and_what_is_whole(tensor_team) -> None:
    for found in tensor_team(2).run(kinds, small(), pairs()):
        assert found["blocks.0.up.weight"] == (True, False, (32, 16))
        assert found["blocks.0.down.weight"] == (True, False, (16, 32))
        assert found["blocks.0.down.bias"] == (False, False, (16,))
        assert found["blocks.0.norm1.weight"] == (False, False, (16,))


def whole_gradients_and_norms(group, model, plan, sequence):
    model = copy.deepcopy(model)
    if sequence:
        for block in model.blocks:
            PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate())._apply(block, group.mesh)
    shards = split(model, group, plan)
    loss_of(model, tokens()[0]).backward()
    kind = str(model.blocks[0].norm1.weight.grad.placements) if sequence else ""
    shards.collect()
    whole = {n: p.grad.clone() for n, p in shards.parameters.items() if not shards.is_split(n)}
    return kind, whole, shards.norms(shards.parameters)


@pytest.mark.parametrize("sequence", [False, True])
def test_gradients_of_whole_parameters_are_equal_and_norms_count_once(tensor_team, sequence) -> None:
    model = small().double()
    unsplit = copy.deepcopy(model)
    loss_of(unsplit, tokens()[0]).backward()
    wanted = torch.stack([p.grad.norm() for p in unsplit.parameters()])
    plan = sequence_parallel() if sequence else pairs()
    answers = tensor_team(2).run(whole_gradients_and_norms, model, plan, sequence)
    for kind, whole, norms in answers:
        assert "Partial" in kind or not sequence
        assert all(torch.equal(gradient, answers[0][1][name]) for name, gradient in whole.items())
        assert torch.equal(norms, answers[0][2])
        torch.testing.assert_close(norms, wanted, rtol=1e-10, atol=1e-12)
    assert "blocks.0.norm1.weight" in answers[0][1]


def silent(group, model):
    """The model's own plan, without the word for norms of split heads."""
    model = copy.deepcopy(model)
    styles = {n: s for n, s in find_styles(model, None, 2).items() if not isinstance(s, SummedGradient)}
    split_layers(model, group, styles)
    shards = Shards(group, dict(model.named_parameters()))
    loss_of(model, tokens()[0]).backward()
    shards.collect()
    try:
        shards.check_replicas()
    except CutError as error:
        return str(error)
    return None


def test_copies_that_would_drift_apart_are_refused(tensor_team) -> None:
    for found in tensor_team(2).run(silent, llama(kind="qwen3")):
        assert found is not None
        assert "model.layers.0.self_attn.q_norm.weight is whole on every rank" in found
        assert "SummedGradient" in found


def collected(group, model):
    from torch.distributed.tensor.debug import CommDebugMode

    model = copy.deepcopy(model)
    shards = split(model, group)
    optimizer = torch.optim.AdamW(list(shards.parameters.items()))
    loss_of(model, tokens()[0]).backward()
    with CommDebugMode() as collecting:
        shards.collect()
    with CommDebugMode() as stepping:
        optimizer.step()
    return collecting.get_total_counts(), stepping.get_total_counts()


def test_partial_gradients_are_summed_once_and_the_optimizer_sends_nothing(tensor_team) -> None:
    # Four norms of heads, one collective.
    assert tensor_team(2).run(collected, llama(kind="qwen3")) == [(1, 0), (1, 0)]


def gathered(group, model, plan):
    shards = split(copy.deepcopy(model), group, plan)
    return {name: shards.full(name) for name in shards.parameters}


def test_whole_tensors_come_out(tensor_team) -> None:
    model = small()
    for whole in tensor_team(2).run(gathered, model, {**pairs(), **ends()}):
        assert set(whole) == set(model.state_dict())
        assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


def without_gradients(group, model, plan):
    model = copy.deepcopy(model)
    shards = split(model, group, plan)
    model.blocks[0].attention.query(torch.ones(1, 2, 16)).sum().backward()
    shards.collect()
    return [name for name, p in shards.parameters.items() if p.grad is not None], shards.norms(["norm.weight"])


def test_a_parameter_without_a_gradient_stays_without(tensor_team) -> None:
    for names, norm in tensor_team(2).run(without_gradients, small(), pairs()):
        assert names == ["blocks.0.attention.query.weight", "blocks.0.attention.query.bias"]
        assert norm.tolist() == [0.0]
