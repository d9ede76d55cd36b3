"""Columns of a table as what a batch holds: tensors, or lists of text."""

from __future__ import annotations

from typing import Any

import numpy
import pyarrow as pa
import torch

__all__ = ["check_type", "from_arrow", "from_numpy", "leaf_bytes"]


def check_type(name: str, kind: pa.DataType) -> None:
    """Refuses a column type that no batch can hold.

    Raises:
        ValueError: it is neither numeric, nor text or bytes, nor (nested) lists of numbers.
    """
    leaf = _leaf(kind)
    is_list = leaf is not kind
    if not (_is_numeric(leaf) or (_is_text(leaf) and not is_list)):
        raise ValueError(
            f"column {name!r} has type {kind}, but a batch holds numbers, lists of numbers, text and bytes: leave it "
            "out of `columns`, or store it as one of these"
        )


def leaf_bytes(kind: pa.DataType) -> int | None:
    """Bytes of one innermost value of a numeric column, None for text."""
    leaf = _leaf(kind)
    return max(1, leaf.bit_width // 8) if _is_numeric(leaf) else None


def from_arrow(name: str, column: pa.ChunkedArray) -> torch.Tensor | list[Any]:
    """A column of a batch of B rows.

    Numbers give a tensor ``[B]``, lists of numbers ``[B, L]`` (nested ones ``[B, L, M]``), both of the column's own
    type: integers narrower than 64 bits stay so. Text and bytes give a list.

    Raises:
        ValueError: values are missing, or lists differ in length.
    """
    array = pa.concat_arrays(column.chunks)
    if _is_text(array.type):
        _check_no_nulls(name, array)
        values: list[Any] = array.to_pylist()
        return values
    shape = [len(array)]
    while _is_list(array.type):
        _check_no_nulls(name, array)
        shape.append(_common_length(name, array))
        array = array.flatten()
    _check_no_nulls(name, array)
    # Arrow's memory is read-only, which tensors cannot be.
    return torch.from_numpy(numpy.array(array.to_numpy(zero_copy_only=False))).reshape(shape)


def from_numpy(name: str, column: Any) -> Any:
    """A column that came as an array: a tensor where it holds numbers or arrays of one shape, else a list.

    Raises:
        ValueError: its rows are arrays of different shapes.
    """
    if not isinstance(column, numpy.ndarray):
        return column
    if column.dtype.kind in "biufc":
        return torch.from_numpy(numpy.array(column))
    rows = column.tolist() if column.dtype.kind != "O" else list(column)
    if not rows or not isinstance(rows[0], (numpy.ndarray, list)):
        return rows
    arrays = [numpy.asarray(row) for row in rows]
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) > 1:
        raise ValueError(_ragged(name, shapes[0], shapes[-1]))
    return torch.from_numpy(numpy.stack(arrays))


def _common_length(name: str, array: Any) -> int:
    if pa.types.is_fixed_size_list(array.type):
        size: int = array.type.list_size
        return size
    lengths = array.value_lengths().to_numpy()
    if len(lengths) == 0:
        return 0
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest != longest:
        raise ValueError(_ragged(name, shortest, longest))
    return longest


def _ragged(name: str, one: object, other: object) -> str:
    return (
        f"column {name!r} has rows of different lengths in one batch ({one} and {other}), and a tensor has one: pad "
        "them to one length when the data is written"
    )


def _check_no_nulls(name: str, array: Any) -> None:
    if array.null_count:
        raise ValueError(
            f"column {name!r} has {array.null_count} missing values in one batch, and a tensor has none: fill or drop "
            "them when the data is written"
        )


def _leaf(kind: pa.DataType) -> pa.DataType:
    while _is_list(kind):
        kind = kind.value_type
    return kind


def _is_list(kind: pa.DataType) -> bool:
    test = pa.types
    return bool(test.is_fixed_size_list(kind) or test.is_list(kind) or test.is_large_list(kind))


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_text(kind: pa.DataType) -> bool:
    test = pa.types
    text = test.is_string(kind) or test.is_large_string(kind)
    return bool(text or test.is_binary(kind) or test.is_large_binary(kind))
