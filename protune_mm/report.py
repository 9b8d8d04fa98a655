"""What a Pro-tuned model trains, in one line and as a table."""

from __future__ import annotations

from torch import nn

from .features import Beside, Inside
from .prompts.convs import fixed_layers
from .tuned import backbones, heads, prompts, tuned_parameters


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a model by their part.

    Args:
        model: a whole model, wrapped or not.

    Returns:
        dict[str, int]: ``frozen`` and ``prompts`` of the backbones, ``rest``: trainable
        parameters elsewhere (neck and head, or a backbone's own classifier), ``rest_frozen``: the
        others there. What is fixed in prompts (``fixed_down=True``) is in none of them, see
        :func:`fixed_count`.
    """
    tuned = {id(p) for p in tuned_parameters(model).values()}
    inside = {id(p) for b in backbones(model).values() for p in b.parameters()}
    for backbone in backbones(model).values():
        inside -= {id(p) for head in heads(backbone).values() for p in head.parameters()}
    counts = dict.fromkeys(('frozen', 'prompts', 'rest', 'rest_frozen'), 0)
    for parameter in model.parameters():
        if id(parameter) in tuned:
            part = 'prompts'
        elif id(parameter) in inside:
            part = 'frozen'
        else:
            part = 'rest' if parameter.requires_grad else 'rest_frozen'
        counts[part] += parameter.numel()
    return counts


def fixed_count(model: nn.Module) -> int:
    """How many weights of a model's prompts are set once, never trained, and saved with them."""
    layers = [
        layer for prompt in prompts(model).values() for layer in fixed_layers(prompt).values()
    ]
    return sum(buffer.numel() for layer in layers for buffer in layer.buffers())


def parameter_line(model: nn.Module) -> str:
    """The line a training run logs: what is frozen and what trains."""
    n = parameter_counts(model)
    share = 100 * n['prompts'] / n['frozen'] if n['frozen'] else 0.0
    fixed = fixed_count(model)
    line = (
        f'Pro-tuning: backbone frozen {n["frozen"]:,}, prompts {n["prompts"]:,} '
        f'({share:.2f}% of backbone)'
    )
    line += f' and {fixed:,} fixed in them' if fixed else ''
    line += f', neck+head {n["rest"]:,}'
    line += f' (+{n["rest_frozen"]:,} frozen)' if n['rest_frozen'] else ''
    return f'{line}: {frozen_share(n):.1f}% of the model frozen'


def frozen_share(counts: dict[str, int]) -> float:
    """Percent of a model's parameters that do not train, of :func:`parameter_counts`."""
    return 100 * (counts['frozen'] + counts['rest_frozen']) / max(1, sum(counts.values()))


def prompt_rows(model: nn.Module) -> list[dict[str, object]]:
    """One row for each prompt, in the order of the forward pass.

    Returns:
        list[dict]: keys ``stage``, ``block``, ``type``, ``channels``, ``join`` and
        ``parameters``.
    """
    rows = []
    for prefix, backbone in backbones(model).items():
        for name, prompt in prompts(backbone).items():
            site = backbone.get_submodule(name.removesuffix('.prompt'))._protune_site
            join = 'series' if site.series else 'residual'
            if isinstance(site.layout, Beside):
                join = 'inside' if isinstance(site.layout, Inside) else 'beside'
            if site.extra_tokens != 'keep':
                join += f', class token: {site.extra_tokens}'
            rows.append(
                {
                    'stage': site.name,
                    'block': f'{prefix}.{site.block}'.lstrip('.'),
                    'type': type(prompt).__name__,
                    'channels': site.channels,
                    'join': join,
                    'parameters': sum(p.numel() for p in prompt.parameters()),
                }
            )
    return rows
