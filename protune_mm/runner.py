"""The Runner of Pro-tuning: resolves the overlay, groups the optimizer, guards the freeze."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_distributed
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.checkpoint import checkpoint

from .config import is_protuned, resolve
from .frozen import backbones
from .hooks import FrozenGuardHook
from .optim import wrap_constructor
from .registry import RUNNERS


@RUNNERS.register_module()
class ProTuneRunner(Runner):
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

    def train(self) -> nn.Module:
        """Train; ``activation_checkpointing`` of the config is done without reentrant autograd.

        mmengine's own is reentrant: a region whose input needs no gradient, a frozen stem and a
        prompt, say, would get none, with only a warning.
        """
        names = self.cfg.get('activation_checkpointing', None)
        if names is None:
            return super().train()
        model = self.model.module if is_model_wrapper(self.model) else self.model
        for name in [names] if isinstance(names, str) else names:
            checkpoint_activations(model.get_submodule(name))
        self.cfg.activation_checkpointing = None
        try:
            return super().train()
        finally:
            self.cfg.activation_checkpointing = names

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Register the config's hooks, and the guard where the config does not name it."""
        super().register_hooks(default_hooks, custom_hooks)
        guarded = any(isinstance(hook, FrozenGuardHook) for hook in self.hooks)
        if backbones(self.model) and not guarded:
            self.register_hook(FrozenGuardHook())


def checkpoint_activations(module: nn.Module) -> None:
    """Make a module compute its activations again in backward instead of keeping them.

    Args:
        module: changed in place; arguments and results of its ``forward`` stay as they are.
    """
    forward = module.forward

    @functools.wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    module.forward = checkpointed
