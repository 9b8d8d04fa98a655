"""What a frozen backbone does with weights that are loaded, and with the start of its prompts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from mmengine.logging import print_log
from torch import nn

from .base_weights import origin_of, wrong_base
from .identity import Identity
from .prompted import PromptedBlock
from .tuned import frozen_tensors, prompt_parameters, prompts, trained_modules, tuned_state


def check_tuned(backbone: nn.Module, told: Identity, state_dict: dict, prefix: str) -> None:
    """Refuse a checkpoint whose prompts are not those of a backbone, before anything is loaded.

    Stock loading only logs keys that are missing or of another shape.

    Args:
        backbone: a :class:`protune_mm.frozen.ProTunedBackbone`.
        told: what the checkpoint says.
        state_dict: the checkpoint's.
        prefix: name of the backbone inside the model, with a dot at its end.

    Raises:
        ValueError: they were tuned with other options, lack some parameter, or have another shape.
    """
    mine = backbone._protune.placed
    kind = type(backbone).__name__
    # The type first: where it differs, so do its places and its options.
    for key in sorted({*mine, *told.options}, key=lambda key: (key != 'prompt.type', key)):
        if mine.get(key) != told.options.get(key):
            raise ValueError(
                f'the checkpoint was tuned with {key}={told.options.get(key)!r}, but this {kind} '
                f'has {key}={mine.get(key)!r}: build it with the options of the checkpoint'
            )
    tuned = tuned_state(backbone)
    for name, tensor in tuned.items():
        there = state_dict.get(prefix + name)
        if there is None:
            raise ValueError(f"the checkpoint lacks '{prefix}{name}' of this {kind}")
        if there.shape != tensor.shape:
            raise ValueError(
                f"the checkpoint has '{prefix}{name}' of shape {tuple(there.shape)}, this {kind} "
                f'of {tuple(tensor.shape)}'
            )
    inside = tuple(f'{prefix}{name}.' for name in prompts(backbone))
    for name in state_dict:
        if name.startswith(inside) and name.removeprefix(prefix) not in tuned:
            raise ValueError(f"the checkpoint has '{name}', which this {kind} has not")


def check_weights(module: nn.Module) -> None:
    """Say loudly, once, when a frozen backbone runs on weights that were never loaded.

    Args:
        module: a :class:`protune_mm.frozen.ProTunedBackbone`.

    Raises:
        RuntimeError: weights are missing and the backbone was built with
            ``require_weights=True``.
    """
    loads = module._protune.loads
    loads.checked = True
    problem = loads.problem(module, dict(frozen_tensors(module)))
    if problem is None:
        return
    if module._protune.options.require_weights:
        loads.checked = False
        raise RuntimeError(problem)
    print_log(problem, logger='current', level=logging.WARNING)


def after_load(module: nn.Module, incompatible: Any) -> None:
    """Record what a load brought; a stock checkpoint without prompts is no cause for warnings.

    A module-level function, so that deepcopy and pickle of the backbone work.
    """
    loads = module._protune.loads
    mine = [f'{loads.prefix}{name}' for name in prompt_parameters(module)]
    missing = set(incompatible.missing_keys)
    # Some layers keep what they computed from their weights when they were last told the mode.
    module.train(any(trained.training for trained in trained_modules(module).values()))
    told, module._protune.told = module._protune.told, None
    before, module._protune.before = module._protune.before, ''
    if told is not None:
        if module.protune_fingerprint() != told.fingerprint:
            raise RuntimeError(wrong_base(module, told))
        if told.origin.get('mixture') or not module._protune.origin:
            module._protune.origin = told.origin
        frozen = {f'{loads.prefix}{name}' for name, _ in frozen_tensors(module)}
        keep = [key for key in incompatible.missing_keys if key not in frozen]
        incompatible.missing_keys[:] = keep
        missing -= frozen
    elif before and before != module.protune_fingerprint():
        # A model or a hook of the user's has loaded other weights, and nobody says from where, so
        # a checkpoint has to hold them.
        module._protune.origin = {'mixture': True}
    own = dict(frozen_tensors(module))
    loads.note(own, missing, incompatible.unexpected_keys, untold=told is None)
    if mine and missing.issuperset(mine):
        # With their buffers: statistics of a norm, or a first convolution that is not trained.
        whose = tuple(f'{loads.prefix}{path}.' for path in prompts(module))
        keep = [key for key in incompatible.missing_keys if not key.startswith(whose)]
        incompatible.missing_keys[:] = keep
        print_log(
            f'{type(module).__name__}: the loaded weights hold no prompts; the prompts keep their '
            'start',
            logger='current',
        )


_told: ContextVar[bool] = ContextVar('protune_mm_origin_told', default=False)


@contextmanager
def origin_told() -> Iterator[None]:
    """A load whose caller tells, after it, where the weights came from: a runner's."""
    token = _told.set(True)
    try:
        yield
    finally:
        _told.reset(token)


def known_base(module: nn.Module) -> str:
    """Fingerprint of a base whose origin is known, before a load that may take its place.

    Empty where it is not known, where the load is the first, or that of the base itself, or where
    its caller tells what it is of. Under FSDP, whose loads are a runner's, there are parts of
    weights only.
    """
    state = module._protune
    if _told.get() or state.initializing or state.fetching:
        return ''
    first = not (state.loads.names or state.loads.given)  # Perhaps of what `init_cfg` names.
    if first or not (state.origin or origin_of(module)):
        return ''
    if any(tensor.is_meta for _, tensor in frozen_tensors(module)):
        return ''
    return module.protune_fingerprint()


def loads_pretrained(module: nn.Module) -> bool:
    """Whether the stock initialization of a backbone loads a checkpoint."""
    rules = getattr(module, 'init_cfg', None) or []
    rules = [rules] if isinstance(rules, dict) else rules
    return any('checkpoint' in rule for rule in rules)


@contextmanager
def without_prompts(backbone: nn.Module) -> Iterator[None]:
    """Take the prompts out of a backbone for a while, out of reach of the stock initialization."""
    blocks = [m for m in backbone.modules() if isinstance(m, PromptedBlock)]
    backbone._protune_taken = [(block, block._modules.pop('prompt')) for block in blocks]
    try:
        yield
    finally:
        give_back(backbone)


def give_back(backbone: nn.Module) -> None:
    """Put back, before the end of :func:`without_prompts`, what it took out."""
    # mmengine keeps a record of all parameters while it initializes, and refuses new ones.
    record = backbone.__dict__.get('_params_init_info')
    for block, prompt in backbone.__dict__.pop('_protune_taken', ()):
        block._modules['prompt'] = prompt
        if record is None:
            continue
        for module in prompt.modules():
            module._params_init_info = record
        for parameter in prompt.parameters():
            if parameter not in record:
                record[parameter] = dict(init_info='its own start', tmp_mean_value=None)
