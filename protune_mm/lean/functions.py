"""Frozen layers as autograd functions that keep for backward only what the input gradient needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .masks import MaskGradient, Tests, apply_mask, is_channels_last, mask_of, pack
from .products import pointwise

Geometry = tuple[tuple, tuple, tuple, int]
"""Stride, padding, dilation and groups of a convolution."""


def is_pointwise(weight: Tensor, geometry: Geometry) -> bool:
    """Whether a convolution mixes the channels of each pixel and nothing else."""
    stride, padding, _, groups = geometry
    return weight.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and groups == 1


def frozen_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """See :func:`torch.nn.functional.conv2d`; outside of any graph."""
    if is_pointwise(weight, geometry):
        out = pointwise(x, weight, bias)
        if out is not None:
            return out
    return F.conv2d(x, weight, bias, *geometry)


_convolution_backward = torch.ops.aten.convolution_backward.default


class FrozenConv2d(torch.autograd.Function):
    """Convolution with a constant weight: keeps the weight, not the input.

    PyTorch's own keeps its input although only the gradient of the weight, which nobody asks
    for, would need it (pytorch#133566).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
    ) -> Tensor:
        """See :func:`torch.nn.functional.conv2d`; all tensors are of one dtype."""
        ctx.save_for_backward(weight)
        ctx.shape = x.shape
        ctx.geometry = geometry
        ctx.layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        return frozen_conv2d(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The gradient of the input alone."""
        (weight,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=ctx.layout)
        # oneDNN's kernels have no gradient: a gradient of this gradient goes PyTorch's way.
        if is_pointwise(weight, ctx.geometry) and not torch.is_grad_enabled():
            grad_x = pointwise(grad, weight.transpose(0, 1), None)
            if grad_x is not None:
                return grad_x, None, None, None
        stride, padding, dilation, groups = ctx.geometry
        # Only the shape of the input is read. Memory that is never written costs nothing on the
        # CPU, where an expanded number would be copied; a GPU takes the expanded number.
        if grad.device.type == 'cpu':
            shape_of_input = torch.empty(
                ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout
            )
        else:
            shape_of_input = grad.new_empty(1).expand(ctx.shape)
        grad_x = _convolution_backward(
            grad, shape_of_input, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (True, False, False),
        )[0]  # fmt: skip
        return grad_x, None, None, None


class Gate(torch.autograd.Function):
    """An activation with one constant slope inside an interval and another outside: keeps a mask.

    ReLU, ReLU6, leaky ReLU, hard sigmoid and the like.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        activation: Callable[[Tensor], Tensor],
        tests: Tests,
        of_output: bool,
        slopes: tuple[float, float],
        inplace: bool,
        bits: bool,
    ) -> Tensor:
        """Return ``activation(x)``.

        Args:
            x: any shape.
            activation: the function; changes ``x`` itself where ``inplace``.
            tests: see :func:`protune_mm.lean.masks.mask_of`; they hold inside the interval.
            of_output: the tests are of the output, not of ``x``.
            slopes: inside and outside the interval.
            inplace: see ``activation``.
            bits: keep a bit an element instead of a byte.
        """
        if of_output:
            out = activation(x)
            mask = mask_of(out, tests)
        else:
            mask = mask_of(x, tests)
            out = activation(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.how = (slopes, is_channels_last(mask))
        ctx.save_for_backward(pack(mask) if bits else mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The gradient through the mask."""
        (mask,) = ctx.saved_tensors
        through = MaskGradient.apply if torch.is_grad_enabled() else apply_mask
        return through(grad, mask, *ctx.how), None, None, None, None, None, None


class FrozenNorm(torch.autograd.Function):
    """Layer or group norm with constant weights, in float32, of an input in a smaller dtype.

    Under autocast PyTorch's own keeps a float32 copy of the input; this keeps the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        groups: int,
        axes: tuple,
        eps: float,
    ) -> Tensor:
        """See :func:`torch.nn.functional.layer_norm`, or ``group_norm`` where ``groups``."""
        wide = x.float()
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        if groups:
            n, c = x.shape[:2]
            rest = x.numel() // (n * c)
            out, mean, rstd = torch.ops.aten.native_group_norm(
                wide.contiguous(), weight, bias, n, c, rest, groups, eps
            )
        else:
            out, mean, rstd = torch.ops.aten.native_layer_norm(wide, axes, weight, bias, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.axes = groups, axes
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The gradient of the input alone."""
        x, mean, rstd, weight, bias = ctx.saved_tensors
        wanted = (True, False, False)
        if ctx.groups:
            n, c = x.shape[:2]
            rest = x.numel() // (n * c)
            wide = x.float().contiguous()
            grads = torch.ops.aten.native_group_norm_backward(
                grad.contiguous(), wide, mean, rstd, weight, n, c, rest, ctx.groups, wanted
            )
        else:
            grads = torch.ops.aten.native_layer_norm_backward(
                grad, x.float(), ctx.axes, mean, rstd, weight, bias, wanted
            )
        return grads[0].to(x.dtype), None, None, None, None, None
