"""The optimizer of Pro-tuning: trainable parameters only, prompts in groups of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import (
    BaseOptimWrapper,
    DefaultOptimWrapperConstructor,
    LinearLR,
    OptimWrapper,
)
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT
from torch import nn
from torch.optim import Optimizer

from .registry import OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS, type_name
from .tuned import tuned_parameters

DEFAULT_CONSTRUCTOR = 'DefaultOptimWrapperConstructor'
PROMPT = 'prompt'
"""Key of the parameter groups of prompts."""


def wrap_constructor(optim_wrapper: dict) -> dict:
    """Put :class:`ProTuneOptimWrapperConstructor` around the constructor a config names.

    Args:
        optim_wrapper: the config's ``optim_wrapper``, unchanged.

    Returns:
        dict: a copy that names our constructor and hands it the stock one; itself where it
        does so already.
    """
    stock = optim_wrapper.get('constructor', DEFAULT_CONSTRUCTOR)
    ours = ProTuneOptimWrapperConstructor
    if stock is ours or stock in (f'protune_mm.{ours.__name__}', f'{__name__}.{ours.__name__}'):
        return optim_wrapper
    wrapped = dict(optim_wrapper)
    wrapped['constructor'] = f'protune_mm.{ours.__name__}'
    wrapped['paramwise_cfg'] = {**(optim_wrapper.get('paramwise_cfg') or {}), 'constructor': stock}
    return wrapped


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ProTuneOptimWrapperConstructor:
    """Wrap any optimizer wrapper constructor so that it never sees frozen weights or prompts.

    The stock constructor runs on the neck and head as it would, with the config's multipliers
    and layer decay, which so cannot reach prompts. Prompts follow in two parameter groups:
    convolution weights, and norms, biases and scales without weight decay. They have the key
    ``prompt``, by which :class:`PromptWarmup` knows them.

    Args:
        optim_wrapper_cfg: as for the stock constructor.
        paramwise_cfg: as for the stock constructor, and besides

            - ``constructor``: type of the stock constructor. Default mmengine's default one.
            - ``prompt_lr_mult``: factor on the base learning rate for prompts. Default 1.
            - ``prompt_decay_mult``: factor on the base weight decay for the convolution weights
              of prompts. Default 1.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        rules = dict(paramwise_cfg or {})
        self.lr_mult = rules.pop('prompt_lr_mult', 1.0)
        self.decay_mult = rules.pop('prompt_decay_mult', 1.0)
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.stock = dict(
            type=rules.pop('constructor', DEFAULT_CONSTRUCTOR),
            optim_wrapper_cfg=optim_wrapper_cfg,
            paramwise_cfg=rules or None,
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper.

        Args:
            model: the model, wrapped (DDP) or not.

        Returns:
            OptimWrapper: its optimizer holds exactly the parameters that require a gradient.

        Raises:
            ValueError: nothing in the model is trainable, or the stock constructor builds more
                than one optimizer.
        """
        model = getattr(model, 'module', model)
        tuned_names = {id(p): name for name, p in tuned_parameters(model).items()}
        groups = self._prompt_groups(model)
        prompts = {id(p) for group in groups for p in group['params']}
        others = any(p.requires_grad and id(p) not in prompts for p in model.parameters())
        if not others and not groups:
            raise ValueError('no parameter of the model is trainable: there is nothing to optimize')
        if not others:
            # No neck or head to run the stock rules on: the prompts are all there is.
            wrapper = DefaultOptimWrapperConstructor(self.optim_wrapper_cfg)(
                nn.ParameterList([p for group in groups for p in group['params']])
            )
            wrapper.optimizer.param_groups.clear()
        else:
            with _hidden(model, prompts):
                wrapper = self._build_stock(model)
        # Layer-decay constructors name the parameters of their groups; since torch 2.7 either all
        # groups of an optimizer are named or none.
        named = any('param_names' in group for group in wrapper.optimizer.param_groups)
        # What a config leaves out the optimizer has a default for.
        usual = {**wrapper.optimizer.defaults, **self.optim_wrapper_cfg['optimizer']}
        for group in groups:
            if usual.get('lr') is not None:
                group['lr'] = usual['lr'] * self.lr_mult
            if usual.get('weight_decay') is not None:
                group.setdefault('weight_decay', usual['weight_decay'] * self.decay_mult)
            names = {'param_names': [tuned_names[id(p)] for p in group['params']]} if named else {}
            wrapper.optimizer.add_param_group({**group, **names})
        return wrapper

    def _build_stock(self, model: nn.Module) -> OptimWrapper:
        try:
            wrapper = ROOT.build(self.stock)(model)
        except ValueError as error:
            if 'empty parameter list' not in str(error):
                raise
            wrapper = None
        if not hasattr(wrapper, 'optimizer'):
            raise ValueError(
                f'{self.stock["type"]} builds several optimizers, or one for a frozen part: use a '
                'constructor of one optimizer for the whole model; what is tuned in the backbone '
                'has groups of its own (paramwise_cfg.prompt_lr_mult)'
            )
        return wrapper

    def _prompt_groups(self, model: nn.Module) -> list[dict]:
        decayed, plain = [], []
        for parameter in tuned_parameters(model).values():
            if parameter.requires_grad:
                # A scale for each channel may have the shape (C, 1, 1).
                shape = tuple(parameter.shape)
                scale = parameter.ndim <= 1 or (parameter.ndim == 3 and shape[1:] == (1, 1))
                (plain if scale else decayed).append(parameter)
        weights = {'params': decayed, PROMPT: True}
        rest = {'params': plain, PROMPT: True, 'weight_decay': 0.0}
        return [group for group in (weights, rest) if group['params']]


@PARAM_SCHEDULERS.register_module()
class PromptWarmup(LinearLR):
    """Raise the learning rate of prompts from near zero, while the head trains as it would.

    A head that starts at random sends prompts gradients that mean little; a longer warm-up for
    them lets it settle first. It multiplies what the other schedulers of the config do, whose own
    warm-up goes on counting for all parameters::

        param_scheduler = [dict(type='protune_mm.PromptWarmup', end=1000), *stock_schedulers]

    Not beside schedulers that add to a rate or set it anew, which :data:`NOT_FACTORS` names: our
    runner refuses them.

    Args:
        optimizer: optimizer or its wrapper, built by :class:`ProTuneOptimWrapperConstructor`.
        end: when prompts reach their full rate, in steps (epochs where ``by_epoch``).
        begin: when their warm-up begins. Default 0.
        start_factor: factor on their rate at ``begin``, above 0 and at most 1. Default 0.001.
        by_epoch: count epochs instead of steps. Default False.
        **kwargs: as of mmengine's ``LinearLR``.

    Raises:
        ValueError: the optimizer holds no prompts, ``start_factor`` is out of range, or ``end``
            comes less than two steps after ``begin``, before anything could rise.
    """

    def __init__(
        self,
        optimizer: Optimizer | BaseOptimWrapper,
        end: int,
        begin: int = 0,
        start_factor: float = 0.001,
        by_epoch: bool = False,
        **kwargs: object,
    ) -> None:
        if not 0 < start_factor <= 1:
            raise ValueError(f'start_factor={start_factor}: use a factor above 0 and at most 1')
        if end - begin < 2:
            raise ValueError(
                f'PromptWarmup: begin={begin} and end={end} leave nothing to rise in: use an end '
                'at least 2 after the begin, or steps in place of epochs'
            )
        # By position: an optimizer's state of before, loaded later, may lack the key.
        self.prompts = [i for i, group in enumerate(optimizer.param_groups) if group.get(PROMPT)]
        if not self.prompts:
            raise ValueError(
                'PromptWarmup: the optimizer holds no prompts: use it with a Pro-tuned backbone '
                "whose policy trains a part of it, and optim_wrapper's constructor "
                f"'protune_mm.{ProTuneOptimWrapperConstructor.__name__}'"
            )
        super().__init__(
            optimizer, begin=begin, end=end, start_factor=start_factor, by_epoch=by_epoch, **kwargs
        )

    def _get_value(self) -> list[float]:
        values = super()._get_value()
        return [
            values[i] if i in self.prompts else group[self.param_name]
            for i, group in enumerate(self.optimizer.param_groups)
        ]


def without_warmup(schedulers: Any) -> Any:
    """Configs of schedules without :class:`PromptWarmup`, for a model that trains no prompts.

    Args:
        schedulers: one, a list, or either by optimizer, as a config has them.
    """
    if isinstance(schedulers, dict) and 'type' not in schedulers:
        return {name: without_warmup(each) for name, each in schedulers.items()}
    if not isinstance(schedulers, dict | list | tuple):
        return schedulers
    each = [schedulers] if isinstance(schedulers, dict) else schedulers
    kept = [
        one
        for one in each
        if not (isinstance(one, dict) and type_name(one) == PromptWarmup.__name__)
    ]
    if len(kept) < len(each):
        print_log('PromptWarmup is left out: the policy trains no prompts', logger='current')
        return kept
    return schedulers


NOT_FACTORS = ('QuadraticWarmup', 'OneCycle', 'CosineRestart')
"""How schedulers are named that add to a rate or set it anew, where others multiply it."""


def check_warmup(schedulers: object) -> None:
    """Refuse a :class:`PromptWarmup` beside schedulers that leave nothing, or too much, of it.

    Args:
        schedulers: built ones, in a list, or in lists by optimizer.

    Raises:
        ValueError: there is one.
    """
    found = schedulers.values() if isinstance(schedulers, dict) else [schedulers]
    for group in found:
        for warm, scheduler in itertools.product(group, group):
            if not isinstance(warm, PromptWarmup) or scheduler.param_name != warm.param_name:
                continue
            kind = type(scheduler).__name__
            after = scheduler.by_epoch == warm.by_epoch and scheduler.begin >= warm.end
            if any(name in kind for name in NOT_FACTORS) and not after:
                raise ValueError(
                    f'PromptWarmup multiplies rates, which {kind} adds to or sets anew: use '
                    'LinearLR and CosineAnnealingLR beside it, say'
                )


@contextmanager
def _hidden(model: nn.Module, prompts: set[int]) -> Iterator[None]:
    """Take frozen parameters and prompts out of a model's parameter lists for a while.

    Stock constructors log one warning for each frozen parameter, or optimize it; without
    ``paramwise_cfg`` they do not even look at ``requires_grad``.
    """
    full = {module: module._parameters for module in model.modules()}
    try:
        for module, parameters in full.items():
            module._parameters = {
                key: parameter
                for key, parameter in parameters.items()
                if parameter is None or (parameter.requires_grad and id(parameter) not in prompts)
            }
        yield
    finally:
        for module, parameters in full.items():
            module._parameters = parameters
