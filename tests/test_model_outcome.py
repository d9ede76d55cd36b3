"""What came out is held against what was planned."""

from __future__ import annotations

from pipes import Stack, batch, recorded

import pytest
import torch

from raypipe.errors import CutError
from raypipe.model.outcome import (
    check_constant,
    check_sent,
    check_value,
    leaves_of,
    refuse_placeholder,
    without_withheld,
)
from raypipe.model.recording import Recording


def recording() -> Recording:
    return recorded(Stack(lambda model, x: model.blocks[1](model.blocks[0](x)), blocks=2), batch())


def test_the_structure_is_the_planned_one() -> None:
    event = recording().events[0]
    result = torch.ones(1)
    assert leaves_of(event, result)[0] is result
    with pytest.raises(CutError, match=r"(?s)blocks\.0 returned .* where it returned"):
        leaves_of(event, (result, result))


def test_a_number_is_the_planned_one() -> None:
    event = recording().events[0]
    check_constant(event, 2, 2)
    with pytest.raises(CutError, match="returned 3 where it returned 2 when it was planned"):
        check_constant(event, 3, 2)


def test_a_value_is_a_tensor_of_the_planned_shape() -> None:
    found = recording()
    value = found.values[0]
    right = torch.ones(value.spec.shape)
    check_value(found, 0, right)
    check_sent(found, value, right)
    with pytest.raises(CutError, match=r"a NoneType came where a torch\.float32 tensor"):
        check_value(found, 0, None)
    for wrong in (right[:1], right.double()):
        with pytest.raises(CutError, match="the shape depends on the data"):
            check_sent(found, value, wrong)


def test_no_placeholder_is_returned_and_what_is_withheld_is_none() -> None:
    found = recording()
    placeholder, real = found.placeholder(0), torch.ones(1)
    with pytest.raises(CutError, match="used a value in this stage that it did not use"):
        without_withheld(found, {"a": placeholder, "b": real})
    found.withheld = (0,)
    assert without_withheld(found, {"a": placeholder, "b": real}) == {"a": None, "b": real}
    with pytest.raises(CutError, match="why it stopped"):
        refuse_placeholder(Recording(stopped="why it stopped"))
