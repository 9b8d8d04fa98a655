"""One run of a study: train for some steps, score on the validation and the test split."""

from __future__ import annotations

import argparse
import copy
import functools
import logging
import math
import statistics
import tempfile
import time
import uuid
import warnings
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner, TestLoop
from mmengine.visualization import Visualizer

import protune_mm
from protune_mm import cli
from protune_mm.compat import stack_versions
from protune_mm.config import config_backbones, library
from protune_mm.frozen import prompt_parameters
from protune_mm.hooks import DivergedError
from protune_mm.lean.memory import kept_bytes
from protune_mm.robustness import CORRUPTIONS, AttackLoop, after_loading, corrupted, summary

from .plan import Run, Study


class StopWhenDiverged(Hook):
    """End a training whose loss is not finite."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Look at the loss of every step."""
        if outputs and not math.isfinite(float(outputs['loss'])):
            raise DivergedError(
                f'the loss is {float(outputs["loss"])} after {runner.iter + 1} steps'
            )


class StepTime(Hook):
    """Seconds a step: of the processor, whatever else runs on it, or of a GPU's clock."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.start = 0.0

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        """Start the clock."""
        self.start = self._now()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict | None = None
    ) -> None:
        """Stop it."""
        self.steps.append(self._now() - self.start)

    @staticmethod
    def _now() -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def median(self) -> float | None:
        """Median of all steps but the first two, in seconds."""
        return round(statistics.median(self.steps[2:]), 4) if len(self.steps) > 2 else None


apart: set[tuple] = set()
"""Studies, tasks, fractions and seeds whose splits have no image in common."""


@functools.cache
def study_of(path: str) -> Study:
    """A study's file, read once a process."""
    return Study(path)


def train(path: str, key: str) -> dict:
    """Do one run.

    Args:
        path: the study's file.
        key: see :class:`Run`.

    Returns:
        dict: ``key``, ``status`` ('ok' or 'diverged') and ``lines``, one for each metric.
    """
    study, run = study_of(path), Run.of(key)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    task = study.tasks[run.task]
    # The runner formats its config for its log five times, which takes seconds a run.
    plain = mock.patch('mmengine.config.config.FormatCode', lambda text, **_: (text, True))
    with tempfile.TemporaryDirectory(prefix='study_') as work, plain:
        cfg = config_of(study, run, work)
        if (path, run.task, run.fraction, run.seed) not in apart:
            check_apart(cfg, run.task)
            apart.add((path, run.task, run.fraction, run.seed))
        runner = cli.build_runner(cfg)
        if task.get('channels_last'):
            runner.model.to(memory_format=torch.channels_last)
        runner.register_hook(StopWhenDiverged())
        clock = StepTime()
        runner.register_hook(clock)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # Of the run before this one.
        start = time.time()
        try:
            runner.train()
            diverged = not is_finite(runner.model)  # The last step may have done it.
        except DivergedError:
            diverged = True
        except Exception:
            # Where weights are no numbers, a detector may fail before it has a loss.
            if is_finite(runner.model):
                raise
            diverged = True
        wall = time.time() - start
        memory = None if diverged else peak_memory(runner)
        scores = dict(val={}, test={})
        if not diverged:
            scores = dict(val=runner.val(), test=runner.test())
            scores['test'] |= scenario_scores(runner, cfg, task, run)
    counts = backbone_counts(runner.model, cfg)
    # mmengine keeps what belongs to every experiment of a process.
    for manager in (MMLogger, MessageHub, Visualizer, DefaultScope):
        manager._instance_dict.clear()
    lines = []
    metrics = [*task['metrics'], *scenario_metrics(task)]
    for metric in metrics:
        # Under corruption and attack, too, the validation score is the clean one.
        clean = metric if metric in task['metrics'] else task['metrics'][0]
        found = dict(val=0.0, test=0.0)
        if not diverged:
            found = dict(
                val=score(scores['val'], clean, run), test=score(scores['test'], metric, run)
            )
        lines.append(
            dict(
                key=key,
                method=run.method,
                task=run.task,
                backbone=task['backbone'],
                fraction=run.fraction,
                seed=run.seed,
                lr=run.lr,
                setting=study.setting(run),
                steps=steps_of(task, run),
                metric=metric,
                metrics=len(metrics),
                score=found['test'],
                val_score=found['val'],
                diverged=diverged,
                **counts,
                peak_memory=memory,
                step_s=clock.median(),
                wall_s=round(wall, 1),
                threads=torch.get_num_threads(),
                device=device_name(),
                command=f'python tools/study.py {path} --run "{key}"',
                versions={'protune_mm': protune_mm.__version__, **stack_versions()},
            )
        )
    return dict(key=key, status='diverged' if diverged else 'ok', reason='', lines=lines)


