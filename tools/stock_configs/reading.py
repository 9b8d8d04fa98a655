"""Find the stock configs of a library, and read what their models and backbones are."""

from __future__ import annotations

import hashlib
import importlib
import json
from contextlib import AbstractContextManager
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import nn

import protune_mm
from protune_mm.config import config_backbones

WITHOUT_STRUCTURE = (
    'init_cfg',
    'frozen_stages',
    'norm_eval',
    'with_cp',
    'pretrained',
    'convert_weights',
)
"""Arguments of backbones that do not change their layers."""


def config_files(library: str) -> list[str]:
    """``library::path`` of all configs that a library ships."""
    root = home(library) / 'configs'
    found = (str(path.relative_to(root)) for path in sorted(root.rglob('*.py')))
    chosen = (name for name in found if '_base_' not in name and '__init__' not in name)
    return [f'{library}::{name}' for name in chosen]


def home(library: str) -> Path:
    """The folder that holds a library's configs, as its repository does."""
    return Path(importlib.import_module(library).__file__).parent / '.mim'


def load(file: str, protune: bool = False) -> Config:
    """A stock config, read by its path as the library's own tools do."""
    library, _, name = file.partition('::')
    cfg = protune_mm.load_config(str(home(library) / 'configs' / name), protune=protune)
    if 'model' in cfg and 'data_preprocessor' in cfg and scope_name(cfg, file) == 'mmpretrain':
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def scope_name(cfg: Config, file: str) -> str:
    """Default scope of a config; of its library where it has none."""
    return cfg.get('default_scope') or file.partition('::')[0]


def scope_of(name: str) -> AbstractContextManager:
    """Registries look in a library first."""
    return DefaultScope.overwrite_default_scope(name)


def read_config(key: str) -> dict:
    """What a config's model is, and its backbones."""
    file = file_of(key)
    row = dict(library=file.partition('::')[0], file=file)
    try:
        cfg = load(file)
        kind = (cfg.get('model') or {}).get('type')
        items = []
        for name, backbone in config_backbones(cfg):
            config = {**backbone, 'scope': scope_name(cfg, file)}
            items.append(dict(name=name, type=plain(backbone['type']), structure=structure(config)))
        return result(key, 'read', model=plain(cfg.get('model')), model_type=short_type(kind),
                      backbones=items, **row)  # fmt: skip
    except Exception as error:
        return result(key, 'unreadable', short(error), **row)


def structure(config: dict) -> object:
    """What of a backbone's config makes a difference to its layers."""
    return plain({k: v for k, v in config.items() if k not in WITHOUT_STRUCTURE})


def plain(value: object) -> object:
    """A config in JSON's types."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return f'{value.__module__}.{value.__qualname__}'
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def short_type(kind: str | type[nn.Module] | None) -> str:
    """Class name of a ``type``, however a config spells it."""
    return str(plain(kind)).rpartition('.')[2]


def digest(value: object) -> str:
    """Equal for equal configs."""
    return hashlib.sha1(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_of(key: str) -> str:
    """``library::path`` of the config that a job is about."""
    return key.split(' ')[1]


def result(key: str, status: str, reason: str = '', **more: object) -> dict:
    """One line of the results."""
    return dict(key=key, status=status, reason=reason, **more)


def short(error: Exception) -> str:
    """Type and first line of an error."""
    return f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:400]
