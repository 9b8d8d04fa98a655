"""How a stage's output becomes a map (B, C, H, W) for a prompt, and back.

Most blocks return a feature map, or tokens whose grid is an argument of the block or known to the
patch embedding only; the other layouts serve a few designs each.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

_grid: ContextVar[tuple[int, int] | None] = ContextVar('protune_mm_patch_grid', default=None)
"""Height and width, in patches, of the image that the current thread is encoding."""


class PatchGrid:
    """Mixin for a patch embedding, which returns ``(tokens, (H, W))``: remembers the grid.

    Blocks of a plain ViT receive tokens alone, so their prompts ask here. A context variable
    serves threads that encode images of different shapes with one model.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock embedding, unchanged, and keep its grid for this call."""
        out = super().forward(*args, **kwargs)
        if isinstance(out, tuple) and len(out) == 2 and len(out[1]) == 2:
            _grid.set((int(out[1][0]), int(out[1][1])))
        elif isinstance(out, Tensor) and hasattr(self, 'patch_size'):
            # It returns patches alone: the size of the image tells how many.
            size = self.patch_size
            height, width = size if isinstance(size, tuple | list) else (size, size)
            image = args[0] if args else next(iter(kwargs.values()))
            rows, columns = image.shape[2] // height, image.shape[3] // width
            if out.ndim == 3 and rows * columns != out.shape[1]:
                # Its patches are of a map that it computes first: only the shape is the image's.
                rows = round(math.sqrt(out.shape[1] * image.shape[2] / image.shape[3]))
                columns = out.shape[1] // rows
            _grid.set((rows, columns))
        return out


@dataclass(frozen=True)
class Maps:
    """Block output ``(B, C, H, W)``."""

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise TypeError(unexpected_output(site.name, out, 'a (B, C, H, W) tensor'))
        made = prompt(out)
        return made if site.series else out + made


@dataclass(frozen=True)
class Tokens:
    """Block output ``(B, N + H*W, C)``, N extra tokens (class, distillation, registers) first.

    Attributes:
        grid_argument: the block's second argument (or keyword ``hw_shape``) is its grid. False:
            the backbone's ``patch_embed`` returns it.
    """

    grid_argument: bool

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        if not isinstance(out, Tensor) or out.ndim != 3:
            raise TypeError(unexpected_output(site.name, out, 'a (B, L, C) tensor of tokens'))
        grid = self.find_grid(site, out, args, kwargs)
        if grid is None:
            raise RuntimeError(
                f"stage '{site.name}': no patch grid is known in this thread; call the backbone, "
                'not its block, and checkpoint activations with with_cp=True'
            )
        height, width = grid
        batch, length, channels = out.shape
        if length != site.extra + height * width:
            raise RuntimeError(
                f"stage '{site.name}' yields {length} tokens, but {site.extra} extra tokens and a "
                f'grid of {height}x{width} make {site.extra + height * width}'
            )
        extra, patches = out[:, : site.extra], out[:, site.extra :]
        made = prompt(patches.transpose(1, 2).reshape(batch, channels, height, width))
        made = made.flatten(2).transpose(1, 2)
        new = made if site.series else patches + made
        if site.extra == 0:
            return new
        if site.extra_tokens == 'map':
            # Each extra token is an image of one pixel to the convolutions.
            pixel = extra.reshape(batch * site.extra, channels, 1, 1)
            made_extra = prompt(pixel).reshape(batch, site.extra, channels)
        elif site.extra_tokens == 'mean':
            made_extra = made.mean(1, keepdim=True).expand_as(extra)
        else:
            return torch.cat((extra, new), dim=1)
        return torch.cat((made_extra if site.series else extra + made_extra, new), dim=1)

    def find_grid(self, site: Site, out: Tensor, args: tuple, kwargs: dict) -> tuple | None:
        """Height and width of the patches, or None where nobody knows them."""
        if self.grid_argument:
            return kwargs['hw_shape'] if 'hw_shape' in kwargs else args[1]
        return _grid.get()


@dataclass(frozen=True)
class TokensWithSizes(Tokens):
    """Tokens whose grid is a block's second and third argument, two integers."""

    grid_argument: bool = True

    def find_grid(self, site: Site, out: Tensor, args: tuple, kwargs: dict) -> tuple:
        """See :class:`Tokens`."""
        return args[1], args[2]