def check_apart(cfg: Config, task: str) -> None:
    """Refuse a task that trains on images it chooses or is tested by, or chooses by test images.

    Raises:
        ValueError: two of its splits have an image in common.
    """
    seen: dict[str, set] = {}
    with DefaultScope.overwrite_default_scope(library(cfg)):
        for split in ('train', 'val', 'test'):
            dataset = DATASETS.build(copy.deepcopy(cfg[f'{split}_dataloader'].dataset))
            infos = (dataset.get_data_info(i) for i in range(len(dataset)))
            # Sets such as CIFAR hold their images and have no paths.
            found = {info.get('img_path') or info['img'].tobytes() for info in infos}
            for other, images in seen.items():
                if found & images:
                    raise ValueError(
                        f"task '{task}': {len(found & images)} of {len(found)} images of its "
                        f'{split} split are in its {other} split: give them images of their own, '
                        'by protune_mm.FewLabels and its rest=True, or by `indices`'
                    )
            seen[split] = found


def is_finite(model: BaseModel) -> bool:
    """Whether all weights that train are numbers."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def score(found: dict, metric: str, run: Run) -> float:
    """One of the scores of a run that did not diverge.

    Raises:
        ValueError: it is not among them, or no number.
    """
    # Of a detector that finds nothing in any image mmdet's metric tells no score at all.
    silent = metric.startswith('coco/') and not any(key.startswith('coco/') for key in found)
    value = float(found.get(metric, 0.0 if silent else math.nan))
    if not math.isfinite(value):
        there = ', '.join(f'{key} {value}' for key, value in found.items())
        raise ValueError(f"task '{run.task}': no score {metric}: there are {there}")
    return value


def scenario_metrics(task: dict) -> list[str]:
    """Names of the scores under corruption and attack that a task asks for."""
    wanted = task.get('scenarios', {})
    names = [f'100 - mCE, severity {s}' for s in wanted.get('severities', ())]
    names += [f'shifted, {name}' for name in wanted.get('shifts', ())]
    return names + [
        f'{attack}, {budget:g}/255'
        for attack, budgets in wanted.get('attacks', {}).items()
        for budget in budgets
    ]


def scenario_scores(runner: Runner, cfg: Config, task: dict, run: Run) -> dict[str, float]:
    """Scores under corruption and attack, on a part of the test split."""
    wanted = task.get('scenarios')
    if not wanted:
        return {}
    plain, evaluator = copy.deepcopy(cfg.test_dataloader), copy.deepcopy(cfg.test_evaluator)
    every = wanted.get('every', 1)
    if every > 1:
        chosen = plain.dataset.get('indices') or range(len(runner.test_dataloader.dataset))
        plain.dataset.indices = list(chosen)[::every]
        for metric in evaluator if isinstance(evaluator, list) else [evaluator]:
            if metric.get('ann_file'):  # Else the images left out count as missed.
                metric['ann_file'] = None
    metric, found = task['metrics'][0], {}

    def test(dataloader: dict) -> float:
        runner._test_loop = TestLoop(
            runner, runner.build_dataloader(dataloader), runner.build_evaluator(evaluator)
        )
        return score(runner.test(), metric, run)

    for name, steps in wanted.get('shifts', {}).items():
        # In points of 100, as all scores that are not of a metric of the task.
        score_there = test(after_loading(plain, list(steps)))
        found[f'shifted, {name}'] = score_there * (100 if 'mAP' in metric else 1)
    for severity in wanted.get('severities', ()):
        scores = {
            (name, severity): test(corrupted(plain, name, severity, cache=True))
            for name in CORRUPTIONS
        }
        error = summary(1.0, scores, per_cent='mAP' not in metric)['mCE']
        found[f'100 - mCE, severity {severity}'] = 100 - error
    for attack, budgets in wanted.get('attacks', {}).items():
        loader = runner.build_dataloader(plain)
        runner._test_loop = AttackLoop(runner, loader, attack, [b / 255 for b in budgets])
        found |= runner.test()
    return found


def steps_of(task: dict, run: Run) -> int:
    """Steps of a run: of the task; a small part of the data is not shown as often."""
    return task['steps'] if run.fraction >= 0.5 else task.get('few_steps', task['steps'])


def config_of(study: Study, run: Run, work: str) -> Config:
    """The config of one run."""
    task = study.tasks[run.task]
    steps = steps_of(task, run)
    cfg = protune_mm.load_config(task['config'], cfg_options=dict(task.get('cfg_options', {})))
    options = study.backbone_options(run.task, run.method)
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


def peak_memory(runner: Runner) -> int:
    """Bytes: on a GPU the peak of the run; on a CPU what one step keeps for its backward pass."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    model: BaseModel = runner.model.train()
    data = next(iter(runner.train_loop.dataloader))
    data = model.data_preprocessor(data, True)
    return kept_bytes(lambda: model(**data, mode='loss'))


def backbone_counts(model: BaseModel, cfg: Config) -> dict:
    """Parameters of the backbone without prompts, and those that train in it, prompts included."""
    ((name, _),) = config_backbones(cfg)
    backbone = model.get_submodule(name.removeprefix('model.'))
    prompts = {id(p) for p in prompt_parameters(backbone).values()}
    parts = list(backbone.parameters())
    return dict(
        trainable_backbone=sum(p.numel() for p in parts if p.requires_grad),
        backbone_parameters=sum(p.numel() for p in parts if id(p) not in prompts),
    )


def device_name() -> str:
    """What the run ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'
