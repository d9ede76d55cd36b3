"""Where the ranks find each other: one key-value store, served by one of them.

No port is guessed: the system chooses one, and whoever serves the store tells the others.
"""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from raypipe.errors import PeerLost

__all__ = ["join_store", "serve_store"]


def serve_store(host: str, timeout_s: float = 300.0) -> tuple[TCPStore, int]:
    """Opens a store that listens at ``host`` only, at a port of the system's choice.

    Args:
        host: name or address of this machine, reachable by every rank.
        timeout_s: how long a read of a key that nobody has written waits, in seconds.

    Returns:
        The store, which lives as long as this object is kept, and its port.

    Raises:
        ValueError: ``host`` is not an address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        raise ValueError(f"cannot listen at {host!r} ({error}); give a name or address of this machine") from error
    port: int = listener.getsockname()[1]
    # A socket of our own: by itself the store would listen at every address of the machine. It takes the socket over.
    store = TCPStore(
        host, port, None, True, timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return store, port


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connects to a store that another process serves.

    Args:
        host: where it listens.
        port: its port.
        timeout_s: how long to try, in seconds; also how long a read of a key that nobody has written waits.

    Raises:
        PeerLost: nobody answered in time.
    """
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        raise PeerLost(None, f"no store answered at {host}:{port} within {timeout_s:g} s") from error
