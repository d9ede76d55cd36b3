from __future__ import annotations

import dataclasses

import pytest
import torch

from raypipe.errors import BatchError
from raypipe.model.join import join_outputs, shapes_of


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
        ([torch.ones(5, 2), torch.zeros(5, 3)], "not one row for each sample in one dimension"),
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


def test_the_batch_may_be_in_any_dimension():
    one, other = torch.ones(5, 2), torch.zeros(5, 1)
    assert torch.equal(join_outputs([one, other], [2, 1]), torch.cat([one, other], 1))


def test_what_grew_with_the_samples_decides_between_equal_sizes():
    outputs = [torch.full((2, 2), float(number)) for number in range(2)]
    for dim in (0, 1):
        assert torch.equal(join_outputs(outputs, [2, 2], [frozenset({dim})]), torch.cat(outputs, dim))
    for grown in (frozenset({0, 1}), frozenset(), None):
        with pytest.raises(BatchError, match="cannot be joined"):
            join_outputs(outputs, [2, 2], [grown])
    table = torch.rand(2, 2)
    assert join_outputs([table, table.clone()], [2, 2], [frozenset()]) is table


@dataclasses.dataclass(frozen=True, slots=True)
class Inner:
    h: torch.Tensor


@dataclasses.dataclass
class Output:
    loss: torch.Tensor
    parts: list[Inner]
    name: str = "output"


def test_dataclasses_are_joined_field_by_field():
    outputs = [{"out": Output(torch.tensor(float(n)), [Inner(torch.full((n, 3), n))])} for n in (2, 1)]
    joined = join_outputs(outputs, [2, 1])["out"]
    assert type(joined) is Output
    assert joined.loss.tolist() == [2.0, 1.0]
    assert joined.parts[0].h[:, 0].tolist() == [2, 2, 1]
    assert joined.name == "output"
    assert outputs[0]["out"].parts[0].h.shape == (2, 3)
    assert shapes_of(outputs[0]) == [(), (2, 3), None]
