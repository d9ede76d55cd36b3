from __future__ import annotations

import torch

from raypipe.model.microbatch import find_layout
from raypipe.model.shorten import shortened


def test_only_the_last_sample_is_cut_and_only_to_values_it_may_hold():
    batch = {
        "ids": torch.full((3, 4), 7),
        "labels": torch.full((3, 4), 5),
        "mask": torch.ones(3, 4),
        "lengths": torch.tensor([4, 4, 4]),
        "pixels": torch.full((3, 4), 0.5),
        "flag": True,
    }
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    masks, numbers, labels = shortened(batch, find_layout(batch))
    assert masks["mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert masks["ids"] is batch["ids"]
    assert numbers["ids"][2].tolist() == [7, 7, 0, 0]
    assert numbers["lengths"].tolist() == [4, 4, 2]
    assert labels["labels"].tolist() == [[5] * 4, [5] * 4, [5, 5, -100, -100]]
    assert all(torch.equal(changed["pixels"], batch["pixels"]) for changed in (masks, numbers, labels))
    assert all(torch.equal(v, before[k]) for k, v in batch.items() if isinstance(v, torch.Tensor))


def test_the_batch_may_be_in_another_dimension_and_targets_need_no_name():
    pair = (torch.full((5, 3), 0.5), torch.ones(4, 3, dtype=torch.long))
    masks, numbers, labels = shortened(pair, find_layout(pair, (1, 1)))
    assert masks[1][:, 2].tolist() == [1, 1, 0, 0]
    assert numbers[1][:, 2].tolist() == [1, 1, 0, 0]
    assert labels[1][:, 2].tolist() == [1, 1, -100, -100]
    assert labels[1][:, :2].min() == 1


def test_a_batch_in_which_there_is_nothing_to_cut():
    pair = (torch.full((3, 4), 0.5), torch.zeros(3, dtype=torch.long))
    assert list(shortened(pair, find_layout(pair))) == []
