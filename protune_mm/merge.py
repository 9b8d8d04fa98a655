"""Add prompts to the weights beside which they run, which leaves a stock backbone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .inject import placed_options
from .lean import forget, hold_in_float32
from .prompted import PromptedBlock, sets_of
from .subclass import remove_mixin
from .tuned import backbones


def merge(model: nn.Module) -> nn.Module:
    """Merge every prompt of a model into the weights of its layer and remove it.

    Outputs stay the same but for rounding, and ``state_dict`` has the stock keys again. The
    backbones stay frozen, as with ``policy='head-only'``, and checkpoints hold their weights: they
    are those of no base any more. What ``lean.dtype`` holds in a lower precision, in which a small
    change would be lost, is held in float32 from then on.

    Args:
        model: a backbone or anything that contains one, changed in place.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: a prompt is of a type that computes no change of weights, as most are, or a
            backbone has :class:`PromptSets`. The model is unchanged then.
    """
    places = [m for m in model.modules() if isinstance(m, PromptedBlock)]
    for layer in places:
        if not getattr(layer.prompt, 'mergeable', False):
            raise ValueError(
                f'{type(layer.prompt).__name__} cannot be merged: it is no change of weights'
            )
    for backbone in backbones(model).values():
        if backbone in sets_of:
            raise ValueError(
                f'{type(backbone).__name__} has PromptSets, and its weights can have the prompts '
                'of one: load these into a model without sets'
            )
    for backbone in backbones(model).values():
        lean = backbone._protune.options.lean
        if backbone._protune.places and lean is not None and lean.dtype:
            lean = replace(lean, dtype=None)
            backbone._protune.options = replace(backbone._protune.options, lean=lean)
            hold_in_float32(backbone, lean)
    for layer in places:
        prompt = layer._modules.pop('prompt')
        prompt.merge_into(layer)
        del layer._protune_site
        remove_mixin(layer, PromptedBlock)
    for backbone in backbones(model).values():
        state = backbone._protune
        if state.places:
            state.options = replace(state.options, policy='head-only', affine=False)
            state.placed = placed_options(state.options, [])
            state.origin = {'mixture': True}
            state.places = 0
        forget(backbone)
    return model
