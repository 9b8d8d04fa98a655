"""Lean forms of activations: a mask for those with two slopes, a recipe for the smooth ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..subclass import stock_type
from .derived import tracing
from .functions import Gate
from .layers import keeps, pays
from .rebuild import Rebuilding, recipe_of


class LeanActivation:
    """Mixin for activations with two constant slopes: keeps a mask."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock activation."""
        if not keeps(x) or tracing():
            return super().forward(x)
        passes, slopes = GATES[stock_type(self)]
        return Gate.apply(
            x,
            super().forward,
            lambda given: passes(self, given),
            slopes(self),
            bool(getattr(self, 'inplace', False)),
            self._protune_lean.prefer == 'memory',
        )


# PyTorch's hard sigmoid has the factor in float32, whatever the dtype.
_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
GATES: dict[type, tuple[Callable, Callable]] = {
    nn.ReLU: (lambda m, x: ~(x <= 0), lambda m: (1.0, 0.0)),
    nn.ReLU6: (lambda m, x: ~((x <= 0) | (x >= 6)), lambda m: (1.0, 0.0)),
    nn.Hardtanh: (lambda m, x: ~((x <= m.min_val) | (x >= m.max_val)), lambda m: (1.0, 0.0)),
    nn.LeakyReLU: (lambda m, x: x > 0, lambda m: (1.0, m.negative_slope)),
    nn.Hardsigmoid: (lambda m, x: (x > -3) & (x < 3), lambda m: (_SIXTH, 0.0)),
}
"""Type of an activation to: where its input is on the inner part; the slopes inside and outside.

Hard-swish is missing because its inner part is a parabola: its gradient needs the input.
"""


class LeanSmooth:
    """Mixin for GELU, SiLU and the like, which need their input: rebuilds it where it can."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock activation."""
        recipe = recipe_of(x) if keeps(x) and not tracing() else None
        if recipe is None or getattr(self, 'inplace', False) or not pays(self, recipe, [x]):
            return super().forward(x)
        with Rebuilding(recipe) as saved:
            out = super().forward(x)
            saved.let_go(x)
        return out
