"""Conv-Adapter."""

from __future__ import annotations

import torch
from mmengine.model import kaiming_init
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import PROMPTS
from .base import Prompt, feedforward, outermost


@PROMPTS.register_module()
class ConvAdapter(Prompt):
    """A grouped and a 1x1 convolution beside every convolution wider than one pixel.

    Source: *Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets*, arXiv
    2208.07463, Section 3.3: ``h + alpha * up(f(down(x)))``, in its parallel form. ``down`` has the
    kernel, stride and padding of the convolution it adapts and one group for each hidden channel;
    ``up`` is 1x1; ``alpha`` is one factor a channel. In a block without such convolutions it runs
    beside the feed-forward network, on the grid of patches.

    Args:
        channels: channels of the input.
        out_channels: channels of the output. Default ``channels``.
        stride: of the layer beside which it runs, in pixels. Default 1.
        kernel_size: of that layer. Default 3.
        padding: of that layer. Default half the kernel.
        dilation: of that layer. Default 1.
        conv_type: of that layer, which may pad in a way of its own. Default ``nn.Conv2d``.
        ratio: input channels over hidden ones. Default 4.
        beside: ``'convolution'``, or ``'block'``: the paper's residual form.
        zero_init: start ``up`` at zero. Default True.

    Raises:
        ValueError: ``beside`` is unknown, or ``ratio`` is not above 0.

    Shape: ``(B, channels, H, W) -> (B, out_channels, H / stride, W / stride)``.
    """

    where = 'layers'

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        stride: int | tuple = 1,
        kernel_size: int | tuple = 3,
        padding: int | tuple | None = None,
        dilation: int | tuple = 1,
        conv_type: type[nn.Conv2d] = nn.Conv2d,
        ratio: float = 4,
        beside: str = 'convolution',
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if ratio <= 0:
            raise ValueError(f'ratio={ratio} leaves no channel: use a number above 0')
        out_channels = out_channels or channels
        # The number of groups has to divide the channels.
        hidden = max(1, int(channels / ratio))
        while channels % hidden:
            hidden -= 1
        self.zero_init = zero_init
        if padding is None:
            padding = kernel_size // 2
        geometry = dict(stride=stride, padding=padding, dilation=dilation)
        self.down = conv_type(channels, hidden, kernel_size, groups=hidden, **geometry)
        self.act = nn.ReLU()
        self.up = nn.Conv2d(hidden, out_channels, 1)
        self.alpha = nn.Parameter(torch.ones(out_channels, 1, 1))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: Kaiming for ``down``, zero (or Kaiming) for ``up``, one for ``alpha``."""
        kaiming_init(self.down)
        kaiming_init(self.up)
        if self.zero_init:
            nn.init.zeros_(self.up.weight)
        nn.init.ones_(self.alpha)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the layer's output."""
        # A factor on the weights keeps no map for backward.
        weight = self.up.weight * self.alpha[:, None]
        bias = self.up.bias * self.alpha[:, 0, 0]
        return F.conv2d(self.act(self.down(x)), weight, bias)

    @classmethod
    def layers(cls, block: nn.Module, beside: str = 'convolution', **options: object) -> list[str]:
        """See :class:`Prompt`."""
        if beside not in ('convolution', 'block'):
            raise ValueError(f"beside='{beside}' is unknown: use 'convolution' or 'block'")
        wide = outermost(block, lambda _, m: isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1)
        return (list(wide) if beside == 'convolution' else []) or feedforward(block)
