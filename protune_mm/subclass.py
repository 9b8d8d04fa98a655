"""Give one module object an extra behaviour while it stays what it was.

The object's class becomes a small subclass of its own class, with a mixin leftmost and the same
name, as PyTorch's ``fully_shard`` does. Every parameter keeps its name, ``isinstance`` and stock
checkpoints go on working, and deepcopy and pickle rebuild the subclass.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_subclasses: dict[tuple[type, type], type] = {}


def add_mixin(module: nn.Module, mixin: type) -> None:
    """Change the class of ``module`` in place to ``mixin`` over its own class.

    There is no ``__new__`` in the subclass: deepcopy and pickle go through ``__reduce__``.
    """
    module.__class__ = _subclass(mixin, type(module))


def remove_mixin(module: nn.Module, mixin: type) -> None:
    """Change the class of ``module`` in place to what it was without one mixin."""
    cls, kept = type(module), []
    while hasattr(cls, '_protune_stock'):
        if cls._protune_mixin is not mixin:
            kept.append(cls._protune_mixin)
        cls = cls._protune_stock
    for other in reversed(kept):
        cls = _subclass(other, cls)
    module.__class__ = cls


def stock_type(module: nn.Module) -> type:
    """Class of ``module`` without our mixins: what an exact type test must look at."""
    cls = type(module)
    while hasattr(cls, '_protune_stock'):
        cls = cls._protune_stock
    return cls


def _subclass(mixin: type, stock: type) -> type:
    key = (mixin, stock)
    if key not in _subclasses:
        members = {
            '__module__': stock.__module__,
            '__qualname__': stock.__qualname__,
            '__doc__': stock.__doc__,
            '__reduce__': _reduce,
            '_protune_mixin': mixin,
            '_protune_stock': stock,
        }
        _subclasses[key] = type(stock.__name__, (mixin, stock), members)
    return _subclasses[key]


DERIVED = (
    '_protune_cache',
    '_protune_norm',
    '_protune_conv',
    '_protune_pending',
    '_protune_linked',
)
"""Attributes of lean layers that a copy makes anew."""


def _reduce(self: nn.Module) -> tuple:
    cls = type(self)
    mixins = []
    while hasattr(cls, '_protune_stock'):
        mixins.append(cls._protune_mixin)
        cls = cls._protune_stock
    # object.__getstate__ exists from Python 3.11 on.
    state = self.__getstate__() if hasattr(self, '__getstate__') else self.__dict__
    state = {key: value for key, value in state.items() if key not in DERIVED}
    return _rebuild, (cls, tuple(reversed(mixins))), state


def _rebuild(stock: type, mixins: tuple[type, ...]) -> Any:
    cls = stock
    for mixin in mixins:
        cls = _subclass(mixin, cls)
    return cls.__new__(cls)
