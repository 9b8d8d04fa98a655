"""Lean execution: frozen layers that keep almost nothing for backward.

PyTorch's layers keep what the gradient of their weights would need, although frozen weights have
none. The layers here keep only what the gradient of their input needs, and compute the same.
"""

from .apply import hold_in_float32, lean_form, lean_options, link, make_lean
from .derived import forget
from .layers import LeanOptions, version_of
from .layout import inputs_channels_last, to_stock

__all__ = [
    'LeanOptions',
    'forget',
    'hold_in_float32',
    'inputs_channels_last',
    'lean_form',
    'lean_options',
    'link',
    'make_lean',
    'to_stock',
    'version_of',
]