@dataclass(frozen=True)
class TokensOfGrid(Tokens):
    """Tokens of a backbone that takes images of one size: its grid is known when it is built.

    Attributes:
        grid: height and width. None: the patches are a square.
    """

    grid_argument: bool = True
    grid: tuple[int, int] | None = None

    def find_grid(self, site: Site, out: Tensor, args: tuple, kwargs: dict) -> tuple:
        """See :class:`Tokens`."""
        side = math.isqrt(out.shape[1] - site.extra)
        return self.grid or (side, side)


@dataclass(frozen=True)
class PatchMaps:
    """Block output ``(B, H*W, P, P, C)``: a map of PxP pixels for each patch; HiViT's."""

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        height, width = _grid.get()
        batch, _, side, _, channels = out.shape
        patches = out.reshape(batch, height, width, side, side, channels)
        pixels = patches.permute(0, 5, 1, 3, 2, 4)
        made = prompt(pixels.reshape(batch, channels, height * side, width * side))
        made = made.reshape(batch, channels, height, side, width, side)
        made = made.permute(0, 2, 4, 3, 5, 1).reshape(out.shape)
        return made if site.series else out + made


@dataclass(frozen=True)
class LastMaps:
    """Block output ``(B, H, W, C)``."""

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        if not isinstance(out, Tensor) or out.ndim != 4:
            raise TypeError(unexpected_output(site.name, out, 'a (B, H, W, C) tensor'))
        made = prompt(out.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return made if site.series else out + made


@dataclass(frozen=True)
class Item:
    """Block output that is a tuple or list, one item of which the prompt takes.

    Attributes:
        index: which.
        layout: of that item.
        grid_index: the item that is the grid of tokens; None: the layout knows it.
    """

    index: int
    layout: Maps | Tokens
    grid_index: int | None = None

    def join(
        self, site: Site, prompt: nn.Module, out: tuple | list, args: tuple, kwargs: dict
    ) -> tuple | list:
        """Return the output with one item prompted."""
        if self.grid_index is not None:
            args, kwargs = (args[0], tuple(out[self.grid_index])), {}
        items = list(out)
        items[self.index] = self.layout.join(site, prompt, out[self.index], args, kwargs)
        return type(out)(items)


@dataclass(frozen=True)
class Rows:
    """Layer output ``(..., C)`` of which each row stands for itself; for prompts of 1x1 layers."""

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out`` but for its channels."""
        rows = out.reshape(out.shape[0], -1, out.shape[-1])
        # In memory this is a channels-last map: nothing is copied.
        made = prompt(rows.transpose(1, 2).unsqueeze(3)).squeeze(3).transpose(1, 2)
        made = made.reshape(*out.shape[:-1], made.shape[-1])
        return made if site.series else out + made


@dataclass(frozen=True)
class NormOutput:
    """What a norm returns: maps, or rows with their channels last.

    Attributes:
        first: of four axes, the second are the channels. False: the last, unless only the second
            fits.
        named: it takes maps, as the libraries' LayerNorm2d: where both axes fit, its argument
            ``data_format`` tells, else the second are the channels.
    """

    first: bool
    named: bool = False

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        maps = out.ndim == 4 and (self.first or out.shape[-1] != site.channels)
        if self.named and out.ndim == 4 and out.shape[1] == out.shape[-1]:
            told = [*args[1:], *kwargs.values()]
            maps = not any(isinstance(each, str) and 'last' in each for each in told)
        layout = Maps() if maps else Rows()
        return layout.join(site, prompt, out, args, kwargs)


@dataclass(frozen=True)
class Beside:
    """Layer inside a block, or a block, whose prompt reads what the layer reads.

    Attributes:
        layout: of the layer's input.
    """

    layout: Maps | LastMaps | Tokens | Rows

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the layer's output with the prompt added."""
        given = args[0] if args else next(iter(kwargs.values()))
        alone = replace(site, series=True, extra_tokens='map')
        return out + self.layout.join(alone, prompt, given, args, kwargs)


@dataclass(frozen=True)
class Inside(Beside):
    """Layer inside a block whose prompt reads what the layer returns.

    Attributes:
        layout: of the layer's output.
    """

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the layer's output with the prompt added."""
        return self.layout.join(site, prompt, out, args, kwargs)


class TellsGrid:
    """Mixin for a block that receives its grid: keeps it for the prompts inside the block."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, unchanged."""
        layout, given = self._protune_grid, args[0] if args else None
        height, width = layout.find_grid(None, given, args, kwargs)
        token = _grid.set((int(height), int(width)))
        try:
            return super().forward(*args, **kwargs)
        finally:
            _grid.reset(token)


@dataclass(frozen=True)
class Unknown:
    """Block of a user's own backbone: decides by the dimensions of each output.

    Attributes:
        channels_last: maps are ``(B, H, W, C)``.
        tokens: layout of ``(B, L, C)``. None: the grid is the block's second argument where it
            has one, else the embedding knows it.
    """

    channels_last: bool = False
    tokens: Tokens | None = None

    def join(self, site: Site, prompt: nn.Module, out: Tensor, args: tuple, kwargs: dict) -> Tensor:
        """Return the prompted output, of the shape of ``out``."""
        if isinstance(out, Tensor) and out.ndim == 4:
            maps = LastMaps() if self.channels_last else Maps()
            return maps.join(site, prompt, out, args, kwargs)
        if isinstance(out, Tensor) and out.ndim == 3:
            if self.tokens is not None:
                return self.tokens.join(site, prompt, out, args, kwargs)
            by_argument = 'hw_shape' in kwargs or (
                len(args) > 1 and isinstance(args[1], tuple | list | torch.Size)
            )
            return Tokens(by_argument).join(site, prompt, out, args, kwargs)
        raise TypeError(unexpected_output(site.name, out, EXPECTED))


EXPECTED = 'a (B, C, H, W) tensor, or (B, L, C) tokens'
Layout = Maps | LastMaps | PatchMaps | Tokens | Rows | NormOutput | Beside | Item | Unknown


@dataclass(frozen=True)
class Site:
    """Where one prompt sits and how it joins.

    Attributes:
        name: the stage's name, as ``stages=`` accepts it; used in messages.
        block: dotted name of the block that carries the prompt, inside the backbone.
        channels: channels C of the block's output.
        layout: how the output becomes a map.
        series: the prompt replaces the output (the paper's last block) instead of being added.
        embedding: dotted name of the backbone's submodule that knows the grid of tokens.
        extra: number of extra tokens before the patch tokens.
        extra_tokens: what extra tokens receive: ``'keep'`` nothing, ``'map'`` their own prompt as
            maps of one pixel, ``'mean'`` the mean of the patches' prompt.
        geometry: how the prompt of a layer is built besides ``channels``, such as its stride.
        plain: the backbone returns the stage's output as it is before the prompt.
        config: of the prompt, where it is not the one that the backbone's options name.
    """

    name: str
    block: str
    channels: int
    layout: Layout
    series: bool = False
    embedding: str = 'patch_embed'
    extra: int = 0
    extra_tokens: str = 'keep'
    geometry: dict = field(default_factory=dict)
    plain: bool = False
    config: dict | None = None


def unexpected_output(name: str, out: object, expected: str) -> str:
    """Message for a stage whose output no prompt can take."""
    if isinstance(out, Tensor):
        got = f'a tensor of shape {tuple(out.shape)}'
    else:
        got = f'a {type(out).__name__}'
    return f"stage '{name}' yields {got}; a prompt needs {expected}"
