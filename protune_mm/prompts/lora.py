"""LoRA for linear layers and convolutions."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..registry import PROMPTS
from .base import Prompt, check_count, outermost

STANDARDIZED = {
    'ConvWS2d', 'ConvAWS2d', 'StdConv2d', 'StdConv2dSame', 'ScaledStdConv2d', 'ScaledStdConv2dSame',
}  # fmt: skip
"""Convolutions of mmcv and timm that standardize their weight in each forward pass."""


def computes_its_weight(layer: nn.Module) -> bool:
    """Whether what a layer applies is not its parameter, so that nothing can be merged into it."""
    return (
        any(kind.__name__ in STANDARDIZED for kind in type(layer).__mro__)
        or is_parametrized(layer, 'weight')
        or not isinstance(layer._parameters.get('weight'), nn.Parameter)  # Older weight norm.
    )


@PROMPTS.register_module()
class LoRA(Prompt):
    """A change of low rank of a layer's weight: ``(alpha / rank) * up(down(x))``.

    Source: *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685, Section 4.1. For
    a convolution ``down`` has its kernel and ``up`` is 1x1. :func:`protune_mm.merge` adds it to the
    weight, after which the network is a stock one.

    Args:
        channels: channels of the input.
        out_channels: channels of the output. Default ``channels``.
        stride: of the layer, in pixels. Default 1.
        kernel_size: of the layer. Default 1, a linear layer.
        padding: of the layer. Default 0.
        dilation: of the layer. Default 1.
        conv_type: of the layer, which may pad in a way of its own. Default ``nn.Conv2d``.
        padding_mode: of the layer. Default ``'zeros'``.
        rank: channels between the two. Default 8.
        alpha: numerator of the factor. Default ``rank``, a factor of 1.
        layers: names of the layers that have one, such as ``('qkv', 'fc1')`` or ``'qkv'``. Default:
            every linear layer and every convolution without groups that applies its weight as it
            is.
        zero_init: start ``up`` at zero. Default True, the paper's.

    Raises:
        ValueError: ``rank`` is no whole number from 1 on.

    Shape: ``(B, channels, H, W) -> (B, out_channels, H / stride, W / stride)``.
    """

    where = 'layers'
    mergeable = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        stride: int | tuple = 1,
        kernel_size: int | tuple = 1,
        padding: int | tuple = 0,
        dilation: int | tuple = 1,
        conv_type: type[nn.Conv2d] = nn.Conv2d,
        padding_mode: str = 'zeros',
        rank: int = 8,
        alpha: float | None = None,
        layers: tuple[str, ...] | str = (),
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        check_count('rank', rank)
        self.zero_init = zero_init
        self.scale = (rank if alpha is None else alpha) / rank
        geometry = dict(stride=stride, padding=padding, dilation=dilation, bias=False)
        if padding_mode != 'zeros':  # A type of its own has none.
            geometry['padding_mode'] = padding_mode
        self.down = conv_type(channels, rank, kernel_size, **geometry)
        self.up = nn.Conv2d(rank, out_channels or channels, 1, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: uniform for ``down``, zero (or uniform) for ``up``."""
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
        if self.zero_init:
            nn.init.zeros_(self.up.weight)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output."""
        hidden = self.down(x)
        return self.up(hidden if self.scale == 1 else hidden * self.scale)

    @classmethod
    def layers(cls, block: nn.Module, layers: tuple | str = (), **options: object) -> list[str]:
        """See :class:`Prompt`."""
        if isinstance(layers, str):
            layers = (layers,)

        def wanted(name: str, layer: nn.Module) -> bool:
            plain = isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d) and layer.groups == 1
            )
            return plain and not computes_its_weight(layer) and (not layers or name in layers)

        found = list(outermost(block, wanted))
        # It reads its weights past its layers, so that nothing beside them would run.
        whole = tuple(
            f'{name}.'
            for name, module in block.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        )
        if whole:
            print_log(
                f'LoRA: {type(block).__name__} has nn.MultiheadAttention, whose projections cannot '
                'have one; only other layers do',
                logger='current',
                level=logging.WARNING,
            )
        return [name for name in found if not name.startswith(whole)] if whole else found

    @classmethod
    def unmatched(
        cls, found: Iterable[str], layers: tuple | str = (), **options: object
    ) -> dict[str, str]:
        """See :class:`Prompt`."""
        names = {path.rpartition('.')[2] for path in found}
        asked = (layers,) if isinstance(layers, str) else layers
        missing = [name for name in asked if name not in names]
        return {'layers': missing[0]} if missing else {}

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """See :class:`Prompt`."""
        change = torch.einsum('or,rihw->oihw', self.up.weight[:, :, 0, 0], self.down.weight)
        layer.weight += (self.scale * change).reshape(layer.weight.shape).to(layer.weight.dtype)
