"""Bottleneck adapter in AdaptFormer's parallel form."""

from __future__ import annotations

from mmengine.model import kaiming_init
from torch import Tensor, nn

from ..registry import PROMPTS
from .base import Prompt, check_count, feedforward


@PROMPTS.register_module()
class Adapter(Prompt):
    """Two 1x1 convolutions beside the feed-forward network of every block.

    Source: *AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition*, arXiv
    2205.13535, Section 3.2: ``MLP(LN(x)) + scale * up(ReLU(down(LN(x)))) + x``. A block without a
    feed-forward network, as in convolutional networks, has the adapter beside the whole block.

    Args:
        channels: channels of the input.
        out_channels: channels of the output. Default ``channels``.
        stride: of the layer beside which it runs, in pixels. Default 1.
        hidden: channels between the two. Default 64, the paper's.
        scale: factor on the output. Default 0.1, the paper's.
        zero_init: start ``up`` at zero. Default True, the paper's.
        authors_init: start ``down`` as code of the authors does, uniform within one over the root
            of its inputs, instead of by Kaiming over its outputs, which is larger. Default False.

    Raises:
        ValueError: ``hidden`` is no whole number from 1 on.

    Shape: ``(B, channels, H, W) -> (B, out_channels, H / stride, W / stride)``.
    """

    where = 'layers'
    pointwise = True

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        stride: int = 1,
        hidden: int = 64,
        scale: float = 0.1,
        zero_init: bool = True,
        authors_init: bool = False,
    ) -> None:
        super().__init__()
        check_count('hidden', hidden)
        self.zero_init, self.scale, self.authors_init = zero_init, scale, authors_init
        self.down = nn.Conv2d(channels, hidden, 1, stride)
        self.act = nn.ReLU()
        self.up = nn.Conv2d(hidden, out_channels or channels, 1)
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: Kaiming for ``down``, zero (or Kaiming) for ``up``, no biases."""
        if self.authors_init:
            self.down.reset_parameters()
            nn.init.zeros_(self.down.bias)
        else:
            kaiming_init(self.down)
        kaiming_init(self.up)
        if self.zero_init:
            nn.init.zeros_(self.up.weight)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output."""
        return self.up(self.act(self.down(x))) * self.scale

    @classmethod
    def layers(cls, block: nn.Module, **options: object) -> list[str]:
        """See :class:`Prompt`."""
        return feedforward(block)
