"""Boolean masks at one bit an element.

PyTorch keeps a boolean in a byte. On the CPU NumPy packs eight of them into one. Elsewhere eight,
read as one 64-bit integer, become one byte by a multiplication, and come back from a table: two
kernels of plain PyTorch each, because for maps of usual size a GPU waits for the start of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes 0/1 of a word times GATHER has, in its top byte, one bit from each of them.
_GATHER = 0x0102040810204080


Tests = Sequence[tuple[str, float]]


def mask_of(x: Tensor, tests: Tests) -> Tensor:
    """Where every one of some comparisons holds.

    Args:
        x: any shape, dense in memory.
        tests: name of a comparison that PyTorch and NumPy have in common, and the number that
            every element is compared with.

    Returns:
        Tensor: bool, of the shape and memory format of ``x``.
    """
    if type(x) is Tensor and x.device.type == 'cpu' and x.dtype in _COMPARED_BY_NUMPY:
        # PyTorch's comparisons are not vectorized on the CPU: NumPy takes a fifth of the time.
        mask = torch.empty_like(x, dtype=torch.bool)
        numbers, out = x.detach().numpy(), mask.numpy()
        (name, bound), *more = tests
        getattr(np, name)(numbers, bound, out=out)
        for name, bound in more:
            out &= getattr(np, name)(numbers, bound)
        return mask
    (name, bound), *more = tests
    mask = getattr(torch, name)(x, bound)
    for name, bound in more:
        mask &= getattr(torch, name)(x, bound)
    return mask


_COMPARED_BY_NUMPY = (torch.float32, torch.float64)


def pack(mask: Tensor) -> Tensor:
    """Pack a boolean mask.

    Args:
        mask: bool, any shape, dense in memory.

    Returns:
        Tensor: uint8, one dimension, an eighth of the elements, rounded up. The order is that of
        the memory, so a channels-last mask is not copied.
    """
    flat = _in_memory_order(mask).reshape(-1).view(torch.uint8)
    if flat.device.type == 'cpu':
        # A copy, small, so that PyTorch owns the memory and its tools see it.
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder='little')).clone()
    return _pack_words(flat)


def _pack_words(flat: Tensor) -> Tensor:
    rest = -flat.numel() % 8
    if rest or flat.storage_offset() % 8:  # Words lie at multiples of their size.
        flat = torch.cat((flat, flat.new_zeros(rest)))
    words = flat.view(torch.int64) * _GATHER
    return words.view(torch.uint8)[7::8].contiguous()


def unpack(packed: Tensor, shape: torch.Size, channels_last: bool = False) -> Tensor:
    """Restore the mask of :func:`pack`.

    Args:
        packed: what :func:`pack` returned.
        shape: shape of the mask.
        channels_last: the mask was :func:`is_channels_last`.

    Returns:
        Tensor: bool, of the shape and memory format of the mask.
    """
    if packed.device.type == 'cpu':
        bits = np.unpackbits(packed.numpy(), count=shape.numel(), bitorder='little')
        flat = torch.from_numpy(bits).view(torch.bool)
    else:
        flat = _unpack_words(packed)[: shape.numel()]
    if channels_last:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


def _unpack_words(packed: Tensor) -> Tensor:
    return _words(packed).index_select(0, packed.int()).view(torch.bool)


_tables: dict[torch.device, Tensor] = {}


def _words(like: Tensor) -> Tensor:
    """The eight booleans of each byte, as one word: (256), int64, beside a tensor."""
    plain = type(like) is Tensor  # Not one that stands for a tensor, as in PyTorch's fake mode.
    if plain and like.device in _tables:
        return _tables[like.device]
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder='little')
    with torch.inference_mode(False):
        table = torch.from_numpy(bits.view(np.int64)[:, 0]).to(like.device)
    if plain:
        _tables[like.device] = table
    return table


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a (B, C, H, W) tensor lie next to each other in memory."""
    return (
        x.dim() == 4
        and not x.is_contiguous()
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def to_channels_last(x: Tensor) -> Tensor:
    """The same numbers, channels next to each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def _in_memory_order(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if is_channels_last(x) else x.contiguous()


class MaskGradient(torch.autograd.Function):
    """A gradient times one slope where a mask is set and another elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, mask: Tensor, slopes: tuple[float, float], channels_last: bool
    ) -> Tensor:
        """See :func:`apply_mask`."""
        ctx.save_for_backward(mask)
        ctx.how = (slopes, channels_last)
        return apply_mask(grad, mask, slopes, channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The function is linear in ``grad``, so its gradient is itself."""
        (mask,) = ctx.saved_tensors
        return MaskGradient.apply(grad, mask, *ctx.how), None, None, None


def apply_mask(
    grad: Tensor, mask: Tensor, slopes: tuple[float, float], channels_last: bool = False
) -> Tensor:
    """Multiply by one slope where a mask is set and by another elsewhere.

    Args:
        grad: floating point, of the mask's shape.
        mask: bool, or uint8 as :func:`pack` returns it.
        slopes: factors inside and outside the mask.
        channels_last: see :func:`unpack`.
    """
    if mask.dtype == torch.uint8:
        mask = unpack(mask, grad.shape, channels_last)
    inside, outside = slopes
    if outside:
        return torch.where(mask, grad * inside, grad * outside)
    if inside != 1:
        grad = grad * inside
    if grad.device.type != 'cpu':
        return torch.where(mask, grad, 0.0)
    # torch.where is not vectorized on the CPU. The bits of the number times 0 or 1 are exact for
    # infinities too, which the number times 0 is not.
    return (grad.view(_INTEGERS[grad.dtype]) * mask.view(torch.int8)).view(grad.dtype)


_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
