"""Lean execution: frozen layers that keep almost nothing for backward.

PyTorch's layers keep what the gradient of their weights would need, although frozen weights have
none. The layers here keep only what the gradient of their input needs, and compute the same.
"""

from .apply import lean_form, lean_options, link, make_lean
from .derived import forget
from .layers import LeanOptions
from .layout import to_channels_last, to_stock, wants_channels_last

__all__ = [
    'LeanOptions',
    'forget',
    'lean_form',
    'lean_options',
    'link',
    'make_lean',
    'to_channels_last',
    'to_stock',
    'wants_channels_last',
]
