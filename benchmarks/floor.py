"""What the machine itself takes, measured apart: how late a sleep ends, and how long a message travels."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from statistics import median

import torch
from torch.distributed import PrefixStore

from raypipe.tensors import TensorSpec
from raypipe.transport.base import Wiring
from raypipe.transport.process_group import ProcessGroupTransport
from raypipe.transport.rendezvous import join_store, serve_store

__all__ = ["message_s", "overshoot_s"]

HOST, TIMEOUT_S = "127.0.0.1", 60.0


def overshoot_s(processes: int, sleeps: tuple[float, ...], repeats: int = 20) -> tuple[float, ...]:
    """By how much each of these sleeps is longer than asked, median, while so many processes sleep alike."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(processes)]
    workers = [context.Process(target=_sleep, args=(theirs, sleeps, repeats), daemon=True) for _, theirs in pipes]
    for worker in workers:
        worker.start()
    for ours, _ in pipes:
        ours.recv()
    for ours, _ in pipes:
        ours.send("go")
    measured = [ours.recv() for ours, _ in pipes]
    for worker in workers:
        worker.join()
    return tuple(median(late for each in measured for late in each[number]) for number in range(len(sleeps)))


def message_s(nbytes: int, processes: int, rest_s: float, repeats: int = 40) -> float:
    """One way of a message between two processes over raypipe's transport: half a round trip, median.

    As it is in use: all the processes exchange messages in pairs, and rest before each, as one that computes elsewhere
    does, so that none finds its caches warm.
    """
    context = multiprocessing.get_context("spawn")
    store, port = serve_store(HOST)
    pipes = [context.Pipe() for _ in range(max(1, processes // 2))]
    workers = [
        context.Process(target=_ping, args=(pair, rank, port, nbytes, rest_s, repeats, theirs), daemon=True)
        for pair, (_, theirs) in enumerate(pipes)
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    trips: list[float] = [trip for ours, _ in pipes for trip in ours.recv()]
    for worker in workers:
        worker.join()
    del store
    return median(trips) / 2


def _sleep(pipe: Connection, sleeps: tuple[float, ...], repeats: int) -> None:
    late: list[list[float]] = [[] for _ in sleeps]
    pipe.send("ready")
    pipe.recv()
    for _ in range(repeats):
        for number, asked in enumerate(sleeps):
            began = time.monotonic()
            time.sleep(asked)
            late[number].append(time.monotonic() - began - asked)
    pipe.send(late)


def _ping(pair: int, rank: int, port: int, nbytes: int, rest_s: float, repeats: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = PrefixStore(f"ping/{pair}", join_store(HOST, port, TIMEOUT_S))
    transport = ProcessGroupTransport(store, rank, Wiring(2, ((0, 1), (1, 0))), timeout_s=TIMEOUT_S, host=HOST)
    tensor = torch.zeros(nbytes // 4)
    specs = [TensorSpec(tuple(tensor.shape), tensor.dtype)]
    trips = []
    for _ in range(repeats):
        handle = transport.receive(1 - rank, specs)
        if rank == 0:
            time.sleep(rest_s)
        began = time.monotonic()
        if rank == 0:
            transport.send(1, [tensor])
        handle.wait(TIMEOUT_S)
        if rank == 1:
            transport.send(0, handle.result())
        trips.append(time.monotonic() - began)
    transport.flush().wait(TIMEOUT_S)
    if rank == 0:
        pipe.send(trips)
