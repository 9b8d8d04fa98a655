"""Values that follow from parameters: folded and cast weights, made once and never saved."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def tracing() -> bool:
    """Whether PyTorch is compiling, exporting, tracing or transforming (``torch.func``).

    Then plain layers run: nothing is folded, cached or rebuilt.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


_PLAIN = (Tensor, nn.Parameter)


def derived(
    module: nn.Module,
    name: str,
    sources: tuple,
    make: Callable[[], Any],
    settings: tuple = (),
) -> Any:
    """A value that follows from parameters, made again whenever one of them has changed.

    Never saved: it is no buffer, and is dropped by deepcopy and pickle.

    Args:
        module: who keeps the value.
        name: which value; the latest of each name is kept.
        sources: the tensors it follows from; None is allowed.
        make: computes it.
        settings: what else it follows from.
    """
    if tracing():
        return make()
    stamp = [settings]
    for tensor in sources:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.is_inference():
            return make()
        stamp += (tensor.data_ptr(), tensor._version)
    cache = module.__dict__.setdefault('_protune_cache', {})
    if name in cache:
        known, same, value = cache[name]
        # The tensors are kept, so that no other one can have their addresses.
        if known == stamp and all(map(operator.is_, same, sources)):
            return value
    # A tensor made in inference mode could not be kept for backward later.
    with torch.inference_mode(False), torch.no_grad():
        value = make()
    cache[name] = (stamp, sources, value)
    return value


def forget(module: nn.Module) -> None:
    """Drop all derived values below a module: the next forward pass makes them anew."""
    for child in module.modules():
        child.__dict__.pop('_protune_cache', None)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple:
    """The tensors in another dtype, without a graph."""
    return tuple(None if t is None else t.detach().to(dtype) for t in tensors)
