"""What a torch function does to its arguments, told from its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LASTING", "READS", "SHAPES", "changes_in_place", "function_name"]

READS = frozenset(
    [
        "__array__",
        "__bool__",
        "__complex__",
        "__contains__",
        "__float__",
        "__format__",
        "__index__",
        "__int__",
        "allclose",
        "equal",
        "is_nonzero",
        "item",
        "numpy",
        "tolist",
    ]
)
"""They give data away, so that what follows may depend on it."""

SHAPES = frozenset(
    [
        "__hash__",
        "__len__",
        "__repr__",
        "__str__",
        "device",
        "dim",
        "dtype",
        "element_size",
        "get_device",
        "is_complex",
        "is_contiguous",
        "is_cpu",
        "is_cuda",
        "is_floating_point",
        "is_leaf",
        "is_meta",
        "is_mps",
        "is_nested",
        "is_quantized",
        "is_same_size",
        "is_sparse",
        "is_xla",
        "itemsize",
        "layout",
        "names",
        "nbytes",
        "ndim",
        "ndimension",
        "nelement",
        "numel",
        "requires_grad",
        "shape",
        "size",
        "storage_offset",
        "stride",
        "type",
    ]
)
"""They ask for what a placeholder knows too; their answers are no tensors."""

LASTING = frozenset(["__set__", "backward", "grad", "register_hook", "register_post_accumulate_grad_hook"])
"""They reach beyond the chunk that they run in: a hook on a part of a gradient is not a hook on the gradient."""

_NO_CHANGE = ("__index__", "__int__", "__invert__")


def function_name(func: Any) -> str:
    """A torch function's name; a property's (``Tensor.T``) is that of the property."""
    name: str = getattr(func, "__name__", None) or type(func).__name__
    return func.__self__.__name__ if name == "__get__" else name


def changes_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a torch function changes its first argument (or ``out``), by its name."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in _NO_CHANGE) or "out" in kwargs
    return name.endswith("_") or kwargs.get("out") is not None
