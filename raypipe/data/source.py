"""From what the user has to a source."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from raypipe.data.adapters import FunctionSource, IterableSource, ListSource, LoaderSource, OnceSource, RaySource
from raypipe.data.cursor import Cursor, Source

__all__ = ["Cursor", "Source", "open_source"]

_ALLOWED = (
    "data is a list of batches, a DataLoader or other iterable of batches, a function without arguments that yields "
    "batches, a ray.data.Dataset or raypipe.data.parquet(...)"
)


def open_source(data: Any) -> Source:
    """The source for anything that a user may give as data. Nothing is read yet.

    Args:
        data: a list of batches, a ``DataLoader`` (``set_epoch`` is called where its sampler has it), an iterable of
            batches, a function without arguments that yields an epoch's batches, an iterator (for one epoch), a
            ``ray.data.Dataset`` (batches of 256 rows; ``RaySource`` has other sizes), or a ``Source``.

    Raises:
        TypeError: it is none of these; the sentence says what is allowed.
    """
    if isinstance(data, type):
        raise TypeError(f"{_ALLOWED}, but this is the class {data.__name__} itself")
    if callable(getattr(data, "epoch", None)):
        source: Source = data
        return source
    if isinstance(data, DataLoader):
        return LoaderSource(data)
    if _is_ray_dataset(data):
        return RaySource(data)
    if (hint := _not_batches(data)) is not None:
        raise TypeError(f"{_ALLOWED}, but this is {_kind(data)}: {hint}")
    if isinstance(data, list):
        return ListSource(data)
    if isinstance(data, Iterator):
        return OnceSource(data)
    if isinstance(data, Iterable):
        return IterableSource(data)
    if callable(data):
        _check_no_arguments(data)
        return FunctionSource(data)
    raise TypeError(f"{_ALLOWED}, but this is {_kind(data)}")


def _is_ray_dataset(data: Any) -> bool:
    """By the class's module, since Ray itself is known in the driver's room only."""
    modules = (kind.__module__ for kind in type(data).__mro__)
    return any(f"{name}.".startswith("ray.data.") for name in modules) and callable(getattr(data, "iter_batches", None))


def _not_batches(data: Any) -> str | None:
    """What to do instead with an iterable or a callable that surely does not give batches, else None."""
    if isinstance(data, (str, bytes)) or hasattr(data, "__fspath__"):
        return "read files with raypipe.data.parquet(path, columns, batch_size)"
    if isinstance(data, (Mapping, tuple, torch.Tensor, numpy.ndarray)):
        return "it looks like one batch; put batches into a list"
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return "it gives single samples; wrap it in a DataLoader"
    if isinstance(data, torch.nn.Module):
        return "a model gives no batches"
    if type(data).__module__.partition(".")[0] in ("pandas", "pyarrow"):
        return "write it with to_parquet and read it with raypipe.data.parquet(path, columns, batch_size)"
    return None


def _check_no_arguments(function: Any) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TypeError(f"{_ALLOWED}, but {_kind(function)} cannot be called without arguments: {error}") from None
    except ValueError:
        return  # A function in C without a signature: the call will tell.


def _kind(data: Any) -> str:
    name = getattr(data, "__name__", None)
    return f"the {type(data).__name__} {name}" if isinstance(name, str) else f"a {type(data).__name__}"
