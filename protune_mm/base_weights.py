"""Where the weights of a frozen base come from, and how a backbone gets them when it loads prompts.

A checkpoint of prompts alone says which base they belong to. Stock ``test.py`` and the inferencers
build a model and load that file, nothing else: so the backbone itself fetches its base.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict
from mmengine.logging import print_log
from mmengine.runner.checkpoint import CheckpointLoader, load_state_dict
from torch import nn

from .identity import Identity, describe

BASE = 'PROTUNE_BASE'
"""Environment variable: path or address of the base, instead of what a checkpoint names."""
ALLOW = 'PROTUNE_ALLOW_ORIGIN'
"""Environment variable: set to 1 to follow any address that a checkpoint names."""
ZOO = (
    'torchvision://',
    'modelzoo://',
    'open-mmlab://',
    'openmmlab://',
    'mmcls://',
    'https://download.openmmlab.com/',
    'https://download.pytorch.org/',
    'https://github.com/SwinTransformer/storage/releases/download/',
    'https://github.com/whai362/PVT/releases/download/',
)
"""Addresses that are followed without asking: the model zoos of PyTorch and OpenMMLab, and the
releases that MMDetection's configs of Swin and PVT read."""

_own_files: ContextVar[bool] = ContextVar('protune_mm_own_files', default=False)


@contextmanager
def own_files(trust: bool = True) -> Any:
    """Trust local paths in checkpoints for a while: a training resumes what it wrote itself."""
    token = _own_files.set(trust)
    try:
        yield
    finally:
        _own_files.reset(token)


def origin_of(backbone: nn.Module) -> dict:
    """Where a backbone's own config says that its weights come from; empty: nowhere."""
    rules = getattr(backbone, 'init_cfg', None) or []
    for rule in [rules] if isinstance(rules, dict) else rules:
        address = rule.get('checkpoint')
        if address:
            prefix = rule.get('prefix')
            return dict(
                checkpoint=whole_address(address), **(dict(prefix=prefix) if prefix else {})
            )
    return {}


def whole_address(address: str) -> str:
    """A path that holds in another folder, too; addresses stay."""
    return address if '://' in address else str(Path(address).expanduser().absolute())


def candidates(backbone: nn.Module, told: Identity) -> tuple[list[dict], str]:
    """Where to look for the base of a checkpoint, the best first, and what was left out.

    Args:
        backbone: the Pro-tuned backbone.
        told: what the checkpoint says.

    Returns:
        tuple: origins, and a sentence about the checkpoint's own address where it is not followed.
    """
    given = _explicit(backbone)
    if given:
        return _forms(given, told.origin), ''
    own, address = origin_of(backbone), told.origin.get('checkpoint', '')
    if backbone._protune.initializing:
        # What `init_cfg` names is the very file that is being loaded, and holds no base.
        if own.get('checkpoint') == address:
            address = ''
        own = {}
    if not address or own.get('checkpoint') == address:
        return [own] if own else [], ''
    if address.startswith(ZOO) or os.environ.get(ALLOW) == '1' or _is_own(address):
        return [told.origin, *([own] if own else [])], ''
    refused = (
        f' The checkpoint names {address}, which is of no model zoo: set {ALLOW}=1 to follow it.'
    )
    return [own] if own else [], refused


def _explicit(backbone: nn.Module) -> str | None:
    return os.environ.get(BASE) or backbone._protune.base_checkpoint


def _forms(address: str, origin: dict) -> list[dict]:
    """How a file that the user names may hold a base: as the checkpoint's own, or in another form.

    It may be of a whole model, whose backbone lies below ``backbone.``, or of a backbone alone,
    where the checkpoint's own is the other.

    Args:
        address: of the file.
        origin: what the checkpoint says of its own.
    """
    recorded = dict(origin, checkpoint=address)
    part = dict(checkpoint=address, model=True)
    forms = [recorded, dict(part, prefix='backbone.'), part]
    return [form for i, form in enumerate(forms) if form not in forms[:i]]


def _is_own(address: str) -> bool:
    return _own_files.get() and '://' not in address and Path(address).is_file()


