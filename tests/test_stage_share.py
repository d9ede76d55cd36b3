from __future__ import annotations

import pytest
import torch

from raypipe.errors import BatchError
from raypipe.model.microbatch import find_layout
from raypipe.model.weights import LossRule, Rule
from raypipe.stage.share import check_samples, share_of, share_sizes, weights_of

BATCH = {"x": torch.arange(7.0).reshape(7, 1), "y": torch.arange(7)}


def samples(replica: int, replicas: int, microbatches: int) -> list[list[int]]:
    share = share_of(find_layout(BATCH), BATCH, replica, replicas, microbatches)
    first = share.first_sample
    assert [first + m.first_sample for m in share.microbatches] == [int(m.batch["y"][0]) for m in share.microbatches]
    return [m.batch["y"].tolist() for m in share.microbatches]


def test_shares_are_even_in_order_and_cut_into_microbatches() -> None:
    assert samples(0, 1, 3) == [[0, 1, 2], [3, 4], [5, 6]]
    assert samples(0, 2, 3) == [[0, 1], [2], [3]]
    assert samples(1, 2, 3) == [[4], [5], [6]]
    assert samples(0, 3, 4) == [[0], [1], [2]]
    assert samples(2, 3, 4) == [[5], [6]]
    assert share_sizes(7, 3) == (3, 2, 2)


def test_the_weights_are_those_of_all_replicas() -> None:
    layout = find_layout(BATCH)
    assert weights_of(LossRule(Rule.SAMPLES), layout, BATCH, 2, 2) == [2.0, 2.0, 2.0, 1.0]
    assert weights_of(LossRule(lambda batch: float(batch["y"].sum())), layout, BATCH, 7, 1) == [*range(7)]


def test_too_few_samples_are_refused() -> None:
    check_samples(2, 2)
    with pytest.raises(
        BatchError, match=r"the batch has 1 sample, but data_parallel=2 replicas need at least one each"
    ):
        check_samples(1, 2)
    with pytest.raises(BatchError, match="data_parallel=8"):
        share_of(find_layout(BATCH), BATCH, 0, 8, 1)
