"""The leaves of a batch and the lists in it."""

from __future__ import annotations

import dataclasses
from collections import UserDict

import numpy as np
import torch

from raypipe.model.batch_tree import Leaf, flatten, leaves_of, lists_of, shape_of

T = torch.zeros(4, 2)


@dataclasses.dataclass
class Holder:
    x: torch.Tensor


def test_leaves_have_the_order_of_flatten_and_keys_that_lead_to_them():
    batch = (UserDict(b=T, a={"deep": UserDict(c=[T, 1])}), ["one", "two"])
    leaves = leaves_of(batch)
    assert [leaf.keys for leaf in leaves] == [(0, "b"), (0, "a", "deep", "c", 0), (0, "a", "deep", "c", 1), (1,)]
    found, structure = flatten(batch)
    assert [leaf.value for leaf in leaves] == [found[0], *found[1:]]
    assert found[0] is T
    assert structure.num_leaves == 4
    assert leaves[1].path == "[0]['a']['deep']['c'][0]"
    assert Leaf((), 0).path == "the batch"
    assert Leaf(("x",), 0).path == "x"


def test_shapes_of_rows_and_arrays():
    assert [shape_of(v) for v in (T, np.ones(3), ["a", "b"], 1, None)] == [(4, 2), (3,), (2,), None, None]


def test_what_is_opaque_and_what_stands_in_a_list():
    opaque = [Leaf((), v).is_opaque for v in (Holder(T), object(), T, None, 1, "x", ["x"])]
    assert opaque == [True, True, False, False, False, False, False]
    keys = [("x",), (0,), (0, 1), ("x", "y"), ("boxes", 0), (0, "boxes", 1, "label")]
    assert [Leaf(k, 0).is_listed for k in keys] == [False, False, False, False, True, True]


def test_lists_that_have_a_part_for_each_sample():
    batch = {"boxes": [T] * 3, "targets": UserDict(each=[{"a": T}] * 3), "words": [["a"], ["b"], ["c"]], "two": [T, T]}
    found = [(("boxes",), "tensor"), (("targets", "each"), "dict"), (("words",), "list")]
    assert list(lists_of(batch, 3)) == found
    assert list(lists_of([T, T], 2)) == []
    assert list(lists_of({"mixed": [T, None, 1], "tuple": (T, T, T), "rows": [1, 2, 3]}, 3)) == []
