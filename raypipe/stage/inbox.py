"""The messages of one step that come to this rank, posted ahead in each sender's order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from raypipe.stage.program import Message
from raypipe.tensors import TensorSpec
from raypipe.transport.base import Handle, Transport

__all__ = ["Inbox"]

AHEAD = 2  # a message can arrive while another is computed on; more would only hold memory


class Inbox:
    """Posts receives ahead of their use.

    Args:
        transport: this rank's.
        incoming: the messages of each sender's rank, in its order.
        specs: the tensors of a message; a message of none is never sent.
    """

    def __init__(
        self,
        transport: Transport,
        incoming: Mapping[int, Sequence[Message]],
        specs: Callable[[Message], Sequence[TensorSpec]],
    ) -> None:
        self._transport, self._specs = transport, specs
        self._unposted = {sender: deque(m for m in messages if specs(m)) for sender, messages in incoming.items()}
        self._posted: dict[Message, Handle[list[Tensor]]] = {}
        self._open = dict.fromkeys(incoming, 0)
        for sender in incoming:
            self.post(sender)

    def take(self, sender: int, message: Message) -> Handle[Any] | None:
        """The handle of a message, or None where nothing is sent for it; ``post`` follows when there is time."""
        if message not in self._posted:
            if not self._specs(message):
                return None
            while message not in self._posted:
                self._post_one(sender)
        self._open[sender] -= 1
        return self._posted.pop(message)

    def post(self, sender: int) -> None:
        """Posts the sender's next messages, in the place of those that were taken."""
        while self._unposted[sender] and self._open[sender] < AHEAD:
            self._post_one(sender)

    def _post_one(self, sender: int) -> None:
        message = self._unposted[sender].popleft()
        self._posted[message] = self._transport.receive(sender, self._specs(message))
        self._open[sender] += 1
