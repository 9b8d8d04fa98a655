"""One run of a study: train for some steps, score on the validation and the test split."""

from __future__ import annotations

import functools
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping
from unittest import mock

import torch
from jobs import HopelessError
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import nn

import protune_mm
from protune_mm import cli
from protune_mm.compat import processor, stack_versions
from protune_mm.config import config_backbones
from protune_mm.hooks import DivergedError
from protune_mm.lean.layout import NeedsContiguous, give_contiguous
from protune_mm.lean.memory import kept_bytes
from protune_mm.tuned import prompt_parameters

from .plan import Study
from .run_config import config_of, steps_of
from .runs import Run
from .scenarios import check_scenarios, scenario_metrics, scenario_scores, score


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


@functools.cache
def study_of(path: str) -> Study:
    """A study's file, read once a process."""
    return Study(path)


def train(path: str, key: str, settings: Mapping[str, str] | None = None) -> dict:
    """Do one run, whose data :func:`check_data` has seen.

    Args:
        path: the study's file.
        key: see :class:`Run`.
        settings: of the runs by key, as the study had them when it was begun. Default: as it has
            them now.

    Returns:
        dict: ``key``, ``status`` ('ok' or 'diverged') and ``lines``, one for each metric.

    Raises:
        HopelessError: the run has another setting now.
    """
    study, run = study_of(path), Run.of(key)
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    # The runner formats its config for its log five times, which takes seconds a run.
    plain = mock.patch('mmengine.config.config.FormatCode', lambda text, **_: (text, True))
    with tempfile.TemporaryDirectory(prefix='study_') as work, plain:
        cfg, setting = read_config(study, run, work, settings)
        task = study.tasks[run.task]
        runner = cli.build_runner(cfg)
        check_scenarios(runner, task)
        if task.get('channels_last'):
            to_channels_last(runner.model)
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
            loops = dict(val=runner.val_loop, test=runner.test_loop)
            evaluated = {split: loop.evaluator.metrics for split, loop in loops.items()}
            scores['test'] |= scenario_scores(runner, cfg, task, run)
    counts = backbone_counts(runner.model, cfg)
    # mmengine keeps what belongs to every experiment of a process.
    for manager in (MMLogger, MessageHub, Visualizer, DefaultScope):
        manager._instance_dict.clear()
    machine = dict(
        threads=torch.get_num_threads(),
        device=device_name(),
        processor=processor(),
        versions={'protune_mm': protune_mm.__version__, **stack_versions()},
    )
    lines = []
    metrics = [*task['metrics'], *scenario_metrics(task)]
    for metric in metrics:
        # Under corruption and attack, too, the validation score is the clean one.
        clean = metric if metric in task['metrics'] else task['metrics'][0]
        found = dict(val=0.0, test=0.0)
        if not diverged:
            found = {
                split: score(scores[split], name, run, evaluated[split])
                for split, name in (('val', clean), ('test', metric))
            }
        lines.append(
            dict(
                key=key,
                method=run.method,
                task=run.task,
                backbone=task['backbone'],
                fraction=run.fraction,
                seed=run.seed,
                lr=run.lr,
                lr_part=run.lr_part,
                setting=setting,
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
                command=f'python tools/study.py {path} --run "{key}"',
                **machine,
            )
        )
    return dict(key=key, status='diverged' if diverged else 'ok', reason='', lines=lines)


def read_config(
    study: Study, run: Run, work: str, settings: Mapping[str, str] | None
) -> tuple[Config, str]:
    """The config of a run as its file is now, and its setting, which follows from the same.

    Raises:
        HopelessError: the setting is another than that of ``settings``.
    """
    changed = HopelessError(
        f"task '{run.task}': {study.path}, or the config of the task, was changed since the study "
        'was begun: begin it again; runs whose settings are as before stay'
    )
    if run.task not in study.tasks or run.method not in study.known:
        raise changed
    study.forget_configs()
    cfg = config_of(study, run, work)
    # Read after the config: what was changed before either is seen.
    setting = study.setting(run)
    if settings is not None and settings.get(run.key) != setting:
        raise changed
    return cfg, setting


def to_channels_last(model: nn.Module) -> None:
    """Let a model run on channels-last maps, which on a CPU is faster."""
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        # RoIAlign gives wrong numbers, without an error, for maps in that memory.
        give_contiguous(module)
        if isinstance(module, NeedsContiguous):
            module.to(memory_format=torch.contiguous_format)


def is_finite(model: BaseModel) -> bool:
    """Whether all weights that train are numbers."""
    return all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)


def peak_memory(runner: Runner) -> int:
    """Bytes: on a GPU the peak of the run; on a CPU what one step keeps for its backward pass."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    model: BaseModel = runner.model.train()
    data = next(iter(runner.train_loop.dataloader))
    data = model.data_preprocessor(data, True)
    # The passes are not to count in the statistics of batch norms: the model is scored yet.
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    kept = kept_bytes(lambda: model(**data, mode='loss'))
    for name, buffer in model.named_buffers():
        if name in before and not torch.equal(buffer, before[name]):
            buffer.copy_(before[name])
    return kept


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
