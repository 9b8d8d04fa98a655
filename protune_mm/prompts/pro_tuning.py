"""The prompt block of Pro-tuning: 1x1 -> 5x5 -> 1x1 convolutions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmengine.dist import broadcast
from mmengine.logging import print_log
from mmengine.model import BaseModule, kaiming_init
from torch import Tensor, nn

from ..lean.derived import tracing
from ..lean.layers import keeps
from ..lean.rebuild import Rebuilding, apply_rebuildable, hooked
from ..registry import PROMPTS
from .base import check_count
from .convs import DepthwiseConv2d, FixedConv2d, ScaledConv2d


@PROMPTS.register_module()
class ProTuningBlock(BaseModule):
    """Turns the output of a frozen stage into a vision prompt of the same shape.

    Source: Figure 2 of *Pro-tuning: Unified Prompt Tuning for Vision Tasks*, arXiv 2207.14381.
    The figure gives the three convolutions; what it leaves open is an option here. Who calls the
    block decides whether the prompt is added to the stage's output or replaces it.

    Args:
        channels: channels C of the stage's output.
        ratio: the 1x1 convolutions reduce C to ``int(C / ratio)`` and restore it. Default 8.
        hidden: channels of the middle convolution, instead of ``ratio``. Default None: by ratio.
        kernel_size: side of the middle convolution, odd, in pixels. Default 5.
        depthwise: the middle convolution mixes no channels. Default True.
        norm_cfg: normalization after each of the first two convolutions, as in mmcv. Default
            None: no normalization.
        act_cfg: activation after each of the first two convolutions (after the normalization).
            Default GELU; None for none.
        scale: factor on the prompt; ``'root'``: one over the root of the hidden channels, as of
            rank-stabilized LoRA (arXiv 2312.03732): the wider a prompt, the farther a step of Adam
            moves it. Default 1.
        learnable_scale: train the factor, one number for the block. Default False.
        zero_init: start the last convolution at zero, so that the prompt starts at exactly zero.
            Default True.
        init_mode: how the other convolutions start: by Kaiming's rule, ``'fan_out'``, or
            ``'fan_in'``, which keeps the size of the signal through a depth-wise convolution,
            too; or ``'principal'``, from the first training batch, see
            :meth:`start_from`. Default ``'fan_out'``, as of mmengine.
        drop_rate: probability with which a hidden channel is left out in training, before the last
            convolution (``nn.Dropout2d``): of each image, and apart from it of a class token that
            is prompted. Above 0 what the last convolution reads is kept for backward, one hidden
            map, also where ``lean`` would compute it again. Default 0.
        fixed_down: leave the first convolution as it starts, as LoRA-FA (arXiv 2308.03303) does
            with the first matrix of LoRA. Its weights are buffers then, in checkpoints under the
            same names, and, where ``lean``, the map that the block reads is not kept for backward.
            For ``init_mode='principal'``, whose start is no random one: one batch decides then, and
            a warning says so if it shows too little. Default False.

    Raises:
        ValueError: ``ratio`` leaves no channel, ``hidden`` is below 1, ``kernel_size`` is even or
            below 1, ``scale`` is not finite, mmcv refuses ``norm_cfg`` or ``act_cfg``,
            ``drop_rate`` is not from 0 to below 1, ``init_mode`` is unknown, or ``'principal'``
            where the last convolution does not start at zero.
        TypeError: an option that should be a number or a bool is none.

    Shape: ``(B, C, H, W) -> (B, C, H, W)``, any H and W from 1 on.

    Attributes:
        lean: compute normalization and activation again in backward instead of keeping their
            output. Set by :func:`protune_mm.protune`.
        training_only: options that choose how it starts and trains, not what it computes in
            evaluation; a checkpoint does not ask for the same. (The width that the library chooses
            is another one with ``fixed_down``: name it where you change that.)
        waits: the next training batch decides how it starts.
        started: a training batch has decided it.
    """

    lean = True
    training_only = ('zero_init', 'init_mode', 'drop_rate', 'fixed_down')

    def __init__(
        self,
        channels: int,
        ratio: float = 8,
        kernel_size: int = 5,
        depthwise: bool = True,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = dict(type='GELU'),  # noqa: B006
        scale: float | str = 1.0,
        learnable_scale: bool = False,
        zero_init: bool = True,
        hidden: int | None = None,
        init_mode: str = 'fan_out',
        drop_rate: float = 0.0,
        fixed_down: bool = False,
    ) -> None:
        super().__init__()
        given = dict(
            ratio=ratio,
            kernel_size=kernel_size,
            scale=1.0 if scale == 'root' else scale,
            drop_rate=drop_rate,
        )
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                hint = " and not 'root'" if name == 'scale' else ''
                raise TypeError(f'{name}={value!r} is no number{hint}')
        given = dict(
            depthwise=depthwise,
            learnable_scale=learnable_scale,
            zero_init=zero_init,
            fixed_down=fixed_down,
        )
        for name, value in given.items():
            if not isinstance(value, bool):
                raise TypeError(f'{name}={value!r} is neither True nor False')
        if scale != 'root' and not math.isfinite(scale):
            raise ValueError(f'scale={scale} is not finite')
        if hidden is not None:
            check_count('hidden', hidden)
        if hidden is None and (ratio <= 0 or int(channels / ratio) < 1):
            raise ValueError(
                f'ratio={ratio} leaves no channel of {channels}: use a ratio above 0 and at most '
                f'{channels}'
            )
        if kernel_size < 1 or kernel_size % 1:
            raise ValueError(f'kernel_size={kernel_size} is no side in pixels: use 1, 3, 5, ...')
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size={kernel_size} shifts the map by half a pixel: use odd')
        if init_mode not in ('fan_in', 'fan_out', 'principal'):
            raise ValueError(f"init_mode={init_mode!r}: use 'fan_in', 'fan_out' or 'principal'")
        if init_mode == 'principal' and not zero_init:
            # Where the output is not zero, this start would change it in the middle of a batch.
            raise ValueError("init_mode='principal' needs a start at zero: leave zero_init=True")
        if not 0 <= drop_rate < 1:
            raise ValueError(f'drop_rate={drop_rate}: use a probability from 0 to below 1')
        hidden = hidden or int(channels / ratio)
        scale = hidden**-0.5 if scale == 'root' else scale
        self.zero_init, self.init_mode = zero_init, init_mode
        # A normalization right after a convolution makes its bias redundant.
        bias = norm_cfg is None
        self.down = (FixedConv2d if fixed_down else nn.Conv2d)(channels, hidden, 1, bias=bias)
        self.norm1 = _norm(norm_cfg, hidden)
        self.act1 = _activation(act_cfg)
        self.spatial = (DepthwiseConv2d if depthwise else nn.Conv2d)(
            hidden,
            hidden,
            kernel_size,
            padding=kernel_size // 2,
            groups=hidden if depthwise else 1,
            bias=bias,
        )
        self.norm2 = _norm(norm_cfg, hidden)
        self.act2 = _activation(act_cfg)
        self.drop = nn.Dropout2d(drop_rate) if drop_rate else nn.Identity()
        self.up = ScaledConv2d(hidden, channels, 1)
        if learnable_scale:
            self.scale = nn.Parameter(torch.tensor(float(scale)))
        else:
            self.scale = float(scale)
        self._initial_scale = float(scale)
        self.init_weights()

    def init_weights(self) -> None:
        """Set the start: see ``init_mode`` and ``zero_init``."""
        self.waits, self.started = self.init_mode == 'principal', False
        mode = 'fan_in' if self.waits else self.init_mode
        kaiming_init(self.down, mode=mode)
        kaiming_init(self.spatial, mode=mode)
        if self.waits:
            # The part of that start that needs no batch.
            nn.init.dirac_(self.spatial.weight, groups=self.spatial.groups)
        if self.zero_init:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)
        else:
            kaiming_init(self.up, mode=mode)
        for norm in (self.norm1, self.norm2):
            if getattr(norm, 'weight', None) is not None:
                nn.init.ones_(norm.weight)
                nn.init.zeros_(norm.bias)
            if hasattr(norm, 'reset_running_stats'):
                norm.reset_running_stats()
        if isinstance(self.scale, nn.Parameter):
            nn.init.constant_(self.scale, self._initial_scale)
        self._is_init = True

    def forward(self, x: Tensor) -> Tensor:
        """Return the prompt for ``x``, scale included, without adding it to ``x``."""
        if self.waits and self.training:
            self.start_from(x)
        down = self.down
        if self.lean and isinstance(down, FixedConv2d):
            down = down.without_input
        prompt = self._activated(down(x), self.norm1, self.act1, self.spatial)
        return self._activated(prompt, self.norm2, self.act2, self._up)

    def _up(self, x: Tensor) -> Tensor:
        """Return to the channels of the stage, some hidden ones left out, and apply the scale."""
        return self.up(self.drop(x), self.scale)

    @torch.compiler.disable
    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Start the first convolution from a batch; the prompt stays zero.

        It becomes the projection of pixels, less their mean, on the directions in which they differ
        most, with outputs of one as their mean square; the second one is the identity already.
        So what the last convolution learns at first follows from the directions that hold most of
        the frozen features, instead of random ones: the projection that principal component
        analysis gives is the one that keeps most of their inner products. EVA, arXiv 2410.07170,
        starts LoRA's first matrix in this way. Of several processes all start as the first one
        does. A prompt whose last convolution has a weight that is not zero was trained already, and
        stays as it is; where all pixels of the first process are the same but for a thousandth of
        their size, or one is no number, it waits for the next batch.

        Args:
            x: (B, C, H, W), what the block reads; at most 2048 pixels of it are looked at.
        """
        self.waits = False
        if self.up.weight.any():
            return
        pixels = some_pixels(x.detach())
        shows = differ(pixels).to(torch.uint8)
        broadcast(shows)
        if not shows:
            self.waits = True
            print_log(
                'a prompt cannot start from this batch, in which all pixels are nearly the same or '
                'one is no number: it waits for the next one',
                logger='current',
                level=logging.WARNING,
            )
            return
        with torch.autocast(x.device.type, enabled=False):
            found = self._project_on_principal(pixels)
        self.started = True
        if isinstance(self.down, FixedConv2d) and found < self.down.out_channels:
            print_log(
                f'fixed_down=True: the first training batch shows {found} directions for the '
                f'{self.down.out_channels} hidden channels of a prompt; the other ones stay random',
                logger='current',
                level=logging.WARNING,
            )
        # Each process has a batch of its own.
        for tensor in (*self.down.parameters(), *self.down.buffers()):
            broadcast(tensor)

    def _project_on_principal(self, pixels: Tensor) -> int:
        """Start from pixels (N, C), of which some differ; return how many directions they show."""
        count = len(pixels)
        mean = pixels.mean(0)
        if not differ(pixels):
            return 0
        _, sizes, directions = torch.linalg.svd(pixels - mean, full_matrices=False)
        hidden = self.down.out_channels
        found = min(hidden, int((sizes > 1e-4 * sizes[0]).sum()))
        size = (sizes[:found].square().mean() / count).sqrt()
        # Where a batch shows fewer directions than there are channels, the rest stay random.
        weight = nn.functional.normalize(self.down.weight.flatten(1).float())
        weight[:found] = directions[:found]
        weight /= size
        self.down.weight.copy_(weight.view_as(self.down.weight))
        if self.down.bias is not None:
            self.down.bias.copy_(-weight @ mean)
        return found

    def _activated(
        self, x: Tensor, norm: nn.Module, act: nn.Module, conv: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Apply normalization, activation and the next convolution.

        The input of the normalization is all that is kept: what follows from it is cheap to
        compute again in backward.
        """
        if not (self.lean and keeps(x)) or tracing() or hooked():
            return conv(act(norm(x)))
        normed, from_norm = apply_rebuildable(norm, x, None)
        active, from_act = apply_rebuildable(act, normed, from_norm)
        if from_act is None:
            return conv(active)
        with Rebuilding(from_act) as saved:
            out = conv(active)
            saved.let_go(active)
        return out


def differ(pixels: Tensor) -> Tensor:
    """Whether pixels (N, C) are numbers that differ by more than a thousandth of their size.

    By less, what they differ in may be rounding, and a projection that makes it a size of one would
    make features of other images too large for half precision.
    """
    scaled = pixels / pixels.abs().max()
    spread = (scaled - scaled.mean(0)).norm()
    return pixels.isfinite().all() & (spread > 1e-3 * scaled.norm())


def some_pixels(x: Tensor, most: int = 2048) -> Tensor:
    """Evenly spread pixels (N, C) of maps (B, C, H, W), as float32; only these are copied."""
    height, width = x.shape[2:]
    total = x.shape[0] * height * width
    chosen = torch.linspace(0, total - 1, min(total, most), device=x.device).long()
    image, place = chosen // (height * width), chosen % (height * width)
    return x[image, :, place // width, place % width].float()


def _norm(cfg: dict | None, channels: int) -> nn.Module:
    """A normalization as mmcv builds it, or none."""
    return _built('norm_cfg', cfg, lambda: build_norm_layer(cfg, channels)[1])


def _activation(cfg: dict | None) -> nn.Module:
    """An activation as mmcv builds it, or none."""
    return _built('act_cfg', cfg, lambda: build_activation_layer(cfg))


def _built(name: str, cfg: dict | None, build: Callable[[], nn.Module]) -> nn.Module:
    if not cfg:
        return nn.Identity()
    try:
        return build()
    except (AssertionError, KeyError, TypeError) as error:  # Some say nothing.
        told = str(error).strip('"\'') or f'mmcv refuses it ({type(error).__name__})'
        if isinstance(error, KeyError) and 'type' in cfg:
            told = f"mmcv knows no type '{cfg['type']}'"
        raise ValueError(f'{name}={cfg}: {told}') from error
