"""What else may train in a backbone than prompts: the policies that Pro-tuning is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .stages.family import Stage

POLICIES = ('prompts', 'head-only', 'full', 'bias', 'norm', 'last-K')
"""Names of the policies, as :func:`protune_mm.protune` explains them; K is a number of blocks."""
_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def check_policy(policy: str) -> None:
    """Refuse an unknown policy.

    Raises:
        ValueError: it is none of :data:`POLICIES`.
    """
    known = policy in POLICIES and policy != 'last-K'
    if not known and not re.fullmatch(r'last-[1-9]\d*', str(policy)):
        raise ValueError(
            f"policy='{policy}' is unknown: use one of {', '.join(POLICIES)} (such as last-2)"
        )


def keeps_lean_layers(policy: str) -> bool:
    """Whether frozen layers may run lean: the others train weights of layers all over."""
    return policy in ('prompts', 'head-only')


def parameters_of(policy: str, module: nn.Module) -> frozenset[str]:
    """Names of the single parameters that a policy trains in a backbone.

    ``'bias'`` is BitFit (arXiv 2106.10199): every bias, those of norms included. ``'norm'``: the
    scale and shift of every norm; batch norms use the statistics of pre-training.
    """
    if policy == 'bias':
        return frozenset(
            name for name, _ in module.named_parameters() if name.rpartition('.')[2] == 'bias'
        )
    if policy == 'norm':
        return frozenset(
            f'{name}.{key}'.lstrip('.')
            for name, layer in module.named_modules()
            if isinstance(layer, _NORMS)
            for key, _ in layer.named_parameters(recurse=False)
        )
    return frozenset()


def blocks_of(policy: str, module: nn.Module, stages: Iterable[Stage]) -> tuple[str, ...]:
    """Names of the blocks that a policy trains as a whole, statistics included.

    Raises:
        ValueError: the backbone has no stages that are known, or fewer blocks.
    """
    if not policy.startswith('last-'):
        return ()
    count = int(policy.removeprefix('last-'))
    blocks = [block for stage in stages for block in stage.blocks]
    if count > len(blocks):
        raise ValueError(
            f"policy='{policy}': {type(module).__name__} has {len(blocks)} blocks of known stages"
        )
    return tuple(blocks[-count:])
