"""The Runner of Pro-tuning: resolves the overlay, groups the optimizer, guards the freeze."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import fcntl
import functools
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import (
    all_gather_object,
    broadcast_object_list,
    is_distributed,
    is_main_process,
)
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from .checkpoints import FillBaseHook, StockModelHook, TunedCheckpointHook, note_origin
from .config import is_protuned, policies, resolve
from .datasets.rest import check_annotations, check_rest
from .files import last_good_checkpoint, safe_hook, whole_file
from .hooks import FiniteLossHook, FrozenGuardHook
from .loading import origin_told
from .optim import check_warmup, without_warmup, wrap_constructor
from .prompted import plain_maps
from .registry import RUNNERS
from .resume import ExactResumeHook, PreemptionHook, unsignalled
from .show import TuningReportHook
from .tuned import backbones

EVAL_NORMS = 'efficient_conv_bn_eval'
"""mmengine's option that folds batch norms in evaluation mode into the convolution before them."""
LOCK = '.training'
"""Name of the file in a work folder that a running training holds locked."""


class CarefulRunner:
    """What any runner of ours adds to mmengine's: whole checkpoints, locks and hooks."""

    def train(self) -> nn.Module:
        """Train; nobody else writes to the work folder, and signals are given back at the end.

        Raises:
            ValueError: images that validate would train, or images that are not shown would count
                as missed, see :mod:`protune_mm.datasets.rest`.
        """
        loader = self.cfg.get('val_dataloader')
        check_rest(self.cfg.get('train_dataloader'), loader)
        check_annotations(loader, self.cfg.get('val_evaluator'))
        chosen = policies(self.cfg)
        if chosen and chosen <= {'head-only', 'full'}:  # Twins of a config that warms prompts up.
            self.param_schedulers = without_warmup(self.param_schedulers)
        with locked(self.work_dir):
            try:
                return super().train()
            finally:
                for hook in self.hooks:
                    if isinstance(hook, PreemptionHook):
                        hook.unlisten()

    def test(self) -> dict:
        """Test.

        Raises:
            ValueError: images that are not shown would count as missed, see
                :mod:`protune_mm.datasets.rest`.
        """
        check_annotations(self.cfg.get('test_dataloader'), self.cfg.get('test_evaluator'))
        return super().test()

    def own_hooks(self) -> list[type[Hook]]:
        """Hooks that a training has, unless its config names them."""
        raise NotImplementedError

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Register the config's hooks, and those of ours that the config does not name.

        The checkpoint hook is ours, too, where the config names the stock one, or one of its
        user's that derives from it.
        """
        default_hooks = dict(default_hooks or {})
        default_hooks.setdefault('checkpoint', dict(type='CheckpointHook'))
        checkpoint = default_hooks['checkpoint']
        if isinstance(checkpoint, dict) and 'type' in checkpoint:
            default_hooks['checkpoint'] = dict(checkpoint, type=safe_hook(checkpoint['type']))
        super().register_hooks(default_hooks, custom_hooks)
        for hook in self.own_hooks():
            if not any(isinstance(there, hook) for there in self.hooks):
                self.register_hook(hook())

    def load_or_resume(self) -> None:
        """Load or resume; ``resume`` without a file finds the newest checkpoint that is whole.

        mmengine takes what the file ``last_checkpoint`` names, which a crash may have left behind
        empty, or of a checkpoint that was being written. Without any, ``first_load_from`` of the
        config is where the training starts.

        Raises:
            RuntimeError: the processes of the training do not read the same file.
        """
        if self._resume and self._load_from is None and not self._has_loaded:
            self._load_from = same_for_all(
                last_good_checkpoint(self.work_dir) if is_main_process() else None
            )
            if self._load_from is None:
                self.logger.info(f'no checkpoint in {self.work_dir}: starting anew')
                # Not a resumed training: its hooks are not to wait for a checkpoint.
                self._resume = False
                self._load_from = self.cfg.get('first_load_from')
            else:
                self.logger.info(f'resuming from the latest checkpoint {self._load_from}')
        super().load_or_resume()

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint so that a crash leaves the old file or the new one, whole.

        Raises:
            RuntimeError: it could not be written. What was there before still is.
        """
        if '://' in str(out_dir) or not is_main_process():
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        path = Path(out_dir, filename)
        try:
            with whole_file(path) as partial:
                super().save_checkpoint(out_dir, partial.name, *args, **kwargs)
        except OSError as error:
            raise RuntimeError(
                f'{path} could not be written ({error.strerror or error}): earlier checkpoints '
                'are still there; make room and go on with --resume'
            ) from error


