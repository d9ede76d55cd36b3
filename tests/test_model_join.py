from __future__ import annotations

import pytest
import torch

from raypipe.errors import BatchError
from raypipe.model.join import join_outputs


def test_rows_are_concatenated_and_what_is_equal_is_kept():
    table, cache = torch.arange(5.0), [object(), object()]
    outputs = [
        {"logits": torch.full((n, 4), float(n)), "table": table, "loss": torch.tensor(float(n)), "k": 7, "cache": c}
        for n, c in zip((2, 1), cache, strict=True)
    ]
    joined = join_outputs(outputs, [2, 1])
    assert joined["logits"][:, 0].tolist() == [2.0, 2.0, 1.0]
    assert torch.equal(joined["table"], table)
    assert joined["loss"].tolist() == [2.0, 1.0]
    assert joined["k"] == 7
    assert joined["cache"] == cache


def test_one_microbatch_comes_back_as_it_is():
    output = object()
    assert join_outputs([output], [3]) is output


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ([torch.ones(5, 2), torch.zeros(5, 1)], "dimension 0 is not the batch"),
        ([torch.ones(5), torch.zeros(5)], r"outputs has shapes \[5\], \[5\]"),
        ([{"h": torch.ones(2, 7)}, {"h": torch.ones(1, 9)}], r"outputs\['h'\].*pad it"),
        ([{"h": torch.ones(2)}, {"g": torch.ones(1)}], "built differently"),
    ],
)
def test_what_cannot_be_joined_is_refused(outputs, words):
    with pytest.raises(BatchError, match=words):
        join_outputs(outputs, [2, 1])


def test_each_output_needs_its_number_of_samples():
    with pytest.raises(ValueError, match="2 outputs and 1 numbers"):
        join_outputs([torch.ones(1), torch.ones(1)], [1])
