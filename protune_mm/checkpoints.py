"""Checkpoints of what trains alone, and of the base they belong to.

Frozen weights are the same in every checkpoint of a training; a file holds what trains (prompts,
neck, head and their buffers), the optimizer, the state of the loop, and the identity of the base.
"""

from __future__ import annotations

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor, nn

from .base_weights import origin_of, own_files, provide, whole_address
from .identity import KEY, Identity
from .loading import check_tuned, loads_pretrained
from .registry import HOOKS
from .tuned import backbones, frozen_keys, frozen_tensors, is_teacher, unwrapped
from .weights import LoadRecord

INFO = 'protune_mm'
"""Key of a checkpoint: names of what trained, and the random state."""


def identities(model: nn.Module, teachers: bool = True) -> dict[str, Tensor]:
    """What a model's backbones were tuned on, as tensors for its ``state_dict``.

    Args:
        model: the model.
        teachers: those of backbones that follow another, too. Default True.
    """
    found: dict[str, Tensor] = {}
    for name, backbone in backbones(model).items():
        if not teachers and is_teacher(backbone):
            continue
        state = backbone._protune
        origin = dict(state.origin or origin_of(backbone))
        if is_mixture(backbone):
            origin['mixture'] = True
        told = Identity(backbone.protune_fingerprint(), origin, state.placed)
        found |= told.tensors(below(name))
    return found


def is_mixture(backbone: nn.Module) -> bool:
    """Whether some frozen weights came from a file and others had a random start.

    Plugins that no ImageNet checkpoint has, say: nobody could fetch all of them again.
    """
    loads, origin = backbone._protune.loads, backbone._protune.origin
    lacking = bool(loads.names) and loads.problem(backbone, _frozen_parameters(backbone))
    return bool(lacking or origin.get('mixture'))


def _frozen_parameters(backbone: nn.Module) -> dict[str, Tensor]:
    """What may start at random: buffers start at a value of their own."""
    return {
        name: tensor
        for name, tensor in frozen_tensors(backbone)
        if isinstance(tensor, nn.Parameter)
    }


def below(name: str) -> str:
    """What the keys of a module of this name begin with; of the model itself, nothing."""
    return f'{name}.' if name else ''


def tuned_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of a model without frozen weights, with the identity of its base.

    ``load_state_dict`` and mmengine's ``load_checkpoint`` of the same model take it: the backbone
    checks that it runs on the same base, or fetches it. With PyTorch's own ``load_state_dict``,
    too, nothing counts as missing. Frozen weights of which a part had a random start stay in it.

    Args:
        model: a Pro-tuned backbone or anything that contains one, wrapped (DDP) or not.

    Raises:
        ValueError: a backbone was given a part that trains after it was Pro-tuned.
    """
    model = unwrapped(model)
    for name, backbone in backbones(model).items():
        for key, tensor in frozen_tensors(backbone):
            if tensor.requires_grad:
                raise ValueError(
                    f"'{below(name)}{key}' requires a gradient, and is of a backbone that is "
                    'frozen: Pro-tune the backbone alone, and keep what trains, a head say, '
                    'outside of it'
                )
    leave = frozen_keys(model)
    for name, backbone in backbones(model).items():
        if is_mixture(backbone):
            leave = leave - {below(name) + key for key in frozen_keys(backbone)}
    state = {key: value for key, value in model.state_dict().items() if key not in leave}
    return state | identities(model)


def add_frozen(model: nn.Module, state_dict: dict, prefix: str = '') -> None:
    """Put the frozen weights of a model into a ``state_dict`` without them.

    Args:
        model: a Pro-tuned backbone or anything that contains one.
        state_dict: changed in place; what it has stays.
        prefix: of all keys.
    """
    mine = model.state_dict()
    for key in frozen_keys(model):
        state_dict.setdefault(prefix + key, mine[key])


@HOOKS.register_module()
class FillBaseHook(Hook):
    """Before a checkpoint of prompts is loaded, put the frozen weights of this model into it.

    It runs before the EMA hook, whose average is a copy of the model from before its weights were
    loaded.
    """

    priority = 'HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check that it fits this model, fetch the base if need be, and fill."""
        model = unwrapped(runner.model)
        state = checkpoint.get('state_dict')
        if not isinstance(state, dict):
            return
        if runner._resume:
            check_trainable(model, checkpoint)
        for name, backbone in backbones(model).items():
            prefix = below(name)
            told = Identity.pop(dict(state), prefix)
            if told is None:
                continue
            check_tuned(backbone, told, state, prefix)
            if any(prefix + key not in state for key in frozen_keys(backbone)):
                with own_files(runner._resume):
                    provide(backbone, told)
            # Of no other backbone: a model that renames keys while it loads, as MMDetection's
            # semi-supervised ones do, goes by those that are there.
            add_frozen(backbone, state, prefix)
            if 'ema_state_dict' in checkpoint:
                add_frozen(backbone, checkpoint['ema_state_dict'], f'module.{prefix}')


