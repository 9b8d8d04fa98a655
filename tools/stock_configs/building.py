"""Does the rewritten config build?"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from protune_mm.config import config_backbones

from .here import adapt, in_repository
from .reading import file_of, load, result, scope_name, scope_of, short


def try_config(key: str) -> dict:
    """Build the Pro-tuned model of one config; where that fails, the stock model."""
    file = file_of(key)
    if not list(config_backbones(load(file))):
        return result(key, 'no backbone', file=file)
    for protune in (True, False):
        cfg = adapt(load(file, protune))
        try:
            with without_init():
                build(cfg, file)
        except Exception as error:
            reason = short(error)
            if protune and 'cannot be Pro-tuned' in reason:
                return result(key, 'refused', reason, file=file)
            if not protune:
                return result(key, 'stock fails', reason, file=file)
            problem = reason + '\n' + traceback.format_exc(limit=-3)
            continue
        if protune:
            return result(key, 'ok', file=file)
    return result(key, 'failed', problem, file=file)


def build(cfg: Config, file: str) -> nn.Module:
    """The model of a config, as its library builds it."""
    with scope_of(scope_name(cfg, file)), in_repository(file):
        return MODELS.build(cfg.model)


@contextlib.contextmanager
def without_init() -> Iterator[None]:
    """Leave new weights as they come: what is only built need not be initialized."""
    names = [n for n in dir(nn.init) if n.endswith('_') and not n.startswith('_')]
    stock = {name: getattr(nn.init, name) for name in names}
    for name in names:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(nn.init, name, function)
