"""Rewrite a stock config into a Pro-tuned one: the canonical line, from every spelling."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import get_installed_path, is_installed

from . import registry  # noqa: F401  (makes protune_mm::... paths resolve)
from .factory import _is_protuned
from .stages import LIBRARIES

DEFAULTS = dict(
    stages=None,
    prompt=None,
    lean=True,
    policy='prompts',
    affine=False,
    require_weights=False,
    base_checkpoint=None,
)
"""Options of :func:`protune_mm.ProTuned` with their defaults, in the order they are written."""
OPTIONS = tuple(DEFAULTS)

BACKBONES = ('backbone', 'image_encoder')
"""Keys of ``model`` that hold a backbone; retrieval and open-vocabulary models have the second."""
NESTED = ('module', 'detector')
"""Keys of ``model`` under which a whole model sits: test-time augmentation, semi-supervision."""

WHOLE_MODELS = {
    'TimmClassifier': "TimmClassifier is one network: use ImageClassifier with type='TIMMBackbone'",
    'HuggingFaceClassifier': (
        'HuggingFaceClassifier is one network: use ImageClassifier with the backbone of MMPretrain '
        'or timm that has this architecture'
    ),
}
"""Models without a backbone of their own, and what to use instead."""

_SHIPPED = Path(__file__).parent / '.mim'


def overlay() -> str:
    """Path of the overlay base.

    Returns:
        str: for ``_base_ = [stock, __import__('protune_mm').overlay()]``; the Pro-tuned model
        then comes from the Runner, see the README's table of spellings.
    """
    return str(_SHIPPED / 'configs' / '_base_' / 'protune.py')


def protune_config(cfg: Config, **options: Any) -> Config:
    """Write the canonical line into ``cfg.model``.

    Args:
        cfg: a config with a stock or an already Pro-tuned backbone, changed in place.
        **options: any of ``stages``, ``prompt``, ``lean``, ``policy``, ``affine``,
            ``require_weights`` and ``base_checkpoint``, see :func:`protune_mm.protune`; only those
            given are written.

    Returns:
        Config: the same object.

    Raises:
        ValueError: an unknown option, a config without a backbone, or one that is Pro-tuned
            already with other options. ``cfg`` is unchanged then.
    """
    unknown = [key for key in options if key not in OPTIONS]
    if unknown:
        raise ValueError(f"option '{unknown[0]}' is unknown: known are {', '.join(OPTIONS)}")
    backbones = [backbone for _, backbone in config_backbones(cfg)]
    if not backbones:
        kind = str((cfg.get('model') or {}).get('type', '')).rpartition('.')[2]
        why = WHOLE_MODELS.get(kind, 'there is nothing to Pro-tune')
        raise ValueError(f'{cfg.filename or "the config"} has no model.backbone with a type: {why}')
    for backbone in backbones:
        if _is_protuned(backbone['type']):
            _same_options(backbone, options)
    for backbone in backbones:
        if _is_protuned(backbone['type']):
            continue
        # `type` keeps its place and `base` comes last, as when a child config is merged.
        base = backbone['type']
        backbone['type'] = 'protune_mm.ProTuned'
        # A class, as pure-Python configs have it, cannot be dumped below `base`.
        named = isinstance(base, str)
        backbone['base'] = base if named else f'{base.__module__}.{base.__qualname__}'
        for key in OPTIONS:
            if key in options:
                backbone[key] = options[key]
    return cfg


def _same_options(backbone: dict, options: dict) -> None:
    has = {key: backbone.get(key, DEFAULTS[key]) for key in OPTIONS}
    differs = next((key for key in options if options[key] != has[key]), None)
    if differs is not None:
        raise ValueError(
            f'the config is Pro-tuned already, with {differs}={has[differs]!r}; it cannot be '
            f'Pro-tuned again with {differs}={options[differs]!r}: change that key in the config'
        )


def config_backbones(cfg: Config) -> Iterator[tuple[str, dict]]:
    """Dotted name and config of every backbone in ``cfg.model`` that downstream training tunes."""
    pending = [('model', cfg.get('model'))]
    while pending:
        name, model = pending.pop(0)
        if not isinstance(model, dict):
            continue
        for key in BACKBONES:
            backbone, path = model.get(key), f'{name}.{key}'
            if isinstance(backbone, list | tuple) and backbone:
                backbone, path = backbone[0], f'{path}.0'  # The neck follows it.
            if isinstance(backbone, dict) and 'type' in backbone:
                yield path, backbone
        pending += [(f'{name}.{key}', model.get(key)) for key in NESTED]


def policies(cfg: Config) -> set[str]:
    """Policies of a config's Pro-tuned backbones."""
    return {
        backbone.get('policy', 'prompts')
        for _, backbone in config_backbones(cfg)
        if _is_protuned(backbone['type'])
    }


