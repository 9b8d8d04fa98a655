"""Attention of frozen Transformers: fused, with queries, keys and values rebuilt in backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .derived import derived, tracing
from .layers import CHEAP, is_frozen, keeps, linear, pays, without_casts
from .rebuild import Kept, Rebuilding, Recipe, attach, recipe_of


def attend(
    module: nn.Module,
    qkv: Tensor,
    heads: int,
    mask: Callable[[Tensor], Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Apply scaled dot-product attention.

    Args:
        module: the attention layer, lean.
        qkv: the projected queries, keys and values, (B, N, 3 * heads * D), as
            :func:`protune_mm.lean.layers.linear` returns them.
        heads: number of heads.
        mask: makes the additive mask, (B, heads, N, N), from q.
        scale: factor on the logits. Default ``1 / sqrt(D)``.

    Returns:
        Tensor: (B, N, heads * D).
    """

    batch, tokens, width = qkv.shape
    channels = width // 3

    def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = qkv.reshape(batch, tokens, 3, heads, channels // heads)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(batch, tokens, channels)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with without_casts(q):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)

    q, k, v = split(qkv)
    bias = mask(q) if mask else None
    recipe = recipe_of(qkv) if keeps(qkv) and not tracing() else None
    if recipe is None:
        return merge(run(q, k, v, bias))
    # A quarter of what a block keeps, for a twelfth of its work: either preference takes it.
    if not pays(module, recipe, [q, k, v], limit=math.inf):
        # Queries, keys and values are kept; the output and the mask follow from them.
        base = Kept(qkv)
        recipe = Recipe(lambda: [base.get()], 0, 0)
    # The output costs another 2 N multiplications a number: little for windows.
    limit = channels // 2 if module._protune_lean.prefer == 'memory' else 0
    again = 2 * tokens <= max(CHEAP, limit)

    def make() -> list[Tensor]:
        q, k, v = split(recipe.take(0))
        bias = mask(q) if mask else None
        made = [q, k, v, q.new_empty(0) if bias is None else bias]
        return [*made, run(q, k, v, bias)] if again else made

    with Rebuilding(Recipe(make, recipe.kept, recipe.cost)) as saved:
        out = run(q, k, v, bias)
        saved.let_go(q, k, v, bias, *([out] if again else []))
    return merge(out)


class LeanMultiheadAttention:
    """Mixin for mmpretrain's ``MultiheadAttention``."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock layer; ``(B, N, C) -> (B, N, C)``."""
        fused = self.scaled_dot_product_attention is F.scaled_dot_product_attention
        if not fused or self.training or not is_frozen(self.qkv) or self.v_shortcut:
            return super().forward(x)
        out = attend(self, self.qkv(x), self.num_heads)
        return self.out_drop(self.gamma1(self.proj_drop(self.proj(out))))


_window_source: ContextVar[Recipe | None] = ContextVar('protune_mm_windows', default=None)
"""How the windows that a window attention is about to receive follow from the tokens."""


class LeanShiftWindowMSA:
    """Mixin for ``ShiftWindowMSA`` of Swin: its windows are rebuilt from the tokens, not kept."""

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """See the stock layer; ``(B, H * W, C) -> (B, H * W, C)``."""
        # Something else may have been put around the attention, or look at what it gets.
        attention = self.w_msa
        cut_here = isinstance(attention, LeanWindowMSA) and not (
            attention._forward_pre_hooks
            or attention._backward_hooks
            or attention._backward_pre_hooks
            or 'forward' in attention.__dict__
        )
        if not keeps(query) or tracing() or not cut_here:
            return super().forward(query, hw_shape)
        before, size = recipe_of(query), query.numel()
        base = None if before else Kept(query)

        def make() -> list[Tensor]:
            return [self._windows(before.take(0) if before else base.get(), hw_shape)]

        kept = before.kept if before else size * query.element_size()
        token = _window_source.set(Recipe(make, kept, size + (before.cost if before else 0)))
        try:
            return super().forward(query, hw_shape)
        finally:
            _window_source.reset(token)

    def _windows(self, tokens: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Pad, shift and cut as the stock ``forward`` does."""
        height, width = hw_shape
        size, shift = self.window_size, self.shift_size
        if min(height, width) == size and not getattr(self, 'pad_small_map', True):
            shift = 0
        batch, _, channels = tokens.shape
        grid = tokens.view(batch, height, width, channels)
        grid = F.pad(grid, (0, 0, 0, -width % size, 0, -height % size))
        if shift:
            grid = torch.roll(grid, shifts=(-shift, -shift), dims=(1, 2))
        rows, columns = grid.shape[1] // size, grid.shape[2] // size
        cut = grid.view(batch, rows, size, columns, size, channels)
        return cut.permute(0, 1, 3, 2, 4, 5).reshape(-1, size * size, channels)


class LeanWindowMSA:
    """Mixin for the ``WindowMSA`` of Swin, in each of the three libraries."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the stock layer; ``(windows * B, N, C) -> (windows * B, N, C)``."""
        if self.training or not is_frozen(self) or not is_frozen(self.qkv):
            return super().forward(x, mask)
        count, tokens, _ = x.shape
        source = None if tracing() else _window_source.get()
        if source is not None and recipe_of(x) is None:
            attach(x, source)

        def bias_like(q: Tensor) -> Tensor:
            bias = derived(
                self,
                'bias',
                (self.relative_position_bias_table, self.relative_position_index),
                lambda: self._position_bias(tokens).to(q.dtype),
                (q.dtype,),
            )
            if mask is None:
                return bias.expand(count, -1, -1, -1)
            # The mask repeats for every image of the batch.
            both = bias + mask.to(q.dtype).unsqueeze(1)
            return both.repeat(count // mask.shape[0], 1, 1, 1)

        out = attend(self, self.qkv(x), self.num_heads, bias_like, self.scale)
        return self.proj_drop(self.proj(out))

    def _position_bias(self, tokens: int) -> Tensor:
        rows = self.relative_position_bias_table.detach()[self.relative_position_index.view(-1)]
        return rows.view(1, tokens, tokens, -1).permute(0, 3, 1, 2).contiguous()


class LeanTorchAttention:
    """Mixin for mmcv's ``MultiheadAttention``, which wraps PyTorch's: self-attention only."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """See the stock layer; ``(B, N, C) -> (B, N, C)`` where ``batch_first``."""
        attn = self.attn
        plain = (
            all(other is None or other is query for other in (key, value))
            and not any(arg is not None for arg in (*args, *kwargs.values()))
            and self.batch_first
            and attn._qkv_same_embed_dim
            and attn.bias_k is None
            and not attn.add_zero_attn
            and is_frozen(attn)
            and is_frozen(attn.out_proj)
            and not self.training
        )
        if not plain:
            return super().forward(query, key, value, identity, *args, **kwargs)
        qkv = linear(self, query, attn.in_proj_weight, attn.in_proj_bias, 'in')
        out = attend(self, qkv, attn.num_heads)
        out = linear(self, out, attn.out_proj.weight, attn.out_proj.bias, 'out')
        identity = query if identity is None else identity
        return identity + self.dropout_layer(self.proj_drop(out))
