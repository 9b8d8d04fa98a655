"""FSDP: the runner of a model whose weights are split, and its guard."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner, Runner

from .checkpoints import FillBaseHook, TunedCheckpointHook
from .config import config_backbones, is_protuned, resolve
from .hooks import FiniteLossHook, has_mean_teacher
from .prompts.convs import fixed_layers
from .registry import HOOKS, RUNNERS, STRATEGIES
from .resume import ExactResumeHook, PreemptionHook, unsignalled
from .runner import CarefulRunner
from .sharded import NO_CHECKPOINTING, ProTuneFSDPStrategy, fingerprints
from .show import TuningReportHook
from .tuned import backbones, prompts, unwrapped


@HOOKS.register_module()
class ShardedGuardHook(Hook):
    """Prove after a training with FSDP that every bit of the frozen weights is as it was."""

    def before_train(self, runner: Runner) -> None:
        """Refuse what FrozenGuardHook does for a mean teacher, and this hook does not.

        Raises:
            ValueError: MeanTeacherHook would leave the first convolution of prompts random.
        """
        found = prompts(unwrapped(runner.model)).values()
        if has_mean_teacher(runner.hooks) and any(fixed_layers(prompt) for prompt in found):
            raise ValueError(
                "prompt.fixed_down=True, as in prompt='principal', cannot be given to a mean "
                "teacher under FSDP: use prompt='principal-trained'"
            )

    def after_train(self, runner: Runner) -> None:
        """Gather the weights on the first process and compare.

        Raises:
            RuntimeError: a frozen weight moved.
        """
        for name, found in fingerprints(runner.model).items():
            if found != backbones(unwrapped(runner.model))[name].protune_fingerprint():
                raise RuntimeError(f"a frozen tensor of '{name}' moved during training")
        runner.logger.info('Pro-tuning: the frozen tensors are bit-identical to the start')


@RUNNERS.register_module()
class ProTuneFlexibleRunner(CarefulRunner, FlexibleRunner):
    """mmengine's FlexibleRunner for a Pro-tuned model, with FSDP.

    ``runner_type='protune_mm.ProTuneFlexibleRunner'`` with ``tools/dist_train.sh``. Frozen layers
    run as stock ones (``lean=False``): lean ones keep folded copies of whole weights.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> FlexibleRunner:
        """Build the runner.

        Args:
            cfg: a config, left unchanged.

        Raises:
            ValueError: it is not Pro-tuned, is not started by a launcher, names a strategy that
                is not of :class:`ProTuneFSDPStrategy`, or asks for what FSDP cannot do here: an
                EMA hook, ``activation_checkpointing``, a policy that trains single parameters.
        """
        cfg = resolve(copy.deepcopy(cfg))
        if not is_protuned(cfg):
            raise ValueError(
                "runner_type='protune_mm.ProTuneFlexibleRunner', but model.backbone is not "
                'Pro-tuned: add --protune'
            )
        if cfg.get('launcher', 'none') == 'none':
            raise ValueError(
                'FSDP splits weights between processes: start it with tools/dist_train.sh, on one '
                'GPU, too'
            )
        if any('EMAHook' in str(hook.get('type')) for hook in cfg.get('custom_hooks') or []):
            raise ValueError('an EMAHook cannot average weights that FSDP has split: take it out')
        if cfg.get('activation_checkpointing') is not None:
            raise ValueError(NO_CHECKPOINTING)
        for _, backbone in config_backbones(cfg):
            if backbone.get('policy') in ('bias', 'norm'):
                raise ValueError(
                    f"policy='{backbone['policy']}' trains single parameters of frozen layers, "
                    'which FSDP would split together: train it without FSDP'
                )
            backbone['lean'] = False
        cfg.setdefault('strategy', dict(type='protune_mm.ProTuneFSDPStrategy'))
        named = cfg.strategy if isinstance(cfg.strategy, str) else cfg.strategy.get('type')
        strategy = STRATEGIES.get(named) if isinstance(named, str) else named
        if not (isinstance(strategy, type) and issubclass(strategy, ProTuneFSDPStrategy)):
            raise ValueError(
                f'strategy.type={named!r}: this runner keeps prompts and checkpoints '
                "right under 'protune_mm.ProTuneFSDPStrategy' alone: take `strategy` out, or take "
                "runner_type='protune_mm.ProTuneRunner', which has DDP"
            )
        return super().from_cfg(cfg)

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> Any:
        """Build a dataloader whose workers a signal does not end."""
        return unsignalled(FlexibleRunner.build_dataloader(*args, **kwargs))

    def save_checkpoint(self, *args: Any, meta: dict | None = None, **kwargs: Any) -> None:
        """Save a checkpoint; its epoch and step are those that the caller names.

        FlexibleRunner names its own, which are one too far after a validation.
        """
        self._place = {key: meta[key] for key in ('epoch', 'iter') if key in (meta or {})}
        super().save_checkpoint(*args, meta=meta, **kwargs)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call all hooks."""
        if fn_name == 'before_save_checkpoint':
            kwargs['checkpoint']['meta'].update(self._place)
        super().call_hook(fn_name, **kwargs)

    def own_hooks(self) -> list[type[Hook]]:
        """Hooks of ours; the guard of whole weights is replaced by that of split ones."""
        return [
            ExactResumeHook,
            PreemptionHook,
            FiniteLossHook,
            TuningReportHook,
            FillBaseHook,
            TunedCheckpointHook,
            ShardedGuardHook,
        ]
