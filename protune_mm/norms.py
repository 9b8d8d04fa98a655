"""Which layers are norms."""

from __future__ import annotations

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
"""torch's norms with a scale and shift of each channel."""
_OWN = r'(Norm([123][dD])?|GRN)$'


def is_norm(layer: nn.Module) -> bool:
    """Whether a layer is a norm: torch's, or a network's own, which only its name tells.

    Such are HorNet's ``HorNetLayerNorm``, ``GRN`` of ConvNeXt V2.
    """
    return isinstance(layer, NORMS) or bool(re.search(_OWN, type(layer).__name__))
