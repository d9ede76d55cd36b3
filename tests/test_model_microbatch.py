from __future__ import annotations

import pickle
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raypipe.errors import BatchError
from raypipe.model.microbatch import LayoutCache, find_layout


def batch_of(samples: int, mask: bool = True):
    ids = torch.arange(samples * 6).reshape(samples, 6)
    return {
        "ids": ids,
        "labels": ids + 1,
        "mask": ids > 3 if mask else None,
        "positions": torch.arange(3 * samples * 6).reshape(3, samples, 6),
        "array": np.arange(samples),
        "texts": [f"t{i}" for i in range(samples)],
        "scale": 0.5,
    }


# Without a word on ids, six samples of six tokens would be uncertain.
DIMS = {"positions": 1, "ids": 0, "labels": 0, "mask": 0}


@given(samples=st.integers(1, 20), count=st.integers(1, 24))
def test_pieces_are_those_of_tensor_split_and_join_to_the_batch(samples, count):
    batch = batch_of(samples)
    layout = find_layout(batch, DIMS)
    pieces = layout.split(batch, count)
    expected = torch.tensor_split(batch["ids"], min(samples, count))
    assert [p.samples for p in pieces] == [len(part) for part in expected]
    assert [p.first_sample for p in pieces] == [int(part[0, 0]) // 6 for part in expected]
    assert all(torch.equal(p.batch["ids"], part) for p, part in zip(pieces, expected, strict=True))
    assert torch.equal(torch.cat([p.batch["positions"] for p in pieces], 1), batch["positions"])
    assert np.array_equal(np.concatenate([p.batch["array"] for p in pieces]), batch["array"])
    assert [t for p in pieces for t in p.batch["texts"]] == batch["texts"]
    assert all(p.batch["scale"] == 0.5 for p in pieces)


def test_pieces_are_views():
    batch = batch_of(4)
    piece = find_layout(batch, DIMS).split(batch, 2)[1]
    assert piece.batch["ids"].untyped_storage().data_ptr() == batch["ids"].untyped_storage().data_ptr()
    assert np.shares_memory(piece.batch["array"], batch["array"])


def test_a_change_in_one_microbatch_is_none_in_another():
    batch = {"x": torch.ones(4, 6)}
    one, other = find_layout(batch).split(batch, 2)
    one.batch["x"].add_(1)
    assert (one.batch["x"]._version, other.batch["x"]._version) == (1, 0)
    assert batch["x"][:, 0].tolist() == [2, 2, 1, 1]


def test_select_takes_samples_in_order_and_twice():
    batch = batch_of(4)
    chosen = find_layout(batch, DIMS).select(batch, [3, 0, 3])
    assert chosen["ids"][:, 0].tolist() == [18, 0, 18]
    assert chosen["positions"][1, :, 0].tolist() == [42, 24, 42]
    assert chosen["array"].tolist() == [3, 0, 3]
    assert chosen["texts"] == ["t3", "t0", "t3"]


def test_a_layout_serves_later_batches_and_travels():
    layout = pickle.loads(pickle.dumps(find_layout(batch_of(4), DIMS)))
    assert layout.samples(batch_of(7)) == 7
    assert [p.samples for p in layout.split(batch_of(6), 4)] == [2, 2, 1, 1]


def test_mappings_of_tokenizers_become_dicts():
    batch = UserDict(ids=torch.ones(4, 2), labels=torch.ones(4))
    pieces = find_layout(batch).split(batch, 2)
    assert type(pieces[0].batch) is dict
    assert pieces[1].batch["ids"].shape == (2, 2)
    pair = (batch, torch.ones(4))
    assert find_layout(pair).split(pair, 4)[3].batch[0]["labels"].shape == (1,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"extra": torch.ones(4)}, "built differently"),
        ({"mask": None}, "mask is no tensor in this batch, but it has 2 dimensions"),
        ({"ids": torch.ones(5, 6)}, "labels has 4 samples in dimension 0, but ids has 5"),
        ({"ids": torch.ones(4)}, "ids has 1 dimensions"),
    ],
)
def test_a_batch_of_another_layout_is_refused(change, words):
    layout = find_layout(batch_of(4), DIMS)
    assert layout.fits(batch_of(4))
    assert not layout.fits({**batch_of(4), **change})
    with pytest.raises(BatchError, match=words):
        layout.split({**batch_of(4), **change}, 2)


def test_no_samples_and_no_microbatches():
    layout = find_layout((torch.ones(4, 6), torch.ones(4)))
    with pytest.raises(BatchError, match="no samples"):
        layout.split((torch.ones(0, 6), torch.ones(0)), 2)
    with pytest.raises(ValueError, match="microbatches is 0"):
        layout.split((torch.ones(4, 6), torch.ones(4)), 0)


def test_the_cache_finds_another_layout_and_keeps_what_the_first_says():
    # A batch of three samples: `positions` alone would be uncertain, but the first layout knows it.
    first = find_layout(batch_of(4), DIMS)
    cache = LayoutCache(first)
    assert cache.find(batch_of(9)) is first
    other = cache.find(batch_of(3, mask=False))
    assert other.dims[other.paths.index("positions")] == 1
    assert other.dims[other.paths.index("mask")] is None
    assert cache.find(batch_of(3, mask=False)) is other
    assert cache.find(batch_of(4)) is first
    with pytest.raises(BatchError, match="other"):
        cache.find({"ids": torch.ones(4, 6), "labels": torch.ones(4), "other": torch.ones(3, 4, 6)})
