"""How tensors move from rank to rank: one small protocol, inside a process or between processes."""

from raypipe.transport.base import Done, Handle, TensorSpec, Transport, Wiring
from raypipe.transport.memory import MemoryHub, MemoryTransport
from raypipe.transport.process_group import ProcessGroupTransport
from raypipe.transport.rendezvous import join_store, serve_store

__all__ = [
    "Done",
    "Handle",
    "MemoryHub",
    "MemoryTransport",
    "ProcessGroupTransport",
    "TensorSpec",
    "Transport",
    "Wiring",
    "join_store",
    "serve_store",
]
