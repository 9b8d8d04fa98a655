"""Scale and shift of channels after every norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..norms import NORMS
from ..registry import PROMPTS
from .base import Prompt, outermost


@PROMPTS.register_module()
class ScaleShift(Prompt):
    """A change of scale and shift of each channel: ``scale * x + shift`` is added to ``x``.

    Source: *Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning* (SSF),
    arXiv 2210.08823, Section 3.2, ``gamma * x + beta``, here with ``scale = gamma - 1`` and after
    every norm inside the blocks. :func:`protune_mm.merge` puts it into the norm. It is what
    ``affine=True`` adds to another prompt type.

    Args:
        channels: channels of the norm's output.
        zero_init: start at zero. Default True.

    Shape: ``(B, channels, H, W) -> (B, channels, H, W)``.
    """

    where = 'layers'
    reads = 'output'
    mergeable = True

    def __init__(self, channels: int, zero_init: bool = True) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: zero (or, as the paper's, normal of 0.02)."""
        for parameter in (self.scale, self.shift):
            nn.init.normal_(parameter, std=0.0 if self.zero_init else 0.02)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the norm's output."""
        return x * self.scale + self.shift

    @classmethod
    def layers(cls, block: nn.Module, **options: object) -> list[str]:
        """See :class:`Prompt`."""

        def wanted(_: str, layer: nn.Module) -> bool:
            # A norm without a weight of its own has nothing to merge into.
            known = isinstance(layer, NORMS) or type(layer).__name__ == 'LayerNorm'
            # Of timm's norms with an activation inside nothing comes between the two.
            if not isinstance(getattr(layer, 'act', None), nn.Identity | None):
                return False
            return known and getattr(layer, 'bias', None) is not None

        return list(outermost(block, wanted))

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """See :class:`Prompt`."""
        gamma = 1 + self.scale.flatten()
        layer.weight.mul_(gamma.to(layer.weight.dtype))
        layer.bias.mul_(gamma.to(layer.bias.dtype)).add_(self.shift.flatten().to(layer.bias.dtype))
