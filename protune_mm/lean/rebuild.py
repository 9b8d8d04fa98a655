"""Tensors that are computed again in backward instead of being kept.

A recipe says how a tensor follows from one that is kept anyway. The layer that would save the
tensor for backward saves the recipe, through PyTorch's own hooks for saved tensors, so the
backward formulas stay PyTorch's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Kept:
    """A tensor that a recipe starts from; it must not change before backward.

    Args:
        tensor: kept without its graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()
        self._version = tensor._version

    def get(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: it was changed in place since.
        """
        if self._tensor._version != self._version:
            raise RuntimeError(CHANGED)
        return self._tensor


CHANGED = (
    'a tensor needed for gradient computation has been modified by an inplace operation '
    'after a lean layer read it: change it out of place, or use lean=False'
)


class Recipe:
    """How to compute some tensors again.

    Args:
        make: returns the tensors; called without a graph, with autocast off.
        kept: bytes of tensors that only this recipe keeps alive.
        cost: multiplications that computing them again takes.
    """

    def __init__(self, make: Callable[[], Sequence[Tensor]], kept: int, cost: int) -> None:
        self.make = make
        self.kept = kept
        self.cost = cost
        self._made: dict[int, Tensor] = {}

    def take(self, index: int) -> Tensor:
        """Return tensor ``index``; all are made at once, each is kept until it is taken."""
        if index not in self._made:
            off = (torch.autocast(kind, enabled=False) for kind in ('cpu', 'cuda'))
            with torch.no_grad(), next(off), next(off):
                self._made = dict(enumerate(self.make()))
        return self._made.pop(index)


_latest = threading.local()
"""The tensor that a lean layer returned last in this thread, and its recipe.

Not an attribute of the tensor: the graph keeps those alive as long as the tensor itself.
"""


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Note how to compute a tensor again, for the layer that reads it next."""

    def forget(gone: weakref.ref) -> None:
        if getattr(_latest, 'slot', (None,))[0] is gone:
            del _latest.slot

    _latest.slot = (weakref.ref(tensor, forget), tensor._version, recipe)
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor; None if it has none, is not the latest, or was changed since."""
    ref, version, recipe = getattr(_latest, 'slot', (None, None, None))
    if ref is None or ref() is not tensor or version != tensor._version or hooked():
        return None
    return recipe


def hooked() -> bool:
    """Whether somebody else, activation checkpointing say, takes what is saved for backward.

    Then nothing is rebuilt: our hooks would keep from theirs what is saved within.
    """
    return _top_hooks is not None and _top_hooks(True) is not None


_top_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)


class _Saved:
    """What stands in the graph for a saved tensor: itself, or how to make it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.shape, self.stride = tensor.shape, tensor.stride()

    def rebuild(self, recipe: Recipe, index: int, like: Tensor) -> None:
        """Let go of the tensor; ``like`` has its memory, with the shape that the recipe makes."""
        self.tensor = None
        self.recipe, self.index = recipe, index
        self.made_shape, self.made_stride = like.shape, like.stride()

    def load(self) -> Tensor:
        if self.tensor is not None:
            if self.tensor._version != self.version:
                raise RuntimeError(CHANGED)
            return self.tensor
        made = self.recipe.take(self.index)
        if made.stride() != self.made_stride:
            laid_out = torch.empty_strided(
                self.made_shape, self.made_stride, dtype=made.dtype, device=made.device
            )
            made = laid_out.copy_(made)
        # What was saved may be a view of the tensor, of all its memory.
        return made.as_strided(self.shape, self.stride, made.storage_offset())


class Rebuilding:
    """Context in which saved tensors that a recipe can make are let go of.

    Tensors are recognised by their memory, so keep them alive within the context; anything else
    is saved as usual.

    Args:
        recipe: how to compute tensors again.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._saved: list[tuple[tuple, _Saved]] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._save, _Saved.load)

    def __enter__(self) -> Rebuilding:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._saved.clear()
        # The hooks hold this object: break the circle, so that memory is freed at once.
        del self._hooks, self.recipe

    def _save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())
        self._saved.append((_address(tensor), saved))
        return saved

    def let_go(self, *tensors: Tensor | None) -> None:
        """Name the tensors that the recipe makes, in its order, once they have been saved."""
        known = {_address(t): (i, t) for i, t in enumerate(tensors) if t is not None}
        for address, saved in self._saved:
            if address in known:
                saved.rebuild(self.recipe, *known[address])


def _address(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


REBUILDABLE = (nn.Identity, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.GroupNorm, nn.LayerNorm)
"""Layers that keep their input anyway and whose output follows from it alone.

ReLU keeps its output, which the next convolution keeps too, and batch norm has statistics.
"""


def apply_rebuildable(
    layer: nn.Module, x: Tensor, recipe: Recipe | None
) -> tuple[Tensor, Recipe | None]:
    """Apply a layer whose input is rebuilt, and say how to rebuild its output.

    Args:
        layer: a normalization or activation.
        x: its input.
        recipe: how to rebuild ``x``; None: it is kept.

    Returns:
        tuple: the output, and its recipe, or None where it has to be kept.
    """
    if type(layer) is nn.Identity:
        return x, recipe
    if type(layer) not in REBUILDABLE or getattr(layer, 'inplace', False):
        return layer(x), None
    base = Kept(x) if recipe is None else None
    kind, enabled = x.device.type, torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(kind)

    def make() -> list[Tensor]:
        source = base.get() if recipe is None else recipe.take(0)
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            return [layer(source)]

    if recipe is None:
        return layer(x), Recipe(make, 0, 0)
    with Rebuilding(recipe) as saved:
        out = layer(x)
        saved.let_go(x)
    return out, Recipe(make, 0, 0)
