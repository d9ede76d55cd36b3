from __future__ import annotations

import itertools

import pytest

from raypipe.schedule import build
from raypipe.stage.program import Message, compile_program


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), [(1, 2), (2, 1), (3, 5), (4, 8)])
def test_every_message_is_given_once_and_taken_once_in_its_senders_order(
    name: str, stages: int, microbatches: int
) -> None:
    programs = [compile_program(build(name, stages, microbatches), stage) for stage in range(stages)]
    for sender, receiver in itertools.permutations(range(stages), 2):
        sent = [item.gives for item in programs[sender].items if item.target == receiver]
        assert list(programs[receiver].incoming.get(sender, ())) == sent
        taken = [item.needs for item in programs[receiver].items if item.source == sender]
        assert sorted(filter(None, taken)) == sorted(filter(None, sent))
        assert len(set(sent)) == len(sent) == (microbatches if abs(sender - receiver) == 1 else 0)


def test_ends_of_the_pipeline_talk_to_nobody() -> None:
    first, last = (compile_program(build("1f1b", 2, 1), stage) for stage in (0, 1))
    assert [(str(i.action), i.source, i.target) for i in first.items] == [("0F0", None, 1), ("0B0", 1, None)]
    assert [(str(i.action), i.source, i.target) for i in last.items] == [("1F0", 0, None), ("1B0", None, 0)]
    assert first.incoming == {1: (Message(1, 0, True),)}


def test_a_program_knows_which_backwards_are_in_halves() -> None:
    everything = {(chunk, microbatch) for chunk in (0, 3) for microbatch in range(3)}
    assert compile_program(build("zbv", 2, 3), 0).split == everything
    assert not compile_program(build("1f1b", 2, 3), 0).split
