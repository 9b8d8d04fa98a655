"""Add prompts to the weights beside which they run, which leaves a stock backbone."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .inject import placed_options
from .lean import forget
from .prompted import PromptedBlock, sets_of
from .subclass import remove_mixin
from .tuned import backbones


def merge(model: nn.Module) -> nn.Module:
    """Merge every prompt of a model into the weights of its layer and remove it.

    Outputs stay the same but for rounding, and ``state_dict`` has the stock keys again. The
    backbones stay frozen, as with ``policy='head-only'``, and checkpoints hold their weights: they
    are those of no base any more. Weights of a lower precision than their prompt get that of it.

    Args:
        model: a backbone or anything that contains one, changed in place.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: a prompt is of a type that computes no change of weights, as most are, or a
            backbone has several sets of prompts. The model is unchanged then.
    """
    places = [m for m in model.modules() if isinstance(m, PromptedBlock)]
    for layer in places:
        if not getattr(layer.prompt, 'mergeable', False):
            raise ValueError(
                f'{type(layer.prompt).__name__} cannot be merged: it is no change of weights'
            )
    for name, backbone in backbones(model).items():
        if backbone in sets_of:
            raise ValueError(
                f"'{name}' has several sets of prompts (PromptSets), and its weights can have one: "
                'load the prompts to merge into a model without sets'
            )
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