def is_protuned(cfg: Config) -> bool:
    """Whether a config's model has a Pro-tuned backbone (any policy)."""
    return bool(policies(cfg))


def resolve(cfg: Config) -> Config:
    """Turn the overlay's ``protune`` key into the canonical line; idempotent.

    Args:
        cfg: a config, changed in place.

    Returns:
        Config: the same object, without the key ``protune``.

    Raises:
        ValueError: as :func:`protune_config`, or a later config overrode the backbone's ``type``
            and so dropped the prompts.
    """
    for name, backbone in config_backbones(cfg):
        if 'base' in backbone and not _is_protuned(backbone['type']):
            kind = backbone['type']
            raise ValueError(
                f"{name}.type='{kind}' overrides 'protune_mm.ProTuned' and so drops the prompts: "
                f"write base='{kind}' instead, or _delete_=True with the whole backbone to go "
                'back to stock'
            )
    if 'protune' in cfg:
        options = cfg['protune'] or {}
        if not isinstance(options, dict):
            raise ValueError(f'protune={options!r} must be a dict of options, such as dict()')
        protune_config(cfg, **options)
        cfg.pop('protune')
    return cfg


def library(cfg: Config) -> str:
    """The library a config is for: its default scope, else the home of its model's class.

    Returns:
        str: ``'mmdet'``, ``'mmseg'``, ``'mmpretrain'``, or ``'mmengine'`` where neither tells.
    """
    if cfg.get('default_scope'):
        return cfg['default_scope']
    kind = (cfg.get('model') or {}).get('type', '')
    home = kind if isinstance(kind, str) else kind.__module__
    home = home.partition('.')[0]
    return home if home in LIBRARIES else 'mmengine'


def load_config(
    path: str, *, protune: bool = False, cfg_options: dict | None = None, **options: Any
) -> Config:
    """Read a config of any of the three spellings, for tools and inferencers.

    Args:
        path: a file, or ``package::path`` such as
            ``mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py`` or
            ``protune_mm::mask_rcnn_protune_r50_coco.py``.
        protune: Pro-tune a stock config. Default False.
        cfg_options: dotted keys to values, merged first, as ``--cfg-options``. Default none.
        **options: see :func:`protune_config`; only with ``protune``.

    Returns:
        Config: with the canonical line where it is Pro-tuned.

    Raises:
        FileNotFoundError: no such file.
        ValueError: see :func:`resolve`; the config itself refuses what it was given; or
            ``cfg_options`` do not fit its values.
    """
    try:
        cfg = _read(str(path))
    except ValueError as error:
        raised_at, line = list(traceback.walk_tb(error.__traceback__))[-1]
        # mmengine runs a config's lines with globals of their own, where no module's name is.
        if raised_at.f_globals.get('__name__'):
            raise
        raise ValueError(f'{raised_at.f_code.co_filename}, line {line}: {error}') from error
    try:
        cfg.merge_from_dict(cfg_options or {})
    except TypeError as error:  # A part of what the config has as a whole: prompt='principal', say.
        raise ValueError(f'{path} with --cfg-options: {error}') from error
    resolve(cfg)
    return protune_config(cfg, **options) if protune else cfg


def _read(path: str) -> Config:
    package, _, name = path.partition('::')
    if not name:
        return Config.fromfile(path)
    if package == 'protune_mm':
        # mmengine wants a folder in the path, and our configs lie flat.
        return Config.fromfile(str(_SHIPPED / 'configs' / name))
    # Read as the base of an empty child, so that it gets the scope that a child's base gets.
    try:
        cfg = Config.fromstring(f'_base_ = [{path!r}]', '.py')
    except ValueError:
        # mmengine takes no folder such as `gn+ws` or `legacy_1.x` in the path of a base.
        found = get_installed_path(package) if is_installed(package) else ''
        file = Path(found, '.mim', 'configs', name)
        if not file.is_file():
            raise
        return Config.fromfile(str(file))
    object.__setattr__(cfg, '_filename', Config._get_cfg_path(path, '')[0])
    return cfg
