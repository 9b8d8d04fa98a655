"""What else may train in a backbone than prompts: the policies that Pro-tuning is compared with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from .norms import is_norm
from .stages.family import Stage

POLICIES = ('prompts', 'head-only', 'full', 'bias', 'norm', 'last-K')
"""Names of the policies, as :func:`protune_mm.protune` explains them; K is a number of blocks."""
_BIASES = ('bias', 'in_proj_bias', 'q_bias', 'v_bias')


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

    ``'bias'`` is BitFit (arXiv 2106.10199): every bias, those of norms and of queries, keys and
    values included, but no table of relative positions. ``'norm'``: the scale and shift of every
    norm; batch norms use the statistics of pre-training. The shift of ConvNeXt V2's ``GRN``, its
    ``beta``, is of the norm alone.

    Raises:
        ValueError: the backbone has none.
    """
    if policy not in ('bias', 'norm'):
        return frozenset()
    if policy == 'bias':
        names = (name for name, _ in module.named_parameters())
        found = frozenset(name for name in names if name.rpartition('.')[2] in _BIASES)
    else:
        found = frozenset(
            f'{name}.{key}'.lstrip('.')
            for name, layer in module.named_modules()
            if is_norm(layer)
            for key, _ in layer.named_parameters(recurse=False)
        )
    if not found:
        raise ValueError(
            f"policy='{policy}': {type(module).__name__} has no parameters of a {policy}: use "
            "another policy, such as 'head-only'"
        )
    return found


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
