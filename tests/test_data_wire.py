"""Batches through an object store: the same tensors come out, in memory of their own."""

from __future__ import annotations

import pickle
import types
from collections import OrderedDict, UserDict, namedtuple
from typing import Any

import numpy
import pytest
import torch
from torch.utils import _pytree as pytree

from raypipe.data import Wire, pack, unpack

Pair = namedtuple("Pair", ["one", "two"])


class Graph:
    """A pytree node of the user's own."""

    def __init__(self, nodes: Any, edges: Any) -> None:
        self.nodes, self.edges = nodes, edges


pytree.register_pytree_node(Graph, lambda graph: ([graph.nodes, graph.edges], None), lambda kids, _: Graph(*kids))


def travel(wire: Wire, writeable: bool) -> Wire:
    """Through pickle with its buffers out of band, as through shared memory: read-only or, worse, writable."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(wire, protocol=5, buffer_callback=buffers.append)
    memory = [bytearray(buffer.raw()) if writeable else bytes(buffer.raw()) for buffer in buffers]
    arrived: Wire = pickle.loads(text, buffers=memory)
    return arrived


DTYPES = sorted({kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}, key=str)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [kind for kind in DTYPES if not str(kind).startswith("torch.q")], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 2, (6 * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tensor = bits.view(dtype) if dtype != torch.bool else bits.bool()
    back = unpack(travel(pack({"x": tensor}), writeable=True))["x"]
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


LAYOUTS = {
    "contiguous": torch.arange(24.0).reshape(2, 3, 4),
    "transposed": torch.arange(24.0).reshape(4, 6).t(),
    "every second": torch.arange(24.0)[::2],
    "expanded": torch.arange(3.0).expand(4, 3),
    "0-dim": torch.tensor(3.5),
    "empty": torch.empty(0, 3),
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "bfloat16, 0-dim": torch.tensor(1.5, dtype=torch.bfloat16),
    "bfloat16, transposed": torch.rand(4, 6).bfloat16().t(),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "parameter": torch.nn.Parameter(torch.ones(3)),
}


@pytest.mark.parametrize("writeable", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, writeable: bool) -> None:
    tensor = LAYOUTS[layout]
    wire = travel(pack([tensor]), writeable)
    (back,) = unpack(wire)
    assert torch.equal(back, tensor)
    assert back.shape == tensor.shape
    assert back.requires_grad == tensor.requires_grad
    if layout in ("channels last", "transposed"):
        assert back.stride() == tensor.stride()


@pytest.mark.parametrize("writeable", [False, True])
def test_what_comes_out_never_shares_memory(writeable: bool) -> None:
    batch = {
        "x": torch.arange(6),
        "half": torch.ones(3).bfloat16(),
        "array": numpy.arange(3),
        "names": numpy.array(["a"]),
    }
    wire = travel(pack(batch), writeable)
    first, second = unpack(wire), unpack(wire)
    for name in ("x", "half", "array"):
        first[name].zero_()
        assert second[name].any()
    first["names"][0] = "b"
    third = unpack(wire)
    assert third["x"].tolist() == list(range(6))
    assert third["half"].tolist() == [1, 1, 1]
    assert third["names"][0] == "a"


def test_nor_without_a_journey() -> None:
    batch = {"x": torch.arange(6), "sparse": torch.eye(2).to_sparse(), "list": [1]}
    back = unpack(pack(batch))
    back["x"].zero_()
    back["sparse"].mul_(2)
    back["list"].append(2)
    assert batch["x"].tolist() == list(range(6))
    assert torch.equal(batch["sparse"].to_dense(), torch.eye(2))
    assert batch["list"] == [1]


def test_packing_a_tensor_copies_nothing() -> None:
    tensor = torch.arange(6)
    (leaf,) = pack(tensor).leaves
    assert leaf.values.ctypes.data == tensor.data_ptr()
    assert pack({"x": tensor, "again": tensor, "half": torch.ones(4).bfloat16()}).nbytes == 48 + 8


def test_trees() -> None:
    tensor = torch.arange(3)
    batch = {
        "nested": [(tensor, None), {"deep": Pair(tensor + 1, "text")}],
        "ordered": OrderedDict(a=tensor, b=2.5),
        "graph": Graph(tensor * 2, {"index": tensor * 3}),
        "user": UserDict(x=tensor, inner=UserDict(y=tensor)),
        "proxy": types.MappingProxyType({"z": tensor}),
        "rows": ["some", "text"],
    }
    back = unpack(travel(pack(batch), writeable=False))
    assert torch.equal(back["nested"][0][0], tensor)
    assert back["nested"][0][1] is None
    assert isinstance(back["nested"][1]["deep"], Pair)
    assert back["nested"][1]["deep"].two == "text"
    assert type(back["ordered"]) is OrderedDict
    assert isinstance(back["graph"], Graph)
    assert torch.equal(back["graph"].edges["index"], tensor * 3)
    assert type(back["user"]) is type(back["user"]["inner"]) is type(back["proxy"]) is dict
    assert torch.equal(back["user"]["inner"]["y"], tensor)
    assert back["rows"] == ["some", "text"]


def test_a_node_that_the_receiver_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    wire = travel(pack(Graph(torch.ones(2), None)), writeable=False)
    monkeypatch.delitem(pytree.SUPPORTED_NODES, Graph)
    with pytest.raises(TypeError, match="a batch holds a Graph, which is no pytree in this process: register it"):
        unpack(wire)


def test_the_same_tensor_twice_stays_one() -> None:
    tensor = torch.arange(3)
    back = unpack(travel(pack({"input_ids": tensor, "labels": tensor, "other": tensor.clone()}), writeable=False))
    assert back["input_ids"] is back["labels"]
    assert back["input_ids"] is not back["other"]


def test_arrays_become_tensors() -> None:
    frozen = numpy.arange(4, dtype=numpy.float32)
    frozen.flags.writeable = False
    batch = {
        "frozen": frozen,
        "backwards": numpy.arange(4)[::-1],
        "big endian": numpy.arange(4, dtype=">i4"),
        "scalar": numpy.array(2.5),
        "flags": numpy.array([True, False]),
        "matrix": numpy.arange(6).reshape(2, 3).T,
    }
    back = unpack(travel(pack(batch), writeable=False))
    assert all(isinstance(value, torch.Tensor) for value in back.values())
    assert back["frozen"].tolist() == [0, 1, 2, 3]
    assert back["backwards"].tolist() == [3, 2, 1, 0]
    assert back["big endian"].dtype == torch.int32
    assert back["big endian"].tolist() == [0, 1, 2, 3]
    assert back["scalar"].shape == ()
    assert back["flags"].dtype == torch.bool
    assert back["matrix"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_arrays_that_no_tensor_holds_stay() -> None:
    batch = {"text": numpy.array(["a", "b"]), "dates": numpy.array(["2020-01-01"], "datetime64[D]")}
    batch["objects"] = numpy.array([{}, None], dtype=object)
    back = unpack(travel(pack(batch), writeable=False))
    for name, array in batch.items():
        assert isinstance(back[name], numpy.ndarray)
        assert (back[name] == array).all()


def test_a_result_of_another_graph_is_cut_off() -> None:
    result = torch.ones(3, requires_grad=True) * 2
    back = unpack(pack(result))
    assert back.is_leaf
    assert back.requires_grad


def test_a_tokenizers_output() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": torch.ones(2, 3, dtype=torch.int64), "names": ["a", "b"]})
    back = unpack(travel(pack(batch), writeable=False))
    assert type(back) is dict
    assert back["names"] == ["a", "b"]
    assert torch.equal(back["input_ids"], batch["input_ids"])
