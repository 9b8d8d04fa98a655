"""Convolutions of prompts: one that stays as it starts, one with a factor, the depth-wise one."""

from __future__ import annotations

from torch import Tensor, nn

from ..lean.derived import tracing
from ..lean.functions import FrozenConv2d
from ..lean.layers import compute_dtype, keeps, without_casts
from ..lean.rebuild import hooked
from ..ops.depthwise import depthwise


class FixedConv2d(nn.Conv2d):
    """Convolution that is set once and never trained: its weight and bias are buffers.

    Shape: as of :class:`torch.nn.Conv2d`.
    """

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)
        for name, value in list(self._parameters.items()):
            delattr(self, name)
            self.register_buffer(name, None if value is None else value.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Apply it in the dtype of ``x``: FSDP's mixed precision casts parameters only."""
        return self._conv_forward(x, *as_computed(x, self.weight, self.bias))

    def without_input(self, x: Tensor) -> Tensor:
        """Apply it, and keep its weight alone for backward."""
        if not keeps(x) or tracing() or hooked():
            return self(x)
        x, weight, bias = as_computed(x, x, self.weight, self.bias)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        with without_casts(x):
            return FrozenConv2d.apply(x, weight, bias, geometry)


def as_computed(x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Tensors, or none, in the dtype in which a convolution of ``x`` computes."""
    dtype = compute_dtype(x)
    return [None if t is None else t.to(dtype) for t in tensors]


def fixed_layers(prompt: nn.Module) -> dict[str, FixedConv2d]:
    """Dotted name to convolution of those in a prompt that are set once and never trained."""
    return {name: layer for name, layer in prompt.named_modules() if isinstance(layer, FixedConv2d)}


class ScaledConv2d(nn.Conv2d):
    """Convolution times a factor.

    Shape: as of :class:`torch.nn.Conv2d`.
    """

    def forward(self, x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Multiply the input, which has few channels, in place of the output."""
        if not isinstance(scale, Tensor) and scale == 1.0:
            return super().forward(x)
        return self._conv_forward(x * scale, self.weight, self.bias * scale)


class DepthwiseConv2d(nn.Conv2d):
    """Depth-wise convolution that runs :func:`protune_mm.ops.depthwise.depthwise`.

    Shape: ``(B, C, H, W) -> (B, C, H, W)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if not x.is_cuda:
            return super().forward(x)
        cast = as_computed(x, x, self.weight, self.bias)
        with without_casts(cast[0]):
            return depthwise(*cast)