@RUNNERS.register_module()
class ProTuneRunner(CarefulRunner, Runner):
    """mmengine's Runner for a config with a Pro-tuned backbone.

    Named in a config as ``runner_type='protune_mm.ProTuneRunner'``, beside the canonical line or
    beside ``protune=dict(...)``, which it replaces by that line before anything is built. A dump
    of its config is a complete config of its own.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> Runner:
        """Build the runner.

        Args:
            cfg: a config, left unchanged.

        Raises:
            ValueError: the model has no Pro-tuned backbone, because a later config overrode it
                or none was ever named, and what :func:`protune_mm.config.resolve` raises.
        """
        cfg = resolve(copy.deepcopy(cfg))
        if not is_protuned(cfg):
            raise ValueError(
                "runner_type='protune_mm.ProTuneRunner', but model.backbone is not Pro-tuned: add "
                "model=dict(backbone=dict(type='protune_mm.ProTuned', base=...)) or "
                'protune=dict(), or drop runner_type'
            )
        return super().from_cfg(cfg)

    def setup_env(self, env_cfg: dict) -> None:
        """Set up multiprocessing and distribution; without a CUDA device, over gloo.

        mmengine's own set-up of the launcher ``pytorch`` asks for a CUDA device.
        """
        if self._launcher == 'pytorch' and not torch.cuda.is_available() and not is_distributed():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict | None, model: nn.Module) -> nn.Module:
        """Wrap the model for distributed training, on the CPU where there is no CUDA device."""
        stock = is_model_wrapper(model) or not self.distributed or model_wrapper_cfg is not None
        if not stock and not torch.cuda.is_available():
            return MMDistributedDataParallel(
                model,
                broadcast_buffers=False,
                find_unused_parameters=self.cfg.get('find_unused_parameters', False),
            )
        return super().wrap_model(model_wrapper_cfg, model)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer over trainable parameters only, see :mod:`protune_mm.optim`."""
        # policy='full' has no frozen backbone, and is stock training, for comparison.
        described = isinstance(optim_wrapper, dict) and isinstance(
            optim_wrapper.get('optimizer'), dict
        )
        if described and backbones(self.model):
            optim_wrapper = wrap_constructor(optim_wrapper)
        return super().build_optim_wrapper(optim_wrapper)

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """Build the schedules, of which a warm-up of prompts allows those that multiply only."""
        built = super().build_param_scheduler(scheduler)
        check_warmup(built)
        return built

    def train(self) -> nn.Module:
        """Train, with two options of the config as a frozen backbone needs them.

        ``activation_checkpointing`` is done without reentrant autograd. mmengine's own is
        reentrant: a region whose input needs no gradient, a frozen stem and a prompt, say, would
        get none, with only a warning. ``efficient_conv_bn_eval`` leaves frozen backbones out: it
        traces a module, and lean layers have folded their norms already.
        """
        model = self.model.module if is_model_wrapper(self.model) else self.model
        given = {key: self.cfg.get(key, None) for key in ('activation_checkpointing', EVAL_NORMS)}
        given = {key: value for key, value in given.items() if value is not None}
        names = {key: [v] if isinstance(v, str) else [*v] for key, v in given.items()}
        for name in names.get('activation_checkpointing', ()):
            checkpoint_activations(model.get_submodule(name))
        frozen = [f'{name}.' for name in backbones(model)]
        left = [
            name
            for name in names.get(EVAL_NORMS, ())
            if not any(f'{name}.'.startswith(b) or b.startswith(f'{name}.') for b in frozen)
        ]
        if len(left) < len(names.get(EVAL_NORMS, ())):
            self.logger.info(f'{EVAL_NORMS} leaves the frozen backbone out')
        self._given = given
        for key in given:
            self.cfg[key] = left or None if key == EVAL_NORMS else None
        try:
            return super().train()
        finally:
            self._give_back()

    def load_or_resume(self) -> None:
        """Load or resume, after the two options have been followed: checkpoints hold the config."""
        self._give_back()
        super().load_or_resume()

    def _give_back(self) -> None:
        for key, value in self.__dict__.pop('_given', {}).items():
            self.cfg[key] = value

    def own_hooks(self) -> list[type[Hook]]:
        """Hooks of ours that a training has."""
        hooks = [ExactResumeHook, PreemptionHook, FiniteLossHook, TuningReportHook]
        if backbones(self.model):
            return [*hooks, FrozenGuardHook, FillBaseHook, TunedCheckpointHook]
        return [*hooks, StockModelHook]

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        """Build a dataloader whose workers a signal does not end."""
        return unsignalled(Runner.build_dataloader(*args, **kwargs))

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict:
        """Load a checkpoint, and note that the base came from it if it did."""
        with origin_told():
            checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        note_origin(self.model, checkpoint, filename)
        return checkpoint


def same_for_all(path: str | None) -> str | None:
    """The checkpoint that the first process has chosen, once all processes can read it.

    Args:
        path: of the first process; what others give is of no matter.

    Raises:
        RuntimeError: it is not the same file everywhere.
    """
    chosen = [path]
    broadcast_object_list(chosen)
    path = chosen[0]
    if path is None or '://' in path:
        return path
    seen = hashlib.blake2b(Path(path).read_bytes()).hexdigest() if Path(path).is_file() else None
    all_seen = all_gather_object(seen)
    others = [rank for rank, digest in enumerate(all_seen) if digest != all_seen[0]]
    if others:
        raise RuntimeError(
            f'{path} cannot be resumed: processes {others} find no such file there, or another '
            'one; give all nodes the same --work-dir'
        )
    return path


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Hold a work folder for one training; the lock goes with the process, however it ends.

    Args:
        folder: the Runner's ``work_dir``.

    Raises:
        RuntimeError: another training writes there.
    """
    if not is_main_process():
        yield
        return
    path = Path(folder, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('a+') as file:
        try:
            # Of this process alone: data workers, which may outlive it, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RuntimeError(
                f'another training ({file.read().strip()}) writes to {folder}: stop it, or choose '
                'another --work-dir'
            ) from None
        except OSError:  # A file system without locks.
            yield
            return
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        yield


def checkpoint_activations(module: nn.Module) -> None:
    """Make a module compute its activations again in backward instead of keeping them.

    Args:
        module: changed in place; arguments and results of its ``forward`` stay as they are.
    """
    forward = module.forward

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        context: contextvars.Context | None = None

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal context
            if context is None:
                context = contextvars.copy_context()
                return forward(*args, **kwargs)
            # In backward, which on a GPU is another thread, the grid of a ViT's patches and the
            # chosen prompts are those of this forward.
            return context.copy().run(again, *args, **kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            plain_maps.set(None)  # Noted already.
            return forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed
