from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensor_models import ends, family, llama, loss_of, pairs, small, split, tokens
from torch.distributed.tensor.parallel import SequenceParallel

from raypipe.errors import CutError
from raypipe.model.units import find_units
from raypipe.parallel.apply import summed_parameters
from raypipe.parallel.stage_split import find_split
from raypipe.parallel.verify import Trial


def found_split(model, plan, size=2, outside=()):
    return find_split(model, plan, size, find_units(model), outside)


def test_which_dimension_of_which_parameter() -> None:
    found = found_split(small(tied=True), {**pairs(), **ends()})
    assert found.dims["embedding.weight"] == 0
    assert "head.weight" not in found.dims  # the embedding's, by its first name
    assert found.dims["blocks.0.up.weight"] == found.dims["blocks.0.up.bias"] == 0
    assert found.dims["blocks.1.attention.out.weight"] == 1
    assert "blocks.1.attention.out.bias" not in found.dims
    assert not any("norm" in name for name in found.dims)
    assert found.share("embedding.weight", 61) == 31 / 61
    assert found.share("norm.weight", 16) == 1.0


def test_it_can_be_sent() -> None:
    found = pickle.loads(pickle.dumps(found_split(llama(kind="qwen3"), None)))
    assert found.dims == found_split(llama(kind="qwen3"), None).dims


def test_a_weight_in_two_ways_is_refused() -> None:
    with pytest.raises(CutError, match=r"embedding\.weight and head\.weight are one weight .*, or neither"):
        found_split(small(tied=True), {"head": ends()["head"]})


def test_what_is_read_outside_of_units_stays_whole() -> None:
    with pytest.raises(CutError, match=r"embedding\.weight is split by .* also reads it outside of its own module"):
        found_split(small(), ends(), outside={"embedding.weight"})


def test_modules_around_units_are_refused() -> None:
    with pytest.raises(CutError, match=r"names blocks, which is not inside of one of the model's units \(embedding, "):
        found_split(small(), {"blocks": SequenceParallel(), **pairs()})


def norms(group, model):
    whole, model = copy.deepcopy(model).train(), model.train()
    loss_of(whole, tokens()[0]).backward()
    units = find_units(model)
    trial = Trial(units)
    found = find_split(model, None, group.size, units, ())
    shards = split(model, group)
    trial.watch(units, group, summed_parameters(model, found.styles))
    loss_of(model, tokens()[0]).backward()
    shards.collect()
    shards.check_replicas()
    wanted = torch.stack([p.grad.double().norm() for p in whole.parameters()])
    return trial.waiting, float((shards.norms(shards.parameters) - wanted).abs().max() / wanted.max())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Gemma2", "GPTNeoX", "Mistral", "Olmo2", "Phi3", "Qwen2"])
def test_families_with_plans_of_their_own(tensor_team, kind) -> None:
    """Norms of whole queries, fused queries by head, biases, soft caps: each trial passes, and gradients are right."""
    for waiting, difference in tensor_team(2).run(norms, family(kind)):
        assert waiting == ()
        assert difference < 1e-6


def test_experts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Mixtral.*experts.* belong to no layer of their own; give a tensor_parallel"):
        found_split(family("Mixtral"), None)
