"""One training step through a whole stock model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import traceback
from types import SimpleNamespace

import torch
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn

import protune_mm
from protune_mm.optim import wrap_constructor
from protune_mm.tuned import backbones, frozen_tensors

from .batches import batches
from .building import build
from .here import adapt
from .reading import file_of, load, result, scope_name, scope_of, short


def try_step(key: str) -> dict:
    """Train the Pro-tuned model of one config; where that fails, the stock model.

    Two steps, as behind a zero start gradients arrive in the second only: the loss is finite,
    every prompt receives a gradient, and no frozen bit moves. "stock fails": with each kind of
    data with which the Pro-tuned model raises an error, the stock model does too.
    """
    file = file_of(key)
    tuned = attempts(file, protune=True)
    if tuned == ['']:
        return result(key, 'ok', file=file)
    stock = attempts(file, protune=False)
    return result(key, *verdict(tuned, stock), file=file)


def verdict(tuned: list[str], stock: list[str]) -> tuple[str, str]:
    """Status and reason, from what went wrong with each kind of data, '' where it trained."""
    for problem, theirs in itertools.zip_longest(tuned, stock):
        # The stock model stops at data that train it, and has nothing to tell of prompts.
        if problem and not theirs:
            return 'failed', problem
        if problem and problem.startswith(OURS):
            return 'failed', problem
        if problem == '':
            return 'ok', ''
    # Some models say that they do not train; else what the usual data met.
    why = next((p for p in tuned if p.startswith('NotImplementedError')), tuned[0])
    return 'stock fails', why.splitlines()[0]


OURS = ('no gradient at', 'frozen and moved:')
"""Problems that a stock model cannot have."""


def attempts(file: str, protune: bool) -> list[str]:
    """What went wrong with each kind of generated data, up to the first that trains, ''."""
    cfg = adapt(load(file, protune))
    try:
        torch.manual_seed(0)
        model = revert_sync_batchnorm(build(cfg, file))
        # Some initialize their weights from what they were to fetch, and only so.
        with scope_of(scope_name(cfg, file)), contextlib.suppress(AttributeError):
            model.init_weights()
        own = protune_mm.tuned_parameters(model)
        for name, parameter in model.named_parameters():
            # Some layers leave memory as they find it: any number, or zeros.
            largest = parameter.abs().max()
            if not largest < 1e3 or (largest == 0 and parameter.ndim > 1 and name not in own):
                parameter.data.normal_(0, 0.01)
        model.train()
    except Exception as error:
        return [short(error)]
    problems = []
    scope = scope_name(cfg, file)
    for data in batches(scope):
        try:
            with scope_of(scope):
                problems.append(train(model, data))
        except Exception as error:
            problems.append(f'{short(error)}\n{traceback.format_exc(limit=-4)}')
        if not problems[-1] or problems[-1].startswith(OURS):
            break
    return problems


def train(model: nn.Module, data: dict) -> str:
    """Two steps on one batch; what was wrong with them, '' for nothing."""
    holder = SimpleNamespace(model=model)
    optimizer = dict(optimizer=dict(type='SGD', lr=1e-6))
    if list(backbones(model).values()):
        optimizer = wrap_constructor(optimizer)
    wrapper = Runner.build_optim_wrapper(holder, optimizer)
    before = {name: tensor.clone() for name, tensor in frozen_tensors(model)}
    hub = MessageHub.get_current_instance()  # Some augmentations of batches ask how far we are.
    for name in ('iter', 'epoch'):
        hub.update_info(name, 0)
    own = protune_mm.tuned_parameters(model)
    # A teacher's prompts do not train.
    lost = {name for name, parameter in own.items() if parameter.requires_grad}
    hooks = [
        own[name].register_hook(lambda grad, name=name: lost.discard(name)) for name in set(lost)
    ]
    for _ in range(2):
        logs = model.train_step(copy.deepcopy(data), wrapper)
    for hook in hooks:
        hook.remove()
    loss = logs['loss']
    if not torch.isfinite(loss):
        return f'the loss is {loss.item()}'
    moved = [n for n, t in frozen_tensors(model) if not torch.equal(t, before[n])]
    if moved:
        return f'frozen and moved: {moved[0]}'
    return f'no gradient at {min(lost)}' if lost else ''
