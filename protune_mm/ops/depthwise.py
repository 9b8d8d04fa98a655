"""Depth-wise 5x5 convolution for the prompt block: a Triton kernel beside PyTorch's own.

The convolution is bound by memory: each number is read and written once, 25 multiplications
between. cuDNN's backward pass for it is slow in some layouts and dtypes and differs between
versions (pytorch#58749, #91735, #125362, #129609), so which of the two runs is chosen by a
measurement, :func:`choose`.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # The CPU wheels of PyTorch come without it.
    triton = None

SIDE = 5
TAPS = SIDE * SIDE
TABLE = Path(__file__).with_name('depthwise.json')
"""Which implementation was faster, by GPU, dtype and layout; tools/benchmark/ops.py writes it."""


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the convolution with PyTorch's own kernels.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, k, k), k odd.
        bias: (C), or None.

    Returns:
        Tensor: (B, C, H, W).
    """
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the convolution, with whichever implementation is faster for this input.

    Args:
        x: (B, C, H, W); float32, float16 or bfloat16; contiguous or channels-last.
        weight: (C, 1, k, k), k odd, of the dtype of ``x``.
        bias: (C), or None.

    Returns:
        Tensor: (B, C, H, W), in the memory format of ``x``.
    """
    fits = (
        triton is not None
        and x.is_cuda
        and x.numel() > 0
        and weight.shape[1:] == (1, SIDE, SIDE)
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    )
    if fits and not torch.jit.is_tracing() and not torch.compiler.is_compiling():
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if choose(torch.cuda.get_device_name(x.device), x.dtype, last) == 'triton':
            return Depthwise.apply(x, weight, bias)
    return reference(x, weight, bias)


def choose(device: str, dtype: torch.dtype, channels_last: bool) -> str:
    """Which implementation was measured to be faster forward and backward.

    Args:
        device: name of the GPU.
        dtype: of the input.
        channels_last: memory format of the input.

    Returns:
        str: ``'triton'`` or ``'torch'``; ``'torch'`` for a GPU that was not measured.
    """
    layout = 'channels_last' if channels_last else 'contiguous'
    return _table().get(device, {}).get(f'{str(dtype).removeprefix("torch.")} {layout}', 'torch')


@cache
def _table() -> dict:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


class Depthwise(torch.autograd.Function):
    """The Triton form: forward, gradient of the input and gradient of the weight.

    Sums run in float32 in a fixed order, so results do not change from run to run.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :func:`depthwise`."""
        x = _dense(x)
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _correlate(x, weight, bias, flip=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Gradients of the input, the weight and the bias, where they are needed."""
        x, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=_layout(x))
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _correlate(grad, weight, None, flip=True)
        if any(ctx.needs_input_grad[1:]):
            sums = _weight_sums(x, grad)
            grad_weight = sums[:, :TAPS].reshape(weight.shape).to(weight.dtype)
            grad_bias = sums[:, TAPS].to(weight.dtype) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_layout(x))


def _blocks(x: Tensor) -> tuple[int, int]:
    """Pixels and channels of a tile: what lies side by side in memory is read together."""
    if _layout(x) == torch.channels_last:
        return 16, min(64, triton.next_power_of_2(x.shape[1]))
    return min(512, max(16, triton.next_power_of_2(x.shape[2] * x.shape[3]))), 1


def _correlate(x: Tensor, weight: Tensor, bias: Tensor | None, flip: bool) -> Tensor:
    out = torch.empty_like(x)
    batch, channels, height, width = x.shape
    pixels, block = _blocks(x)
    grid = (triton.cdiv(height * width, pixels), triton.cdiv(channels, block), batch)
    with torch.cuda.device_of(x):  # Triton launches on the current device.
        _correlate_kernel[grid](
            x, weight.contiguous(), bias if bias is not None else weight, out,
            channels, height, width, *x.stride(),
            FLIP=flip, BIAS=bias is not None, PIXELS=pixels, CHANNELS=block,
        )  # fmt: skip
    return out


def _weight_sums(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the taps, and in column 25 of the bias: (C, 32), float32."""
    batch, channels, height, width = x.shape
    pixels, block = _blocks(x)
    tiles = triton.cdiv(height * width, pixels)
    # Enough programs to fill a GPU; each sums some tiles of an image in a fixed order.
    splits = max(1, min(tiles, 512 // (batch * triton.cdiv(channels, block))))
    partial = x.new_empty((batch, splits, channels, 32), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_kernel[(splits, triton.cdiv(channels, block), batch)](
            x, grad, partial, channels, height, width, *x.stride(), tiles,
            SPLITS=splits, PIXELS=pixels, CHANNELS=block,
        )  # fmt: skip
    return partial.sum((0, 1))


if triton is not None:

    @triton.jit
    def _correlate_kernel(
        x, weight, bias, out, channels, height, width, sn, sc, sh, sw,
        FLIP: tl.constexpr, BIAS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        row, column = pixel // width, pixel % width
        in_channels = channel < channels
        base = tl.program_id(2).to(tl.int64) * sn + channel[None, :] * sc
        total = tl.zeros((PIXELS, CHANNELS), dtype=tl.float32)
        for tap in tl.static_range(25):
            y, z = row + tap // 5 - 2, column + tap % 5 - 2
            inside = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (row < height)
            mask = inside[:, None] & in_channels[None, :]
            value = tl.load(x + base + (y * sh + z * sw)[:, None], mask=mask, other=0.0)
            index = 24 - tap if FLIP else tap
            factor = tl.load(weight + channel * 25 + index, mask=in_channels, other=0.0)
            total += value.to(tl.float32) * factor.to(tl.float32)[None, :]
        if BIAS:
            shift = tl.load(bias + channel, mask=in_channels, other=0.0)
            total += shift.to(tl.float32)[None, :]
        mask = (row < height)[:, None] & in_channels[None, :]
        where = out + base + (row * sh + column * sw)[:, None]
        tl.store(where, total.to(out.dtype.element_ty), mask=mask)

    @triton.jit
    def _weight_kernel(
        x, grad, partial, channels, height, width, sn, sc, sh, sw, tiles,
        SPLITS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        split, image = tl.program_id(0), tl.program_id(2)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        in_channels = channel < channels
        column_of = tl.arange(0, 32)
        base = image.to(tl.int64) * sn + channel[None, :] * sc
        total = tl.zeros((CHANNELS, 32), dtype=tl.float32)
        for tile in range(split, tiles, SPLITS):
            pixel = tile * PIXELS + tl.arange(0, PIXELS)
            row, column = pixel // width, pixel % width
            mask = (row < height)[:, None] & in_channels[None, :]
            place = base + (row * sh + column * sw)[:, None]
            slope = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
            for tap in tl.static_range(25):
                y, z = row + tap // 5 - 2, column + tap % 5 - 2
                inside = (y >= 0) & (y < height) & (z >= 0) & (z < width) & (row < height)
                mask = inside[:, None] & in_channels[None, :]
                value = tl.load(x + base + (y * sh + z * sw)[:, None], mask=mask, other=0.0)
                here = tl.sum(value.to(tl.float32) * slope, axis=0)
                total += tl.where(column_of[None, :] == tap, here[:, None], 0.0)
            here = tl.sum(slope, axis=0)
            total += tl.where(column_of[None, :] == 25, here[:, None], 0.0)
        programs = tl.num_programs(0)
        first = ((image * programs + split) * channels + channel)[:, None] * 32
        tl.store(partial + first + column_of[None, :], total, mask=in_channels[:, None])
