"""Channels-last maps inside a frozen backbone; what it takes and returns is laid out as stock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..subclass import add_mixin
from .derived import tracing
from .masks import is_channels_last, to_channels_last

_FAST_ON_CPU = (torch.float32, torch.bfloat16)


def wants_channels_last(channels_last: bool | None, x: object) -> bool:
    """Whether a backbone runs on channels-last maps.

    Args:
        channels_last: the option. None: on the CPU, where oneDNN is faster on them
            (docs/benchmark/speed.md).
        x: an argument of the backbone.
    """
    if not channels_last and channels_last is not None:
        return False
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or tracing():
        return False
    return bool(channels_last) or (x.device.type == 'cpu' and x.dtype in _FAST_ON_CPU)


def inputs_channels_last(channels_last: bool | None, args: tuple, kwargs: dict) -> tuple | None:
    """The arguments of a backbone, images in channels-last memory.

    Returns:
        tuple: ``args`` and ``kwargs``. None: the backbone does not run on channels-last maps.
    """
    if not any(wants_channels_last(channels_last, x) for x in (*args, *kwargs.values())):
        return None

    def change(x: Any) -> Any:
        return to_channels_last(x) if wants_channels_last(channels_last, x) else x

    return tuple(map(change, args)), {name: change(x) for name, x in kwargs.items()}


def to_stock(out: Any) -> Any:
    """Give every map of a backbone's output the memory layout that stock necks and heads get.

    Operations of mmcv, RoIAlign for one, read memory as if it were contiguous.
    """
    return tree_map(
        lambda x: x.contiguous() if isinstance(x, Tensor) and is_channels_last(x) else x, out
    )


class NeedsContiguous:
    """Mixin for layers with operations of mmcv, which read memory as if it were contiguous."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """See the stock layer."""
        args, kwargs = to_stock((args, kwargs))
        return super().forward(*args, **kwargs)


def give_contiguous(module: nn.Module) -> None:
    """Let a layer that is one of mmcv's operations, or derives from one, get contiguous maps."""
    of_mmcv = any(cls.__module__.startswith('mmcv.ops.') for cls in type(module).__mro__)
    if of_mmcv and not isinstance(module, NeedsContiguous):
        add_mixin(module, NeedsContiguous)
