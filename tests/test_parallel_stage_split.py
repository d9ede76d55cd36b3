from __future__ import annotations

import pickle

import pytest
from tensor_models import ends, llama, pairs, small
from torch.distributed.tensor.parallel import SequenceParallel

from raypipe.errors import CutError
from raypipe.model.units import find_units
from raypipe.parallel.stage_split import find_split


def split(model, plan, size=2, outside=()):
    return find_split(model, plan, size, find_units(model), outside)


def test_which_dimension_of_which_parameter() -> None:
    found = split(small(tied=True), {**pairs(), **ends()})
    assert found.dims["embedding.weight"] == 0
    assert "head.weight" not in found.dims  # the embedding's, by its first name
    assert found.dims["blocks.0.up.weight"] == found.dims["blocks.0.up.bias"] == 0
    assert found.dims["blocks.1.attention.out.weight"] == 1
    assert "blocks.1.attention.out.bias" not in found.dims
    assert not any("norm" in name for name in found.dims)
    assert found.share("embedding.weight", 61) == 31 / 61
    assert found.share("norm.weight", 16) == 1.0


def test_it_can_be_sent() -> None:
    found = pickle.loads(pickle.dumps(split(llama(kind="qwen3"), None)))
    assert found.dims == split(llama(kind="qwen3"), None).dims


def test_a_weight_in_two_ways_is_refused() -> None:
    with pytest.raises(CutError, match=r"embedding\.weight and head\.weight are one weight .*, or neither"):
        split(small(tied=True), {"head": ends()["head"]})


def test_what_is_read_outside_of_units_stays_whole() -> None:
    with pytest.raises(CutError, match=r"embedding\.weight is split by .* also reads it outside of its own module"):
        split(small(), ends(), outside={"embedding.weight"})


def test_modules_around_units_are_refused() -> None:
    with pytest.raises(CutError, match=r"names blocks, which is not inside of one of the model's units \(embedding, "):
        split(small(), {"blocks": SequenceParallel(), **pairs()})
