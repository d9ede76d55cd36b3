"""Real processes that form one tensor group over gloo; spawned once, as importing torch is what takes long."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore

from raypipe.transport import join_store, serve_store

HOST = "127.0.0.1"


def _member(rank, size, port, pipe):
    import torch

    from raypipe.parallel.group import open_group

    torch.set_num_threads(1)
    group = open_group(PrefixStore("tensor", join_store(HOST, port, 30.0)), rank, size, 60.0)
    while (task := pipe.recv()) is not None:
        scenario, args = task
        torch.manual_seed(0)
        try:
            pipe.send((True, scenario(group, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    group.close()
    os._exit(0)  # the interpreter takes its time to end


class TensorTeam:
    """The processes; ``run`` calls a function on all of them and returns what each returned."""

    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        self.store, port = serve_store(HOST)
        self._members = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_member, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()
            self._members.append((process, here))

    def run(self, scenario, *args) -> list[Any]:
        """``scenario(group, *args)`` on each rank; a failure of one is the test's."""
        for _, pipe in self._members:
            pipe.send((scenario, args))
        answers = []
        for process, pipe in self._members:
            if not pipe.poll(120.0):
                process.kill()
                answers.append((False, "it hung, and was killed"))
            else:
                answers.append(pipe.recv())
        for rank, (good, value) in enumerate(answers):
            assert good, f"rank {rank} failed in {scenario.__name__}:\n{value}"
        return [value for _, value in answers]

    def close(self):
        for process, pipe in self._members:
            if process.is_alive():
                pipe.send(None)
        for process, _ in self._members:
            process.join(30.0)
            assert process.exitcode is not None, "a member did not end"
