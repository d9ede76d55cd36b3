from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action

from raypipe.schedule import Action, Op

actions = st.builds(Action, st.integers(0, 5000), st.sampled_from(Op), st.integers(0, 5000))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("2F0", Action(2, Op.FORWARD, 0)),
        ("0B2", Action(0, Op.BACKWARD, 2)),
        ("1I3", Action(1, Op.INPUT, 3)),
        ("1W3", Action(1, Op.WEIGHT, 3)),
        ("0SEND_F1", Action(0, Op.SEND_F, 1)),
        ("12RECV_B345", Action(12, Op.RECV_B, 345)),
    ],
)
def test_text_form(text: str, action: Action) -> None:
    assert str(action) == text
    assert Action.parse(f" {text}\n") == action


@given(actions)
def test_torch_reads_and_writes_the_same_text(action: Action) -> None:
    theirs = _Action.from_str(str(action))
    assert (theirs.stage_index, theirs.computation_type.value, theirs.microbatch_index) == (
        action.chunk,
        action.op.value,
        action.microbatch,
    )
    assert Action.parse(str(theirs)) == action


@pytest.mark.parametrize("text", ["", "F", "2F", "F0", "2X0", "2f0", "2F0x", "-2F0", "2F-1", "2 F 0", "2F0,2F1", "٢F0"])
def test_other_text_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(
        ValueError, match="is not an action; write chunk, operation and microbatch, such as 2F0"
    ) as caught:
        Action.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0, "F", 0), TypeError, "op is 'F'"),
        ((0.0, Op.FORWARD, 0), TypeError, "chunk is 0.0"),
        ((0, Op.FORWARD, True), TypeError, "microbatch is True"),
        ((-1, Op.FORWARD, 0), ValueError, "chunk is -1"),
        ((0, Op.FORWARD, -1), ValueError, "microbatch is -1"),
    ],
)
def test_wrong_fields_are_refused(arguments: tuple[int, Op, int], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Action(*arguments)


@given(actions)
def test_survives_pickling_and_is_a_key(action: Action) -> None:
    assert {action: 1}[pickle.loads(pickle.dumps(action))] == 1


def test_computation_and_communication() -> None:
    assert [op.value for op in Op if op.computes] == ["F", "B", "I", "W"]
