"""The hook that proves, while training, that frozen means exact."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from .identity import digest
from .loading import check_weights
from .prompts.convs import fixed_layers
from .registry import HOOKS
from .report import parameter_line
from .tuned import (
    backbones,
    forks,
    frozen_modules,
    frozen_tensors,
    is_teacher,
    prompt_parameters,
    prompts,
    unwrapped,
)
from .weights import BY_SIZE


@HOOKS.register_module()
class FrozenGuardHook(Hook):
    """Fail the training if a frozen tensor moved or a prompt does not learn.

    Before training: no frozen tensor asks for a gradient, no frozen module is in training mode,
    the frozen weights are there, and a digest of every frozen tensor is taken. After the first
    iteration: every prompt parameter got a gradient. At the start of every epoch and of every
    validation: modes and version counters again, which costs nothing. After training: every
    digest again, over every bit. In every checkpoint the frozen tensors are the model's own: an
    EMA that computes ``a * (1 - m) + b * m`` drifts by rounding even where a equals b. Where
    MeanTeacherHook of mmdet averages prompts whose start follows from a batch, the teacher gets it
    from its student.
    """

    # After EMAHook, which swaps its averages into checkpoints.
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}
        self._versions: dict[str, int] = {}
        self._without_gradient: set[str] = set()
        self._handles: list = []
        self._given: set[str] | None = None  # Prompts whose start the teacher has; None: of all.

    def before_train(self, runner: Runner) -> None:
        """Check the start, take the digests and log the parameter line."""
        model = unwrapped(runner.model)
        for backbone in backbones(model).values():
            if not backbone._protune.loads.checked:
                check_weights(backbone)
        if has_mean_teacher(runner.hooks):
            for backbone in backbones(model.teacher).values():
                backbone._protune.follows = True
            self._given = set()
            _give_to_teacher(model, self._given)
        self._check_modes(model)
        for name, tensor in _guarded_tensors(model):
            if tensor.requires_grad:
                raise RuntimeError(f"frozen parameter '{name}' requires a gradient: {_CAUSE}")
        self._digests = {name: digest(t) for name, t in _guarded_tensors(model)}
        self._versions = {name: t._version for name, t in _guarded_tensors(model)}
        self._watch_gradients(model)
        runner.logger.info(parameter_line(model))

    def before_train_epoch(self, runner: Runner) -> None:
        """Check modes and version counters."""
        self._check_cheaply(unwrapped(runner.model))

    def before_val(self, runner: Runner) -> None:
        """Check modes and version counters, for loops without epochs."""
        self._check_cheaply(unwrapped(runner.model))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the exact frozen tensors into the checkpoint, whatever an average made of them."""
        frozen = dict(_guarded_tensors(unwrapped(runner.model)))
        for key, prefix in (('state_dict', ''), ('ema_state_dict', 'module.')):
            state = checkpoint.get(key, {})
            for name, tensor in frozen.items():
                if prefix + name in state:
                    state[prefix + name] = tensor.detach().to(state[prefix + name].device)

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """After the first iteration, every prompt parameter must have had a gradient."""
        if self._given is not None and not _give_to_teacher(unwrapped(runner.model), self._given):
            self._given = None
        if not self._handles:
            return
        self._unwatch()
        if self._without_gradient:
            name = sorted(self._without_gradient)[0]
            raise RuntimeError(
                f"prompt parameter '{name}' got no gradient in the first iteration (and "
                f'{len(self._without_gradient) - 1} others): its stage reaches no loss, the '
                "backbone's forward goes around its block, or activation_checkpointing wraps the "
                'block; name other stages with stages=[...], or checkpoint with with_cp=True'
            )
        self._check_modes(unwrapped(runner.model))

    def after_train(self, runner: Runner) -> None:
        """Compare every bit of every frozen tensor with the start."""
        self._unwatch()
        now = dict(_guarded_tensors(unwrapped(runner.model)))
        for name, before in self._digests.items():
            if name not in now or digest(now[name]) != before:
                raise RuntimeError(f"frozen tensor '{name}' moved during training: {_CAUSE}")
        runner.logger.info(
            f'Pro-tuning: {len(self._digests)} frozen tensors are bit-identical to the start'
        )

    def _check_cheaply(self, model: nn.Module) -> None:
        self._check_modes(model)
        self._check_versions(model)

    def _check_modes(self, model: nn.Module) -> None:
        knowing = {id(m) for backbone in backbones(model).values() for m in forks(backbone)}
        for name, module in frozen_modules(model):
            if module.training and id(module) not in knowing:
                raise RuntimeError(f"frozen module '{name}' is in training mode: {_CAUSE}")

    def _check_versions(self, model: nn.Module) -> None:
        for name, tensor in _guarded_tensors(model):
            # A version that grew is a write; only a changed digest is a move.
            before = self._versions.get(name)
            if before is None or tensor._version == before:
                continue
            if digest(tensor) != self._digests[name]:
                raise RuntimeError(f"frozen tensor '{name}' moved during training: {_CAUSE}")
            self._versions[name] = tensor._version

    def _watch_gradients(self, model: nn.Module) -> None:
        tuned = {n: p for n, p in prompt_parameters(model).items() if p.requires_grad}
        self._without_gradient = set(tuned)
        self._handles = [
            parameter.register_hook(lambda _, name=name: self._without_gradient.discard(name))
            for name, parameter in tuned.items()
        ]

    def _unwatch(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


LEAST_SCALE = 2.0**-20
"""Gradients that need a smaller loss scale overflow float16 at a loss of a millionth."""


class DivergedError(RuntimeError):
    """The loss of a training is infinite or no number."""


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """End a training whose loss is infinite or no number, with one clear error.

    Losses are looked at together, so that a GPU is not waited for at every step. In mixed precision
    single steps may have no finite gradients: they are left out, and the loss scale is halved.
    There a training has diverged where that scale has fallen to nothing, or, as a scale may be
    fixed, where no loss of ``interval`` steps was finite.

    Args:
        interval: steps between two looks. Default 50; the last step of the training is one.
    """

    priority = 'NORMAL'

    def __init__(self, interval: int = 50) -> None:
        self.interval = interval
        self._bad: Tensor | None = None
        self._good: Tensor | None = None
        self._noted = 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Note the loss, and look at those noted every ``interval`` steps.

        Raises:
            DivergedError: one of them is infinite or no number; in mixed precision, all of them
                are, or the loss scale has fallen to nothing.
        """
        loss = (outputs or {}).get('loss')
        if isinstance(loss, Tensor):
            good = torch.isfinite(loss.detach()).all()
            self._bad = ~good if self._bad is None else self._bad | ~good
            self._good = good if self._good is None else self._good | good
            self._noted += 1
        if self.every_n_train_iters(runner, self.interval) or self.is_last_train_iter(runner):
            self.look(runner)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look before a checkpoint is written."""
        self.look(runner)

    def look(self, runner: Runner) -> None:
        """Raise if a loss since the last look was no number, or in mixed precision all of them."""
        if isinstance(runner.optim_wrapper, AmpOptimWrapper):
            self._look_at_mixed_precision(runner)
            return
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise DivergedError(
                f'the loss became infinite or no number within the last {self.interval} steps '
                f'before step {runner.iter + 1}: the training has diverged; the checkpoints '
                f'written before are in {runner.work_dir}; use a lower learning rate'
            )

    def _look_at_mixed_precision(self, runner: Runner) -> None:
        scale, why = runner.optim_wrapper.loss_scaler.get_scale(), None
        if scale < LEAST_SCALE:
            why = (
                f'the loss scale of mixed precision has fallen to {scale:.3g}, because the '
                'gradients of step after step were infinite or no numbers'
            )
        elif self._noted >= self.interval:
            if self._good is not None and not bool(self._good):
                why = f'no loss of the last {self._noted} steps was a finite number'
            self._good, self._noted = None, 0
        if why:
            raise DivergedError(
                f'{why}, before step {runner.iter + 1}: the training has diverged; the checkpoints '
                f'written before are in {runner.work_dir}; use a lower learning rate, or no mixed '
                'precision'
            )


_CAUSE = 'a hook, an optimizer or a custom train() of this project touches the frozen backbone'


def has_mean_teacher(hooks: list[Hook]) -> bool:
    """Whether MeanTeacherHook of mmdet, or one like it, is among some hooks."""
    return any(hasattr(hook, 'skip_buffers') for hook in hooks)


def _give_to_teacher(model: nn.Module, given: set[str]) -> bool:
    """Give what a batch of the student has set to its mean teacher.

    MeanTeacherHook skips buffers, and approaches everything over thousands of steps. Prompts added
    nothing before they were set, so the teacher misses nothing.

    Args:
        model: has a ``student`` and a ``teacher``.
        given: names of the student's prompts whose start the teacher has already, added to here.

    Returns:
        bool: some prompt waits for a batch yet.
    """
    followers, waits = prompts(model.teacher), False
    for name, prompt in prompts(model.student).items():
        layers = dict(fixed_layers(prompt))
        if getattr(prompt, 'started', False) and name not in given:
            given.add(name)
            layers['down'] = prompt.down
        for key, layer in layers.items():
            if name in followers:
                followers[name].get_submodule(key).load_state_dict(layer.state_dict())
        waits = waits or getattr(prompt, 'waits', False)
    return waits


def _guarded_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Frozen tensors of the backbones that train; a teacher's follow its student's by an average.

    A backbone whose prompts are frozen from outside is such a teacher.
    """
    for prefix, backbone in backbones(model).items():
        if not is_teacher(backbone):
            for name, tensor in frozen_tensors(backbone):
                if name.rpartition('.')[2] not in BY_SIZE:
                    yield f'{prefix}.{name}'.lstrip('.'), tensor
