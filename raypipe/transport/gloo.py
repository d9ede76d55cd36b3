"""The one place that knows the backend: groups of ranks connected by gloo, over TCP.

Another backend (NCCL) is another class with ``Network.connect`` and the methods of ``Group``.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed.distributed_c10d import ProcessGroupGloo, Store, Work

from raypipe.errors import PeerLost

__all__ = ["Group", "Network", "lost", "wait_for"]

# Gloo delivers by tag. A message's tag is its size in bytes: a message longer than the buffer that was posted for it
# would abort the process, and a shorter one would leave the rest of the buffer as it was, without an error.
_TAG_LIMIT = 2**31 - 1
_CLOSING_TAG = _TAG_LIMIT


class Network:
    """This process's end of all its connections.

    Args:
        host: name or address of this machine to listen at, reachable by the peers; None lets gloo choose.
    """

    def __init__(self, host: str | None) -> None:
        self._gloo = cast(Any, ProcessGroupGloo)  # its stubs lack _Options, send and recv
        self._device = self._gloo.create_device(hostname=host or "", lazy_init=False)

    def connect(self, store: Store, ranks: tuple[int, ...], rank: int, timeout_s: float) -> Group:
        """Connects ``rank`` with the others of ``ranks``; blocks until all of them have called it.

        Raises:
            PeerLost: that took longer than ``timeout_s`` seconds.
        """
        options = self._gloo._Options()
        options._devices = [self._device]
        options._threads = 1  # they run gloo's collectives, of which none is used
        options._timeout = timedelta(seconds=timeout_s)
        index = ranks.index(rank)
        try:
            return Group(self._gloo(store, index, len(ranks), options), ranks, index)
        except RuntimeError as error:
            others = [other for other in ranks if other != rank]
            peer = others[0] if len(others) == 1 else None
            raise PeerLost(peer, f"no connection within {timeout_s:g} s ({_first_line(error)})") from error


class Group:
    """Connections among ``ranks``, each with each. Messages between two of them keep their order."""

    def __init__(self, backend: Any, ranks: tuple[int, ...], index: int) -> None:
        self.ranks = ranks
        self._backend = backend
        self._index = index
        self._place = {rank: place for place, rank in enumerate(ranks)}

    def send(self, tensor: torch.Tensor, to: int) -> Work:
        """Starts sending; gloo moves the data once ``to`` has posted its receive, and holds the tensor until then."""
        # resolve: a lazily conjugated or negated view would travel without its bit.
        whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
        _check_device(whole)
        return cast(Work, self._backend.send([whole], self._place[to], whole.nbytes % _TAG_LIMIT))

    def receive(self, buffer: torch.Tensor, source: int) -> Work:
        """Posts the receive of the next tensor of this size from ``source``."""
        _check_device(buffer)
        return cast(Work, self._backend.recv([buffer], self._place[source], buffer.nbytes % _TAG_LIMIT))

    def sever(self) -> None:
        """Closes the connections, from any thread; waits at both ends then fail at once.

        In torch 2.11 to 2.13 ``shutdown`` and ``abort`` do nothing for gloo, and dropping the group closes nothing
        while a thread waits in it. But gloo closes all connections of a group once one wait in it has timed out: so a
        receive is posted that nobody answers.
        """
        nobody = torch.empty(1)
        for place in range(len(self.ranks)):
            if place == self._index:
                continue
            with contextlib.suppress(RuntimeError):
                work = self._backend.recv([nobody], place, _CLOSING_TAG)  # raises where that connection is gone
                work.wait(timedelta(milliseconds=1))
        self._backend = _Severed()  # the last reference to gloo's group goes, and its threads with it


class _Severed:
    """Stands where a backend was."""

    def send(self, *args: object) -> None:
        raise RuntimeError("this rank closed its connections")

    recv = send


def wait_for(work: Work, peer: int, left_s: float, timeout_s: float) -> None:
    """Waits for a send or a receive, without holding the interpreter's lock.

    Args:
        work: what ``Group.send`` or ``Group.receive`` returned.
        peer: the rank at the other end, for the error.
        left_s: how long to wait, in seconds.
        timeout_s: the caller's whole limit, for the error.

    Raises:
        PeerLost: the connection closed, or ``left_s`` seconds went by; gloo then closes the connection.
    """
    try:
        # Gloo counts milliseconds and takes 0 for "no limit".
        done = work.wait(timedelta(seconds=max(left_s, 0.001)))
    except RuntimeError as error:
        raise lost(peer, error, timeout_s) from error
    if not done:
        raise PeerLost(peer, "the wait was aborted")


def lost(peer: int | None, error: RuntimeError, timeout_s: float = 0.0) -> PeerLost:
    """What an error of gloo means, in one sentence."""
    text = str(error)
    if "Timed out waiting" in text:
        verb = "took" if "send operation" in text else "sent"
        return PeerLost(peer, f"it {verb} nothing for {timeout_s:g} s")
    if "Application timeout" in text:
        return PeerLost(peer, "the connection was closed on this side, after a timeout")
    if any(sign in text for sign in ("closed by peer", "reset by peer", "Broken pipe", "Connection refused")):
        return PeerLost(peer, "it closed its end, so it failed or its process is gone")
    return PeerLost(peer, _first_line(error))


def _first_line(error: RuntimeError) -> str:
    """An error's text without the place in gloo's source that stands before it."""
    line = str(error).strip().partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[/") else line


def _check_device(tensor: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"gloo carries tensors of the CPU, but this one is on {tensor.device}; move it before sending")
