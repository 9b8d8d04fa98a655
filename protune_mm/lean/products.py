"""Matrix products of frozen layers: which of PyTorch's kernels multiplies.

On the CPU PyTorch gives matrix products in float32 to MKL, which uses half the width of the
vector unit of processors that are not Intel's. oneDNN, which PyTorch also has, uses all of it:
``tools/benchmark/products.py`` measures both. PyTorch's own choice for trainable layers
stays as it is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

_LINEAR = getattr(torch.ops.mkldnn, '_linear_pointwise', None)
_CONVOLUTION = torch.ops.aten.mkldnn_convolution

LARGE = 1_000_000
"""Multiplications from which oneDNN's product is faster than MKL's, its start included."""
LARGE_CONVOLUTION = 4_000_000
"""The same for a 1x1 convolution."""


def by_onednn(x: Tensor, multiplications: int, least: int) -> bool:
    """Whether oneDNN is there for a product with ``x``, and worth it."""
    return (
        multiplications >= least
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and _LINEAR is not None
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.t() + bias``, outside of any graph.

    Args:
        x: (..., C_in), two dimensions or more.
        weight: (C_out, C_in).
        bias: (C_out), or None.
    """
    if by_onednn(x, x.numel() * weight.shape[0], LARGE):
        return _LINEAR(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.t() + bias`` with constant weights; keeps the weight only."""
    if x.requires_grad and torch.is_grad_enabled():
        if by_onednn(x, x.numel() * weight.shape[0], LARGE):
            return _FrozenLinear.apply(x, weight, bias)
        return F.linear(x, weight, bias)
    return linear(x, weight, bias)


class _FrozenLinear(torch.autograd.Function):
    """Constant matrix times input, for kernels that PyTorch has no gradient of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See :func:`linear`."""
        ctx.save_for_backward(weight)
        # ``data``, because autograd forbids in-place changes of a function's output that is a view.
        return linear(x, weight, bias).data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """The gradient of the input alone; it can be differentiated again."""
        (weight,) = ctx.saved_tensors
        return frozen_linear(grad, weight.t(), None), None, None


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """Compute a 1x1 convolution, outside of any graph, where oneDNN is worth it.

    PyTorch would take MKL's product for one thread and small batches.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in, 1, 1).
        bias: (C_out), or None.

    Returns:
        Tensor: (B, C_out, H, W) in the memory format of ``x``. None: let PyTorch choose.
    """
    if not by_onednn(x, x.numel() * weight.shape[0], LARGE_CONVOLUTION):
        return None
    if x.is_contiguous(memory_format=torch.channels_last):
        # Pixels are rows of a matrix.
        rows = _LINEAR(x.permute(0, 2, 3, 1), weight.flatten(1), bias, 'none', [], '')
        # ``data``, because autograd forbids in-place changes of a function's output that is a view.
        return rows.permute(0, 3, 1, 2).data
    return _CONVOLUTION(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def _register_operations() -> None:
    """Teach PyTorch's FlopCounterMode the two kernels, so that nobody counts too few."""
    if _LINEAR is not None and _LINEAR not in flop_registry:

        @register_flop_formula(_LINEAR)
        def linear_flop(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
            return 2 * math.prod(x) * weight[0]

    if _CONVOLUTION not in flop_registry:

        @register_flop_formula(_CONVOLUTION)
        def convolution_flop(
            x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any
        ) -> int:
            return 2 * math.prod(out_shape) * math.prod(weight[1:])


_register_operations()
