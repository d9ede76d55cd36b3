from __future__ import annotations

import socket
import time

import pytest

from raypipe.errors import PeerLost
from raypipe.transport import join_store, serve_store


def test_two_ends_see_the_same_keys_at_a_port_of_the_systems_choice():
    served, port = serve_store("127.0.0.1")
    other, other_port = serve_store("127.0.0.1")
    assert port != other_port
    joined = join_store("127.0.0.1", port, 5.0)
    joined.set("key", "value")
    assert served.get("key") == b"value"
    assert not other.check(["key"])


def test_it_listens_at_the_given_address_only():
    _store, port = serve_store("127.0.0.1")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=1.0)


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(PeerLost, match=f"no store answered at 127.0.0.1:{port} within 1 s"):
        join_store("127.0.0.1", port, 1.0)
    assert time.monotonic() - start < 5.0


def test_an_address_of_another_machine():
    with pytest.raises(ValueError, match=r"cannot listen at '192\.0\.2\.1'.*of this machine"):
        serve_store("192.0.2.1")
