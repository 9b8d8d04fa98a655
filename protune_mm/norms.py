"""Which layers are norms."""

from __future__ import annotations

import re

from mmengine.model.utils import _BatchNormXd
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


SYNCHRONIZED = (
    'torch.nn.modules.batchnorm.SyncBatchNorm',
    'mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm',
    'mmcv.ops.sync_bn.SyncBatchNorm',
)
"""Full names of batch norms that synchronize processes, ``SyncBN`` and ``MMSyncBN`` of configs."""


def make_local(module: nn.Module) -> None:
    """Make synchronized batch norms that stay in evaluation mode plain ones, in place.

    They compute the same, and have nothing to synchronize. mmengine's Runner (in one process) and
    ``init_detector`` would replace these layers later, with all that they carry.

    Args:
        module: a module all of which is about to be frozen.
    """
    for layer in module.modules():
        kind = type(layer)
        if f'{kind.__module__}.{kind.__qualname__}' in SYNCHRONIZED:
            # What mmengine makes of them: it takes maps of any number of dimensions.
            layer.__class__ = _BatchNormXd
