"""Tensors that are computed again in backward instead of being kept.

A recipe says how a tensor follows from one that is kept anyway. The layer that would save the
tensor for backward saves the recipe, through PyTorch's own hooks for saved tensors, so the
backward formulas stay PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


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
            with torch.no_grad():
                self._made = dict(enumerate(self.make()))
        return self._made.pop(index)


def attach(tensor: Tensor, recipe: Recipe) -> Tensor:
    """Note on a tensor how to compute it again; lost by every operation on it."""
    tensor._protune_recipe = (recipe, tensor._version)
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor; None if it has none or was changed in place since."""
    recipe, version = getattr(tensor, '_protune_recipe', (None, None))
    return recipe if recipe is not None and version == tensor._version else None


class _Saved:
    """What stands in the graph for a saved tensor: itself, or how to make it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.shape, self.stride = tensor.shape, tensor.stride()

    def rebuild(self, recipe: Recipe, index: int, like: Tensor) -> None:
        """Let go of the tensor; ``like`` has its memory, with the shape that the recipe makes."""
        self.tensor = None
        self.recipe, self.index = recipe, index
        self.made_shape, self.made_stride = like.shape, like.stride()

    def load(self) -> Tensor:
        if self.tensor is not None:
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
