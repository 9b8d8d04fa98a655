"""Lean execution: frozen layers that keep almost nothing for backward.

PyTorch's layers keep what the gradient of their weights would need, although frozen weights have
none. The layers here keep only what the gradient of their input needs, and compute the same.
"""

from .apply import lean_form, lean_options, link, make_lean
from .derived import forget
from .layers import LeanOptions
from .layout import inputs_channels_last, to_stock

__all__ = [
    'LeanOptions',
    'forget',
    'inputs_channels_last',
    'lean_form',
    'lean_options',
    'link',
    'make_lean',
    'to_stock',
]
