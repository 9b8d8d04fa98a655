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
NAMED_PROMPTS = {
    'paper': dict(type='ProTuningBlock', last='series'),
    # Better than the default after stages, and more so inside blocks: docs/study/form.md.
    'principal': dict(
        type='ProTuningBlock', init_mode='principal', act_cfg=None, fixed_down=True, scale=0.7
    ),
    # All three convolutions train, at a scale of 1.
    'principal-trained': dict(type='ProTuningBlock', init_mode='principal', act_cfg=None),
}


def prompt_config(prompt: str | dict | None) -> dict:
    """The whole config of a prompt, with the default type and how it is placed.

    Args:
        prompt: any part of it, a name from :data:`NAMED_PROMPTS`, or None.

    Raises:
        ValueError: an unknown name, or an unknown choice of how it is placed.
        TypeError: it is neither a name nor a dict.
    """
    if not isinstance(prompt, str | dict | None):
        raise TypeError(f'prompt={prompt!r} is neither a name nor a dict, such as dict(ratio=8)')
    if isinstance(prompt, str):
        if prompt not in NAMED_PROMPTS:
            raise ValueError(
                f"prompt='{prompt}' is unknown: use {', '.join(map(repr, NAMED_PROMPTS))} or a "
                "dict such as dict(type='ProTuningBlock', ratio=8)"
            )
        prompt = NAMED_PROMPTS[prompt]
    given = ConfigDict(prompt or {}).to_dict()
    if _of_default_type(given):
        given = {**DEFAULT_PROMPT, **given}
    config = {**{key: choices[0] for key, choices in PLACED.items()}, **given}
    for key, choices in PLACED.items():
        if config[key] not in choices:
            raise ValueError(
                f"prompt.{key}='{config[key]}' is unknown: use one of {', '.join(choices)}"
            )
    return config


def chooses_width(prompt: str | dict | None) -> bool:
    """Whether a config of a prompt says how wide it is, or is of another type, with its own rule.

    Args:
        prompt: as :func:`prompt_config` takes it.
    """
    if not isinstance(prompt, dict):
        return False
    return not _of_default_type(prompt) or not prompt.keys().isdisjoint(('ratio', 'hidden'))


def _of_default_type(config: dict) -> bool:
    """Whether the type that a config names, if any, is the default one, under any of its names."""
    kind = config.get('type', DEFAULT_PROMPT['type'])
    return (_find(kind) if isinstance(kind, str) else kind) is _find(DEFAULT_PROMPT['type'])


def _find(name: str) -> type[nn.Module] | None:
    """The prompt type of a name, with or without the scope, or of a class's full name.

    The latter is how pure-Python configs hand on a class.
    """
    return PROMPTS.get(name.removeprefix('protune_mm.')) or PROMPTS.get(name)


def own_options(config: dict) -> dict:
    """What of a prompt's config the prompt type itself takes."""
    return {k: v for k, v in config.items() if k != 'type' and k not in PLACED}


def refuse_after_stages(config: dict, why: str) -> None:
    """Refuse what is an option of prompts after stages alone.

    Args:
        config: of the prompt, whole.
        why: end of the message, after the option.

    Raises:
        ValueError: it has such an option.
    """
    for key, choice in (('last', 'series'), ('features', 'plain')):
        if config[key] == choice:
            raise ValueError(f"prompt.{key}='{choice}'{why}")


def prompt_class(config: dict) -> type[nn.Module]:
    """The prompt type that a config names.

    Raises:
        ValueError: it is unknown.
    """
    kind = config['type']
    cls = _find(kind) if isinstance(kind, str) else kind
    if cls is None:
        PROMPTS.import_from_location()
        raise ValueError(
            f"prompt.type='{kind}' is unknown: known are {', '.join(PROMPTS.module_dict)}; add "
            'your own with protune_mm.registry.PROMPTS'
        )
    return cls
