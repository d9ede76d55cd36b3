from __future__ import annotations

import torch

from raypipe.stage.inbox import AHEAD, Inbox
from raypipe.stage.program import Message
from raypipe.tensors import TensorSpec
from raypipe.transport.memory import MemoryHub


def spec_of(message: Message) -> list[TensorSpec]:
    return [] if message.chunk == 9 else [TensorSpec((message.microbatch + 1,), torch.float32)]


class Counting:
    """A rank's transport that counts the receives that are open."""

    def __init__(self, hub: MemoryHub) -> None:
        self.inner, self.posted = hub.transport(1), 0

    def receive(self, source: int, specs: list[TensorSpec]):  # type: ignore[no-untyped-def]
        self.posted += 1
        return self.inner.receive(source, specs)


def test_receives_are_posted_ahead_and_never_all_of_them() -> None:
    hub = MemoryHub(2)
    sender, transport = hub.transport(0), Counting(hub)
    messages = [Message(0, microbatch, False) for microbatch in range(6)]
    inbox = Inbox(transport, {0: messages}, spec_of)  # type: ignore[arg-type]
    assert transport.posted == AHEAD
    for microbatch, message in enumerate(messages):
        sender.send(1, [torch.full((microbatch + 1,), float(microbatch))])
        handle = inbox.take(0, message)
        assert handle is not None
        assert handle.result()[0].tolist() == [microbatch] * (microbatch + 1)
        assert transport.posted == min(6, microbatch + AHEAD)  # the next comes when there is time
        inbox.post(0)
        assert transport.posted == min(6, microbatch + 1 + AHEAD)


def test_messages_are_taken_in_another_order_than_they_come() -> None:
    hub = MemoryHub(2)
    messages = [Message(0, microbatch, False) for microbatch in range(4)]
    inbox = Inbox(Counting(hub), {0: messages}, spec_of)  # type: ignore[arg-type]
    for microbatch in range(4):
        hub.transport(0).send(1, [torch.full((microbatch + 1,), float(microbatch))])
    for microbatch in (3, 0, 2, 1):
        handle = inbox.take(0, messages[microbatch])
        assert handle is not None
        assert len(handle.result()[0]) == microbatch + 1


def test_what_has_no_tensors_is_not_waited_for() -> None:
    transport = Counting(MemoryHub(2))
    empty = Message(9, 0, True)
    inbox = Inbox(transport, {0: [empty]}, spec_of)  # type: ignore[arg-type]
    assert inbox.take(0, empty) is None
    assert transport.posted == 0
