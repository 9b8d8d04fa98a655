"""Lean forms of activations: a mask for those with two slopes, a recipe for the smooth ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..subclass import stock_type
from .derived import tracing
from .functions import Gate
from .layers import keeps, pays
from .masks import Tests
from .rebuild import Rebuilding, recipe_of


class LeanActivation:
    """Mixin for activations with two constant slopes: keeps a mask."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock activation."""
        if not keeps(x) or tracing():
            return super().forward(x)
        gate = GATES[stock_type(self)]
        return Gate.apply(
            x,
            super().forward,
            gate.tests(self),
            gate.of_output,
            gate.slopes(self),
            bool(getattr(self, 'inplace', False)),
            self._protune_lean.prefer == 'memory',
        )


@dataclass(frozen=True)
class Slopes:
    """Two constant slopes of an activation, and where each holds.

    Attributes:
        tests: comparisons, by name, that hold on the inner part only; from the layer.
        of_output: they are of the output, not of the input.
        slopes: inside and outside; from the layer.
    """

    tests: Callable[[nn.Module], Tests]
    of_output: bool = False
    slopes: Callable[[nn.Module], tuple[float, float]] = lambda layer: (1.0, 0.0)


# PyTorch's hard sigmoid has the factor in float32, whatever the dtype.
_SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
# A clamped number differs from both limits exactly where the input lies between them. NaN differs
# from everything: its gradient passes, as PyTorch's does.
GATES: dict[type, Slopes] = {
    nn.ReLU: Slopes(lambda m: (('not_equal', 0),), of_output=True),
    nn.ReLU6: Slopes(lambda m: (('not_equal', 0), ('not_equal', 6)), of_output=True),
    nn.Hardtanh: Slopes(
        lambda m: (('not_equal', m.min_val), ('not_equal', m.max_val)), of_output=True
    ),
    nn.LeakyReLU: Slopes(lambda m: (('greater', 0),), slopes=lambda m: (1.0, m.negative_slope)),
    nn.Hardsigmoid: Slopes(
        lambda m: (('greater', -3), ('less', 3)), slopes=lambda m: (_SIXTH, 0.0)
    ),
}
"""Type of an activation to its slopes.

Hard-swish is missing because its inner part is a parabola: its gradient needs the input.
"""


class LeanSwish:
    """Mixin for mmcv's ``Swish``, ``x * sigmoid(x)``: keeps ``x`` alone."""

    def forward(self, x: Tensor) -> Tensor:
        """See the stock activation."""
        return F.silu(x)


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
