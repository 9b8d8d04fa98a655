"""The config of a prompt: its defaults, its own options, and how it is placed."""

from __future__ import annotations

from mmengine.config import ConfigDict
from torch import nn

from .registry import PROMPTS

DEFAULT_PROMPT = dict(type='ProTuningBlock', ratio=8, last='residual', extra_tokens='map')
PLACED = dict(
    last=('residual', 'series'), extra_tokens=('map', 'mean'), features=('prompted', 'plain')
)
"""What of a prompt's config says how it is placed, and the choices, the default first."""
AFFINE = dict(type='ScaleShift')
NAMED_PROMPTS = {'paper': dict(type='ProTuningBlock', last='series')}


def prompt_config(prompt: str | dict | None) -> dict:
    if isinstance(prompt, str):
        if prompt not in NAMED_PROMPTS:
            raise ValueError(
                f"prompt='{prompt}' is unknown: use {', '.join(map(repr, NAMED_PROMPTS))} or a "
                "dict such as dict(type='ProTuningBlock', ratio=8)"
            )
        prompt = NAMED_PROMPTS[prompt]
    given = ConfigDict(prompt or {}).to_dict()
    if given.get('type', DEFAULT_PROMPT['type']) == DEFAULT_PROMPT['type']:
        given = {**DEFAULT_PROMPT, **given}
    config = {**{key: choices[0] for key, choices in PLACED.items()}, **given}
    for key, choices in PLACED.items():
        if config[key] not in choices:
            raise ValueError(
                f"prompt.{key}='{config[key]}' is unknown: use one of {', '.join(choices)}"
            )
    return config


def own_options(config: dict) -> dict:
    """What of a prompt's config the prompt type itself takes."""
    return {k: v for k, v in config.items() if k != 'type' and k not in PLACED}


def prompt_class(config: dict) -> type[nn.Module]:
    kind = config['type']
    cls = PROMPTS.get(kind.removeprefix('protune_mm.')) if isinstance(kind, str) else kind
    if cls is None:
        PROMPTS.import_from_location()
        raise ValueError(
            f"prompt.type='{kind}' is unknown: known are {', '.join(PROMPTS.module_dict)}; add "
            'your own with protune_mm.registry.PROMPTS'
        )
    return cls
