"""Where a rank's tensors come from: from a model that was given, or from recipes of one that nobody built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from raypipe.model.deferred import Deferral
from raypipe.model.husk import husk_of, names_of
from raypipe.model.overlap import refuse_overlap
from raypipe.model.recipes import Constant, Recipe
from raypipe.model.seeds import kept_state

__all__ = ["Given", "Origin", "Promised", "build_deferred", "origin_of"]

READY_BYTES = 64 * 2**20
"""How much a callable may bring that was not made by PyTorch's functions: tables, not weights."""


class Origin(Protocol):
    """A model and the values of its tensors, which need not be there yet."""

    @property
    def model(self) -> nn.Module:
        """The unsplit model: the user's own, or one of husks. Names, shapes and dtypes hold for both."""

    @property
    def is_whole(self) -> bool:
        """Whether the model's weights are in this process, so that it can be run."""

    def tensor(self, name: str) -> Tensor:
        """A parameter's or buffer's values, by its first name; where they are the user's own, no copy."""

    def share(self, names: Iterable[str]) -> Callable[[], dict[str, Tensor]]:
        """What gives these tensors in another process, as memory of its own; it can be pickled."""


@dataclass(frozen=True, slots=True, eq=False)
class Given:
    """An ``nn.Module`` of the user's, which is never changed."""

    model: nn.Module
    pack: Callable[[dict[str, Tensor]], Callable[[], dict[str, Tensor]]]
    is_whole: bool = True

    def tensor(self, name: str) -> Tensor:
        """The user's own."""
        return _named(self.model)[name].detach()

    def share(self, names: Iterable[str]) -> Callable[[], dict[str, Tensor]]:
        """The tensors themselves, packed to be sent."""
        named = _named(self.model)
        return self.pack({name: named[name].detach() for name in names})


@dataclass(frozen=True, slots=True, eq=False)
class Promised:
    """A model that was built without its weights.

    Attributes: ``model``, all of whose parameters and buffers are husks; ``recipes``, by first name.
    """

    model: nn.Module
    recipes: Mapping[str, Recipe]
    is_whole: bool = False

    def tensor(self, name: str) -> Tensor:
        """Made anew at each call."""
        return self.recipes[name].make()

    def share(self, names: Iterable[str]) -> Callable[[], dict[str, Tensor]]:
        """The recipes, each of which is made where it is called."""
        return _Kitchen({name: self.recipes[name] for name in names})


@dataclass(frozen=True, slots=True, eq=False)
class _Kitchen:
    recipes: Mapping[str, Recipe]

    def __call__(self) -> dict[str, Tensor]:
        return {name: recipe.make() for name, recipe in self.recipes.items()}


def origin_of(model: object, seed: int, pack: Callable[[dict[str, Tensor]], Callable[[], dict[str, Tensor]]]) -> Origin:
    """The origin of what the user gave as ``model``.

    Args:
        model: a module, or a callable without arguments that builds one.
        seed: of deferred initialisation.
        pack: makes tensors ready to be sent.

    Raises:
        TypeError: it is neither, or the callable returns no module. An exception of the callable comes as itself.
        ValueError: two parameters lie in the same memory, or the callable's model cannot be built without its weights.
    """
    if isinstance(model, nn.Module):
        refuse_overlap(names_of(model)[0])
        return Given(model, pack)
    if isinstance(model, type) or not callable(model):
        what = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model is {what}, but must be an nn.Module or a callable without arguments that builds one")
    return build_deferred(model, seed)


def build_deferred(make: Callable[[], Any], seed: int) -> Promised:
    """Runs ``make()`` once without allocating weights; see ``origin_of``."""
    deferral = Deferral(seed)
    with kept_state():
        model = deferral.run(make)
    if not isinstance(model, nn.Module):
        raise TypeError(f"the callable given as model returned a {type(model).__name__}, but must return an nn.Module")
    refuse_overlap(names_of(model)[0])
    named = _named(model)
    for name, tensor in named.items():
        if tensor.device.type != "cpu":
            raise ValueError(
                f"{name} of the callable's model is on the device {tensor.device}; build it on the CPU, since each "
                "stage places its own weights"
            )
    recipes = {name: deferral.recipe(tensor) for name, tensor in named.items()}
    _refuse_ready(recipes)
    husks: dict[int, Tensor] = {id(b): husk_of(b, name, False) for name, b in names_of(model)[1].items()}
    husks.update((id(p), husk_of(p, name, True)) for name, p in names_of(model)[0].items())
    return Promised(deferral.copy_without(model, husks), recipes)


def _refuse_ready(recipes: Mapping[str, Recipe]) -> None:
    found: dict[int, int] = {}
    for recipe in recipes.values():
        leaves = [recipe.target, *(leaf for step in recipe.steps for leaf in (*step.args, *step.kwargs.values()))]
        found.update((id(c), c.value.nbytes) for c in leaves if isinstance(c, Constant))
    if sum(found.values()) > READY_BYTES:
        raise ValueError(
            f"the model's callable brings {sum(found.values()) >> 20} MiB of ready values (NumPy, a file), which the "
            "driver would hold whole; make weights with PyTorch's functions, or load them by raypipe.from_pretrained"
        )


def _named(model: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = names_of(model)
    return {**parameters, **buffers}
