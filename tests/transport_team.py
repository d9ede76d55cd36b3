"""Three real processes that play scenarios over process groups; spawned once, as importing torch is what takes long."""

from __future__ import annotations

import itertools
import multiprocessing
import traceback
from functools import partial
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore
from transport_contract import WIRING

from raypipe.errors import PeerLost
from raypipe.transport import ProcessGroupTransport, join_store, serve_store

HOST = "127.0.0.1"
DEAD = "dead"


def _play(work):
    """Waits for each handle that the scenario yields; a failed wait is raised inside the scenario."""
    resume = work.__next__
    while True:
        try:
            handle = resume()
        except StopIteration as stop:
            return stop.value
        try:
            handle.wait(20.0)
            resume = work.__next__
        except PeerLost as error:
            resume = partial(work.throw, error)


def _member(rank, port, pipe):
    import torch

    torch.set_num_threads(1)
    store = join_store(HOST, port, 30.0)
    while (task := pipe.recv()) is not None:
        scenario, room = task
        try:
            transport = ProcessGroupTransport(PrefixStore(room, store), rank, WIRING, timeout_s=20.0, host=HOST)
            try:
                pipe.send((True, _play(scenario(transport))))
            finally:
                transport.close()
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Team:
    """The processes; ``run`` plays a scenario on all of them and returns what each returned, or DEAD."""

    def __init__(self, size=3):
        self._context = multiprocessing.get_context("spawn")
        self.store, self.port = serve_store(HOST)
        self._rooms = itertools.count()
        self._members = [self._spawn(rank) for rank in range(size)]

    def _spawn(self, rank):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_member, args=(rank, self.port, there), daemon=True)
        process.start()
        there.close()
        return process, here

    def run(self, scenario) -> list[Any]:
        """A member that died in an earlier scenario is replaced first."""
        self._members = [
            member if member[0].is_alive() else self._spawn(rank) for rank, member in enumerate(self._members)
        ]
        room = str(next(self._rooms))
        for _, pipe in self._members:
            pipe.send((scenario, room))
        answers = [self._answer(rank, scenario) for rank in range(len(self._members))]
        for rank, (good, value) in enumerate(answers):
            assert good, f"rank {rank} failed in {scenario.__name__}:\n{value}"
        return [value for _, value in answers]

    def _answer(self, rank, scenario) -> tuple[bool, Any]:
        process, pipe = self._members[rank]
        if not pipe.poll(40.0):
            process.kill()
            return False, "it hung, and was killed"
        try:
            return pipe.recv()
        except EOFError:
            process.join(5.0)
            return True, DEAD

    def close(self):
        for process, pipe in self._members:
            if process.is_alive():
                pipe.send(None)
        for process, _ in self._members:
            process.join(5.0)
            assert process.exitcode is not None, "a member did not end"
