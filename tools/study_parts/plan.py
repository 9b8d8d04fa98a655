"""What a study compares: its file, the methods, and the list of all runs."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

METHODS: dict[str, dict] = {
    'full': dict(policy='full'),
    'head-only': dict(policy='head-only'),
    'pro-tuning': dict(),
    'bias': dict(policy='bias'),
    'norm': dict(policy='norm'),
    'last-k': dict(policy='last-1'),
    'adapter': dict(prompt=dict(type='Adapter')),
    'conv-adapter': dict(prompt=dict(type='ConvAdapter')),
    'lora': dict(prompt=dict(type='LoRA')),
    'mona': dict(prompt=dict(type='Mona')),
    'lorand': dict(prompt=dict(type='LoRand')),
}
"""Name of a method to what it adds to the line of a Pro-tuned backbone."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        task: name in the study's file.
        method: one of :data:`METHODS`, or a variant that the file names.
        fraction: part of the training set.
        lr: base learning rate.
        seed: of the run, and of the part of the training set.
    """

    task: str
    method: str
    fraction: float
    lr: float
    seed: int

    @property
    def key(self) -> str:
        """What tells this run from all others."""
        return f'{self.task} {self.method} {self.fraction:g} {self.lr:g} {self.seed}'

    @classmethod
    def of(cls, key: str) -> Run:
        """The run of a key."""
        task, method, fraction, lr, seed = key.split(' ')
        return cls(task, method, float(fraction), float(lr), int(seed))


class Study:
    """A study's file: ``tasks``, ``methods``, ``lrs``, ``seeds``, and ``options``, ``variants``.

    A task has ``config``, ``backbone``, ``metrics``, ``fractions`` and ``steps``, and may have
    ``few_steps`` (below half of the labels), ``lrs`` of its own, ``cfg_options``, ``long_tail``
    (the ratio of :class:`protune_mm.datasets.LongTailed`), and ``scenarios``: ``severities`` of
    the common corruptions, ``attacks`` with budgets in 255ths, on ``every`` such test image.

    Args:
        path: of a file such as ``configs/study/cpu.py``.

    Raises:
        ValueError: it names an unknown method, or lacks a part.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        cfg = Config.fromfile(path)
        lacking = [k for k in ('tasks', 'methods', 'lrs', 'seeds') if k not in cfg]
        if lacking:
            raise ValueError(
                f'{path} has no `{lacking[0]}`: a study has tasks, methods, lrs, seeds'
            )
        self.tasks = {name: dict(task) for name, task in cfg.tasks.items()}
        self.variants = {name: dict(what) for name, what in cfg.get('variants', {}).items()}
        self.methods = list(cfg.methods)
        self.lrs, self.seeds = list(cfg.lrs), list(cfg.seeds)
        self.options = cfg.get('options', {})
        known = {**METHODS, **self.variants}
        for method in self.methods:
            if method not in known:
                raise ValueError(f"{path}: method '{method}' is unknown: use {', '.join(known)}")
        for name, task in self.tasks.items():
            if '::' not in task['config'] and not Path(task['config']).exists():
                raise ValueError(f"{path}: task '{name}' has no config {task['config']}")

    def runs(self) -> list[Run]:
        """All runs: what can be compared first comes first."""
        return [
            Run(name, method, fraction, lr, seed)
            for name, task in self.tasks.items()
            for fraction, seed, method, lr in itertools.product(
                task['fractions'], self.seeds, self.methods, task.get('lrs', self.lrs)
            )
        ]

    def backbone_options(self, task: str, method: str) -> dict:
        """What a method adds to the backbone of a task's config."""
        if method in self.variants:
            return copy.deepcopy(self.variants[method])
        found = copy.deepcopy(METHODS[method])
        family = self.options.get(self.tasks[task]['backbone'], {})
        for key, value in (family.get(method) or {}).items():
            found[key] = {**found.get(key, {}), **value} if isinstance(value, dict) else value
        return found
