"""Snapshots of attributes: what changed, and giving lists and dicts back what they held."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from raypipe.model.attributes import Snapshot, containers, contents, refill, same_contents


def test_a_snapshot_tells_what_changed() -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2))
    net[0].seen, net[0].table, net[0].kept = [], {"a": 1}, None
    snapshot = Snapshot(net)
    assert not list(snapshot.changed())
    net[0].seen.append(1)
    net[0].kept = torch.ones(1)
    assert [(path, name) for path, name, _ in snapshot.changed()] == [("0", "seen"), ("0", "kept")]
    assert snapshot.is_same("0", "seen", net[0].seen)
    assert not snapshot.is_same("0", "kept", net[0].kept)


def test_contents_are_restored_in_the_same_objects() -> None:
    net: Any = nn.Linear(2, 2)
    net.seen, net.table = seen, table = [1], {"a": 1}
    snapshot = Snapshot(net)
    seen.append(2)
    table.clear()
    snapshot.restore_contents()
    assert net.seen is seen == [1]
    assert net.table is table == {"a": 1}


def test_containers_come_with_their_paths() -> None:
    inner: list[int] = [1]
    tree = (0, {"a": inner})
    assert list(containers(tree)) == [((1,), tree[1]), ((1, "a"), inner)]


def test_same_contents_are_the_same_objects() -> None:
    one, other = torch.ones(1), torch.ones(1)
    assert same_contents(contents([one]), contents([one]))
    assert not same_contents(contents([one]), contents([other]))
    assert same_contents(contents(one), None)
    assert not same_contents(contents([]), None)
    held = [one]
    refill(held, [other])
    assert held[0] is other