def fetch(backbone: nn.Module, origin: dict) -> None:
    """Load a base into a Pro-tuned backbone, as its library would.

    Args:
        backbone: a :class:`protune_mm.frozen.ProTunedBackbone`; its prompts stay as they are.
        origin: see :class:`Identity`.

    Raises:
        RuntimeError: the file cannot be read.
    """
    print_log(f'fetching the base from {origin["checkpoint"]}', logger='current')
    backbone._protune.fetching = origin['checkpoint']
    try:
        if origin.get('model') or not hasattr(backbone, 'init_weights'):
            _load_part(backbone, origin['checkpoint'], origin.get('prefix', ''))
        else:
            _initialize(backbone, origin)
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError) as error:
        raise RuntimeError(
            f'the base of {type(backbone).__name__} cannot be read from {origin["checkpoint"]}: '
            f'{error}'
        ) from error
    finally:
        backbone._protune.fetching = ''


def _initialize(backbone: nn.Module, origin: dict) -> None:
    """Let the library load the weights, which may convert keys and resize embeddings on the way."""
    rule = ConfigDict(type='Pretrained', checkpoint=origin['checkpoint'])
    if origin.get('prefix'):
        rule.prefix = origin['prefix']
    before = backbone.init_cfg if hasattr(backbone, 'init_cfg') else None
    was_init = getattr(backbone, '_is_init', False)
    backbone.init_cfg = rule
    backbone._is_init = False
    # Its line for each parameter is of interest when a model is made, not when one is read.
    backbone._dump_init_info = lambda *_: None
    # Prompts have their values already, or get them right after.
    prompts_set, backbone._protune.initialized = backbone._protune.initialized, True
    try:
        backbone.init_weights()
    finally:
        backbone.init_cfg = before
        backbone._is_init = was_init
        del backbone._dump_init_info
        backbone._protune.initialized = prompts_set


def _load_part(backbone: nn.Module, address: str, prefix: str) -> None:
    """Load what a file of a whole model holds of its backbone."""
    loaded = CheckpointLoader.load_checkpoint(address, map_location='cpu', logger='current')
    state = loaded.get('state_dict', loaded)
    state = {key.removeprefix('module.'): value for key, value in state.items()}
    part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    if part.keys().isdisjoint(backbone.state_dict()):
        raise ValueError(f"it has none of the backbone's weights below '{prefix}'")
    load_state_dict(backbone, part, strict=False, logger='current')


def provide(backbone: nn.Module, told: Identity) -> None:
    """Make a backbone run on the base that a checkpoint of prompts was tuned on.

    Args:
        backbone: a :class:`protune_mm.frozen.ProTunedBackbone`.
        told: what the checkpoint says.

    Raises:
        RuntimeError: the base is another one, or cannot be had.
    """
    state = backbone._protune
    if backbone.protune_fingerprint() == told.fingerprint:
        return
    if state.fetching:
        raise RuntimeError(f'{state.fetching} holds prompts, and not their base')
    if any(parameter.is_meta for parameter in backbone.parameters()):
        origin = {key: told.origin.get(key) for key in ('checkpoint', 'prefix')}
        raise RuntimeError(
            wrong_base(backbone, told) + f' FSDP has split its weights, so name the base in the '
            f'config: backbone=dict(init_cfg=dict(type="Pretrained", **{origin}))'
        )
    found, refused = candidates(backbone, told)
    # What a config loads first (`init_cfg`) may not be what the training began with (`load_from`).
    again = _explicit(backbone) is not None or _own_files.get()
    if state.loads.given or (state.loads.names and not again):
        raise RuntimeError(wrong_base(backbone, told) + refused)
    if not found:
        raise RuntimeError(
            f'the checkpoint holds prompts only, tuned on the base {told.base()}, and '
            f'{type(backbone).__name__} has no weights yet.{refused} Name the base in the config, '
            f'backbone=dict(base_checkpoint=...), or in {BASE}'
        )
    failed, read = None, False
    for origin in found:
        try:
            fetch(backbone, origin)
        except RuntimeError as error:
            failed = failed or error
            continue
        state.origin, read = origin, True
        if backbone.protune_fingerprint() == told.fingerprint:
            return
    if not read:
        raise failed
    raise RuntimeError(wrong_base(backbone, told) + refused) from failed


def wrong_base(backbone: nn.Module, told: Identity) -> str:
    """Message that names the base of a checkpoint and that of a backbone."""
    here = describe(backbone.protune_fingerprint(), backbone._protune.origin or origin_of(backbone))
    return (
        f'the checkpoint was tuned on another base: {told.base()}; {type(backbone).__name__} here '
        f'has {here}: load the same base first, or name it in {BASE}.'
    )
