"""The config of one run of a study."""

from __future__ import annotations

import argparse
import uuid

from mmengine.config import Config

import protune_mm
from protune_mm import cli
from protune_mm.config import config_backbones

from .plan import Study
from .runs import Run


def steps_of(task: dict, run: Run) -> int:
    """Steps of a run: of the task; a small part of the data is not shown as often."""
    return task['steps'] if run.fraction >= 0.5 else task.get('few_steps', task['steps'])


def config_of(study: Study, run: Run, work: str) -> Config:
    """The config of one run."""
    task = study.tasks[run.task]
    steps = steps_of(task, run)
    cfg = protune_mm.load_config(task['config'], cfg_options=dict(task.get('cfg_options', {})))
    options = study.backbone_options(run.task, run.method, run.lr_part)
    rules = cfg.optim_wrapper.get('paramwise_cfg') or {}
    if 'prompt_lr_mult' in options:
        rules['prompt_lr_mult'] = options.pop('prompt_lr_mult')
    if 'full_lr_mult' in options:
        of_backbone = rules.setdefault('custom_keys', {}).setdefault('backbone', {})
        of_backbone['lr_mult'] = options.pop('full_lr_mult')
    cfg.optim_wrapper.paramwise_cfg = rules
    prompt_warmup = options.pop('prompt_warmup', None)
    for _, backbone in config_backbones(cfg):
        backbone.update(options)
    cfg.optim_wrapper.optimizer.lr = run.lr
    warm = max(1, steps // 10)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warm, end=steps, T_max=steps - warm),
    ]
    if prompt_warmup:
        end = max(2, round(steps * prompt_warmup))
        cfg.param_scheduler.append(dict(type='protune_mm.PromptWarmup', end=end))
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps + 1)
    loader = cfg.train_dataloader
    loader.sampler = dict(type='InfiniteSampler', shuffle=True)
    loader.pop('batch_sampler', None)
    if 'long_tail' in task:
        loader.dataset = dict(
            type='protune_mm.LongTailed',
            dataset=loader.dataset,
            ratio=task['long_tail'],
            seed=run.seed,
        )
    if run.fraction < 1:
        few = dict(type='protune_mm.FewLabels', fraction=run.fraction, seed=run.seed)
        if task.get('validate_on_rest'):
            val = cfg.val_dataloader
            like_val = {**loader.dataset, 'pipeline': val.dataset.pipeline}
            rest = dict(few, dataset=like_val, rest=True)
            val.dataset = dict(type='mmengine.ConcatDataset', datasets=[val.dataset, rest])
        loader.dataset = dict(few, dataset=loader.dataset)
    if 'long_tail' in task:
        shots = dict(type='protune_mm.ShotAccuracy', dataset=loader.dataset)
        for key in ('val_evaluator', 'test_evaluator'):
            stock = cfg[key]
            cfg[key] = [*(stock if isinstance(stock, list) else [stock]), shots]
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=10**9)
    cfg.log_processor = dict(by_epoch=False)
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=run.seed)
    cfg.experiment_name = f'study_{uuid.uuid4().hex}'
    cfg.work_dir = work
    cfg.visualizer = dict(type='Visualizer', vis_backends=[], name=cfg.experiment_name)
    cfg.custom_hooks = []
    cfg.setdefault('runner_type', 'protune_mm.ProTuneRunner')
    switches = argparse.Namespace(no_pin_memory=True, no_persistent_workers=True)
    cli.set_dataloader_defaults(cfg, switches)
    return cfg