@HOOKS.register_module()
class StockModelHook(Hook):
    """Refuse a checkpoint of a Pro-tuned model that a stock one cannot use.

    mmengine would drop its prompts, leave the backbone at random, and say so in a warning.
    """

    priority = 'HIGH'

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at it before it is loaded.

        Raises:
            ValueError: it has prompts, or nobody has given the model the weights that it lacks.
        """
        model, state = unwrapped(runner.model), checkpoint.get('state_dict')
        if not isinstance(state, dict) or backbones(model):
            return
        end = f'{KEY}.fingerprint'
        for key in [key for key in state if f'.{key}'.endswith(f'.{end}')]:
            prefix = key.removesuffix(end)
            told = Identity.pop(dict(state), prefix)
            has_prompts = 'prompt.type' in told.options
            lacks = any(k.startswith(prefix) and k not in state for k in model.state_dict())
            if has_prompts or (lacks and not _has_loaded(model, prefix)):
                what = f'its {told.options["prompt.type"]}' if has_prompts else 'the frozen weights'
                raise ValueError(
                    f"the checkpoint is of a model whose '{prefix.rstrip('.')}' was Pro-tuned, and "
                    f'this one is stock, so {what} would be left out: add --protune, or use the '
                    'config that it was trained with'
                )


def _has_loaded(model: nn.Module, prefix: str) -> bool:
    """Whether the initialization of a model has loaded a checkpoint into a part of it."""
    path = prefix.rstrip('.')
    held = [model, *(module for name, module in model.named_modules() if name == path)]
    return getattr(model, 'is_init', False) and any(map(loads_pretrained, held))


@HOOKS.register_module()
class TunedCheckpointHook(Hook):
    """Keep frozen weights out of checkpoints, and say in them what they were tuned on.

    Args:
        tuned_only: leave frozen weights out. Default True.
    """

    # After EMAHook, which adds its average, and after the guard.
    priority = 'LOWEST'

    def __init__(self, tuned_only: bool = True) -> None:
        self.tuned_only = tuned_only
        self._told = False

    def before_run(self, runner: Runner) -> None:
        """Let the averaged model of an EMA hook use the frozen weights of the model itself."""
        for hook in runner.hooks:
            if hasattr(hook, 'ema_model') and hasattr(hook, 'src_model'):
                share_frozen(hook.src_model, hook.ema_model)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Filter the checkpoint.

        Raises:
            RuntimeError: a trained weight is no number any more.
        """
        model = unwrapped(runner.model)
        check_finite(model, checkpoint['state_dict'])
        leave = frozen_keys(model) - self._of_unknown_origin(runner, model)
        leave = leave if self.tuned_only else set()
        told = identities(model, teachers=False)
        for key, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
            state = checkpoint.get(key)
            if state is None:
                continue
            for name in leave:
                state.pop(prefix + name, None)
            state.update({prefix + name: tensor for name, tensor in told.items()})
        info = checkpoint.setdefault(INFO, {})
        info['trainable'] = trainable(model)

    def _of_unknown_origin(self, runner: Runner, model: nn.Module) -> set[str]:
        """Keys of backbones whose weights nobody could fetch again; they stay in the file."""
        keep: set[str] = set()
        whole = bool(origin_of(model))  # Its `init_cfg` comes after that of the backbone.
        for name, backbone in backbones(model).items():
            state = backbone._protune
            own = state.base_checkpoint or (not whole and origin_of(backbone))
            known = (state.origin or own) and not is_mixture(backbone)
            if known and not is_teacher(backbone):
                continue
            keep |= {f'{name}.{key}'.lstrip('.') for key in frozen_keys(backbone)}
        if keep and self.tuned_only and not self._told:
            self._told = True
            runner.logger.warning(
                'the weights of a frozen backbone could not be fetched again (they came from no '
                'file or only in part, were loaded by neither init_cfg nor the runner, or follow '
                'those of another): checkpoints hold them, too'
            )
        return keep


