"""The config of one run of a study."""

from __future__ import annotations

import argparse
import uuid

from mmengine.config import Config

import protune_mm
from protune_mm import cli
from protune_mm.config import config_backbones
from protune_mm.datasets import MIXERS
from protune_mm.datasets.rest import metrics_of, shows_part
from protune_mm.optim import DEFAULT_CONSTRUCTOR
from protune_mm.registry import type_name

from .plan import Study
from .runs import Run


def steps_of(task: dict, run: Run) -> int:
    """Steps of a run: of the task; a small part of the data is not shown as often."""
    return task['steps'] if run.fraction >= 0.5 else task.get('few_steps', task['steps'])


def evaluators_of(cfg: Config, split: str) -> list[dict]:
    """The metrics of a split: its evaluator may be one, a list, or an evaluator around several."""
    return metrics_of(cfg[f'{split}_evaluator'])


def count_shown(evaluators: list[dict], dataset: dict) -> None:
    """Let no metric read an annotation file of more images: those left out count as missed there.

    Args:
        evaluators: changed in place.
        dataset: config of the data set that they score.
    """
    for evaluator in evaluators:
        if evaluator.get('ann_file') and shows_part(dataset):
            evaluator['ann_file'] = None


def holder_of(loader: dict) -> dict:
    """What holds the config of the data set, inside wrappers that repeat or mix its images."""
    holder = loader
    while type_name(holder['dataset']) in MIXERS:
        holder = holder['dataset']
    return holder


BEHIND = (
    'neck', 'head', 'decode_head', 'auxiliary_head', 'bbox_head', 'mask_head', 'rpn_head',
    'roi_head', 'panoptic_head',
)  # fmt: skip
"""Parts of a model whose rules concern nothing in its backbone."""


def with_backbone_rate(cfg: Config, rules: dict, lr_mult: float) -> dict:
    """``custom_keys`` by which all of the backbone trains at a multiple of the rate.

    Raises:
        ValueError: the config has rules beside which that would not be so. mmengine goes by one
            key for a parameter, the longest, and by none in constructors of layer decay.
    """
    keys = dict(rules.get('custom_keys') or {})
    others = [key for key in keys if key != 'backbone' and key.partition('.')[0] not in BEHIND]
    constructor = type_name(dict(type=cfg.optim_wrapper.get('constructor', DEFAULT_CONSTRUCTOR)))
    named = all(name.removeprefix('model.') == 'backbone' for name, _ in config_backbones(cfg))
    why = ''
    if others:
        why = f"its custom_keys has '{others[0]}' as well, and only one key counts for a parameter"
    elif constructor != DEFAULT_CONSTRUCTOR:
        why = f'{constructor} has rates of its own'
    elif not named:
        why = 'its backbone is not model.backbone'
    if why:
        raise ValueError(
            f'full_lr_mult={lr_mult:g}: {why}: write the multiple into the config, and leave '
            'full_lr_mult, and pairs in lrs, out'
        )
    keys['backbone'] = {**keys.get('backbone', {}), 'lr_mult': lr_mult}
    return keys


def config_of(study: Study, run: Run, work: str) -> Config:
    """The config of one run."""
    task = study.tasks[run.task]
    steps = steps_of(task, run)
    cfg = protune_mm.load_config(task['config'], cfg_options=dict(task.get('cfg_options', {})))
    options = study.backbone_options(run.task, run.method, run.lr_part)
    # A plain dict: what a ConfigDict is given it copies.
    rules = dict(cfg.optim_wrapper.get('paramwise_cfg') or {})
    if 'prompt_lr_mult' in options:
        rules['prompt_lr_mult'] = options.pop('prompt_lr_mult')
    if 'full_lr_mult' in options:
        rules['custom_keys'] = with_backbone_rate(cfg, rules, options.pop('full_lr_mult'))
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
    holder = holder_of(loader)
    if 'long_tail' in task:
        holder.dataset = dict(
            type='protune_mm.LongTailed',
            dataset=holder.dataset,
            ratio=task['long_tail'],
            seed=run.seed,
        )
    if run.fraction < 1:
        few = dict(type='protune_mm.FewLabels', fraction=run.fraction, seed=run.seed)
        if task.get('validate_on_rest'):
            val = cfg.val_dataloader
            like_val = {**holder.dataset, 'pipeline': val.dataset.pipeline}
            rest = dict(few, dataset=like_val, rest=True)
            val.dataset = dict(type='mmengine.ConcatDataset', datasets=[val.dataset, rest])
        holder.dataset = dict(few, dataset=holder.dataset)
    for split in ('val', 'test'):
        count_shown(evaluators_of(cfg, split), cfg[f'{split}_dataloader'].dataset)
    if 'long_tail' in task:
        shots = dict(type='protune_mm.ShotAccuracy', dataset=loader.dataset)
        for split in ('val', 'test'):
            cfg[f'{split}_evaluator'] = [*evaluators_of(cfg, split), shots]
    # A dumped config may go on from a checkpoint, its `load_from`: a run begins with it at most.
    cfg.resume = False
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
