"""Mona, the multi-cognitive visual adapter."""

from __future__ import annotations

import torch
from mmengine.model import kaiming_init
from torch import Tensor, nn

from ..registry import PROMPTS
from .base import Prompt, check_count


@PROMPTS.register_module()
class Mona(Prompt):
    """A bottleneck of three depth-wise convolutions after every block.

    Source: *5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition
    Tasks*, arXiv 2408.08345, Section 3.2: the input, its layer norm added with a small weight, is
    reduced by a 1x1 convolution; the mean of a 3x3, a 5x5 and a 7x7 depth-wise convolution and then
    a 1x1 convolution are each added to what they read; GELU and a 1x1 convolution lead back.
    Copies of its authors' code have a dropout of 0.1 before the last convolution, this has not. The
    paper has another one after the attention of every block; here there is the one after the
    block, so that it serves backbones without attention too.

    Args:
        channels: channels C of the block's output.
        hidden: channels of the bottleneck. Default 64, the paper's; at most ``channels``.
        zero_init: start the last convolution at zero. Default True.
        authors_init: start all but the last convolution as copies of the authors' code do, uniform
            within one over the root of their inputs, biases too, instead of by Kaiming over their
            outputs without biases: depth-wise ones are larger so, others smaller. Default False.

    Raises:
        ValueError: ``hidden`` is no whole number from 1 on.

    Shape: ``(B, C, H, W) -> (B, C, H, W)``.
    """

    where = 'blocks'

    def __init__(
        self,
        channels: int,
        hidden: int = 64,
        zero_init: bool = True,
        authors_init: bool = False,
    ) -> None:
        super().__init__()
        check_count('hidden', hidden)
        hidden = min(hidden, channels)
        self.zero_init, self.authors_init = zero_init, authors_init
        # A group norm with one group would mix pixels: the layer norm is over channels alone.
        self.norm = nn.LayerNorm(channels)
        self.norm_scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.scale = nn.Parameter(torch.empty(channels, 1, 1))
        self.down = nn.Conv2d(channels, hidden, 1)
        self.filters = nn.ModuleList(
            nn.Conv2d(hidden, hidden, side, padding=side // 2, groups=hidden) for side in (3, 5, 7)
        )
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.act = nn.GELU()
        self.up = nn.Conv2d(hidden, channels, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: the norm counts for 1e-6, Kaiming, zero (or Kaiming) for ``up``."""
        self.norm.reset_parameters()
        nn.init.constant_(self.norm_scale, 1e-6)
        nn.init.ones_(self.scale)
        for layer in (self.down, *self.filters, self.mix, self.up):
            if self.authors_init:
                layer.reset_parameters()
            else:
                kaiming_init(layer)
        if self.zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompt for ``x``, without adding it to ``x``."""
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.down(normed * self.norm_scale + x * self.scale)
        x = x + sum(layer(x) for layer in self.filters) / len(self.filters)
        x = x + self.mix(x)
        return self.up(self.act(x))