def trainable(model: nn.Module) -> list[str]:
    """Names of all parameters of a model that train."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def check_finite(model: nn.Module, state_dict: dict) -> None:
    """Refuse to save weights that are no numbers: the last checkpoint is the better one.

    Raises:
        RuntimeError: some trained weight is infinite or no number.
    """
    for name in trainable(model):
        if name in state_dict and not bool(torch.isfinite(state_dict[name]).all()):
            raise RuntimeError(
                f"'{name}' is infinite or no number: the training has diverged, and no checkpoint "
                'is written over the last good one; use a lower learning rate'
            )


def check_trainable(model: nn.Module, checkpoint: dict) -> None:
    """Refuse to resume the optimizer of one set of parameters with another.

    Raises:
        ValueError: what trains has changed since the checkpoint.
    """
    before = checkpoint.get(INFO, {}).get('trainable')
    now = trainable(model)
    if before is None or before == now:
        return
    gone, new = [n for n in before if n not in now], [n for n in now if n not in before]
    parts = [
        f'{len(names)} {what}, first {names[0]}'
        for names, what in ((gone, 'no longer train'), (new, 'train now'))
        if names
    ]
    raise ValueError(
        f'the checkpoint cannot be resumed: of its {len(before)} trained parameters '
        f'{"; ".join(parts) or "the order has changed"}: resume with the config it was trained '
        'with, or start anew from it with load_from'
    )


def share_frozen(model: nn.Module, averaged: nn.Module) -> None:
    """Let an averaged copy of a model hold the model's own frozen weights.

    The average of equal weights is that weight, but for rounding: so it need not be computed, nor
    kept twice.

    Args:
        model: the model.
        averaged: mmengine's ``BaseAveragedModel`` of it, changed in place.
    """
    mine = dict(frozen_tensors(model))
    theirs = dict(frozen_tensors(averaged.module))
    for name, tensor in mine.items():
        if name in theirs and theirs[name].device == tensor.device:
            theirs[name].data = tensor.data
            averaged.avg_parameters.pop(name, None)


def note_origin(model: nn.Module, checkpoint: dict, address: str) -> None:
    """Note, after a stock checkpoint was loaded, that the frozen weights came from it.

    Args:
        model: the model, wrapped or not.
        checkpoint: what was loaded.
        address: from where.
    """
    model = unwrapped(model)
    state = checkpoint.get('state_dict', checkpoint)
    held = {key.removeprefix('module.') for key in state}
    for name, backbone in backbones(model).items():
        prefix = below(name)
        if f'{prefix}{KEY}.origin' in held:
            continue
        loads, frozen = backbone._protune.loads, dict(frozen_tensors(backbone))
        known = {key for key in frozen if prefix + key in held and key not in loads.misshapen}
        if known:
            origin = dict(checkpoint=whole_address(address), prefix=prefix, model=True)
            of_it = LoadRecord(given=False, names=known, misshapen=loads.misshapen)
            if of_it.problem(backbone, _frozen_parameters(backbone)):
                # With what was there before, from another file or at random, it is of no one file.
                origin['mixture'] = True
            backbone._protune.origin = origin
        elif loads.untold:
            # The model has renamed keys, so nobody could find them in the file again.
            backbone._protune.origin = {'mixture': True}
