"""Add prompts to the weights beside which they run, which leaves a stock backbone."""

from __future__ import annotations

from torch import nn

from .lean import forget
from .prompted import PromptedBlock
from .subclass import remove_mixin
from .tuned import backbones


def merge(model: nn.Module) -> nn.Module:
    """Merge every prompt of a model into the weights of its layer and remove it.

    Outputs stay the same but for rounding, and ``state_dict`` has the stock keys again. The
    backbones stay frozen.

    Args:
        model: a backbone or anything that contains one, changed in place.

    Returns:
        nn.Module: the same module.

    Raises:
        ValueError: a prompt is of a type that computes no change of weights, as most are. The
            model is unchanged then.
    """
    places = [m for m in model.modules() if isinstance(m, PromptedBlock)]
    for layer in places:
        if not getattr(layer.prompt, 'mergeable', False):
            raise ValueError(
                f'{type(layer.prompt).__name__} cannot be merged: it is no change of weights'
            )
    for layer in places:
        prompt = layer._modules.pop('prompt')
        prompt.merge_into(layer)
        del layer._protune_site
        remove_mixin(layer, PromptedBlock)
    for backbone in backbones(model).values():
        backbone._protune.places = 0
        forget(backbone)
    return model
