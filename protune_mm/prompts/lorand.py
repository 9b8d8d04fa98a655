"""LoRand, the low-rank adapter for dense predictions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import PROMPTS
from .base import Prompt, check_count


@PROMPTS.register_module()
class LoRand(Prompt):
    """A bottleneck after every block whose matrices are sums of low-rank products.

    Source: *1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions*, CVPR 2023,
    Section 3.2: each projection is ``sum_i P_i K_i Q_i`` over some branches, and the two
    projections of one adapter share their kernels ``K_i``. The paper has another one after the
    attention of every block; here there is the one after the block, so that it serves backbones
    without attention too.

    Args:
        channels: channels C of the block's output.
        branches: products that are summed. Default 2, the paper's alpha.
        rank: side of the kernels. Default 8, the paper's beta.
        zero_init: start the last factors at zero. Default True.

    Raises:
        ValueError: ``branches`` or ``rank`` is no whole number from 1 on.

    Shape: ``(B, C, H, W) -> (B, C, H, W)``.
    """

    where = 'blocks'

    def __init__(
        self, channels: int, branches: int = 2, rank: int = 8, zero_init: bool = True
    ) -> None:
        super().__init__()
        check_count('rank', rank)
        check_count('branches', branches, 'products')
        hidden = max(1, channels // 2)
        self.zero_init = zero_init
        self.kernel = nn.Parameter(torch.empty(branches, rank, rank))
        self.down_in = nn.Parameter(torch.empty(branches, channels, rank))
        self.down_out = nn.Parameter(torch.empty(branches, rank, hidden))
        self.up_in = nn.Parameter(torch.empty(branches, hidden, rank))
        self.up_out = nn.Parameter(torch.empty(branches, rank, channels))
        self.down_bias = nn.Parameter(torch.empty(hidden))
        self.up_bias = nn.Parameter(torch.empty(channels))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: products of normal numbers that keep variance; zero last factors."""
        for factor in (self.kernel, self.down_in, self.down_out, self.up_in, self.up_out):
            branches, rows, _ = factor.shape
            nn.init.normal_(factor, std=(rows * branches ** (1 / 3)) ** -0.5)
        if self.zero_init:
            nn.init.zeros_(self.up_out)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompt for ``x``, without adding it to ``x``."""
        x = F.gelu(F.conv2d(x, self._weight(self.down_in, self.down_out), self.down_bias))
        return F.conv2d(x, self._weight(self.up_in, self.up_out), self.up_bias)

    def _weight(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.einsum('bir,brs,bso->oi', left, self.kernel, right)[:, :, None, None]
