"""What a study compares: its file, the methods, and the list of all runs."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mmengine.config import Config

from protune_mm import load_config
from protune_mm.inject import RATIOS, SHARE
from protune_mm.prompt_config import NAMED_PROMPTS, chooses_width, prompt_class, prompt_config
from protune_mm.robustness import CORRUPTIONS, Corrupt, attack_library, check_budgets

from .runs import Run, is_rate

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


NEEDED = ('config', 'backbone', 'metrics', 'fractions', 'steps')
OPTIONAL = (
    'few_steps', 'lrs', 'cfg_options', 'channels_last', 'long_tail', 'scenarios', 'prompt_lr_mult',
    'full_lr_mult', 'validate_on_rest', 'methods', 'options', 'seeds',
)  # fmt: skip
"""Keys of a task."""
SCENARIOS = ('every', 'severities', 'shifts', 'attacks')
"""Keys of a task's scenarios."""


class Study:
    """A study's file: ``tasks``, ``methods``, ``lrs``, ``seeds``, and ``options``, ``variants``.

    A task has ``config``, ``backbone``, ``metrics``, ``fractions`` and ``steps``, and may have
    ``few_steps`` (below half of the labels), ``lrs``, ``seeds`` and ``methods`` of its own,
    ``cfg_options``, ``channels_last`` (the memory of the model's maps), ``long_tail`` (the ratio of
    :class:`protune_mm.datasets.LongTailed`), ``prompt_lr_mult`` (over the rate of the head, that of
    what a method trains in the backbone), ``full_lr_mult`` (the same for full fine-tuning, of which
    else the config tells), ``validate_on_rest`` (training images that a fraction leaves out
    validate too, because a few hundred choose a rate by chance), and ``scenarios``: ``severities``
    of the common corruptions, ``shifts`` (transforms that make another domain of the test split, by
    name), ``attacks`` with budgets in 255ths, on ``every`` such test image.

    ``lrs`` is the grid of base learning rates. A pair in it, ``(6e-2, 0.5)``, is a rate at which
    the multiple of every method is halved, so that the head alone trains faster. Every method must
    have one then, of the task or of its options; head-only has each rate once.

    ``options`` (by backbone, then method, ``{}`` for a backbone without; of a task by method, over
    those) and ``variants`` (methods of this file) are what the line of the backbone gets, and
    besides ``prompt_lr_mult`` and ``prompt_warmup``, the part of the steps that
    :class:`protune_mm.optim.PromptWarmup` takes. ``note`` is a sentence for the report.

    Args:
        path: of a file such as ``configs/study/cpu.py``.

    Raises:
        ValueError: a method is unknown, a variant has the name of a method, a task lacks a part or
            has one that is unknown or out of range, or the options leave out its backbone.
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
        self.note = cfg.get('note', '')
        self.results_name = 'results.jsonl'
        self._configs: dict[str, str] = {}
        for name in self.variants:
            if name in METHODS:
                raise ValueError(f"{path}: variant '{name}' has the name of a method: use another")
        for name in (*self.tasks, *self.variants):
            if ' ' in name:
                raise ValueError(
                    f"{path}: '{name}' has a space, which parts the key of a run: "
                    f"use '{name.replace(' ', '-')}'"
                )
        self._check_methods(path, self.methods)
        self._check_seeds(path, self.seeds)
        for backbone, by_method in self.options.items():
            self._check_methods(f"{path}: options of '{backbone}'", by_method)
        for name, task in self.tasks.items():
            self._check_task(name, task)

    def _check_methods(self, where: str, methods: Iterable[str]) -> None:
        known = {**METHODS, **self.variants}
        for method in methods:
            if method not in known:
                raise ValueError(f"{where}: method '{method}' is unknown: use {', '.join(known)}")

    @staticmethod
    def _check_seeds(where: str, seeds: list) -> None:
        whole = all(isinstance(seed, int) and seed >= 0 for seed in seeds)
        if not (seeds and whole and len({*seeds}) == len(seeds)):
            raise ValueError(f'{where}: seeds={seeds}: use different whole numbers, [0, 1, 2]')

    def _check_task(self, name: str, task: dict) -> None:
        where = f"{self.path}: task '{name}'"
        for key in NEEDED:
            if key not in task:
                raise ValueError(f'{where} has no `{key}`: a task has {", ".join(NEEDED)}')
        for key in task:
            if key not in NEEDED + OPTIONAL:
                raise ValueError(
                    f'{where} has `{key}`, which is unknown: a task may have {", ".join(OPTIONAL)}'
                )
        if self.options and task['backbone'] not in self.options:
            raise ValueError(
                f"{where}: options has none for backbone='{task['backbone']}': it has "
                f"{', '.join(self.options)}; add '{task['backbone']}': {{}} if there are none"
            )
        self._check_methods(where, task.get('methods', ()))
        self._check_seeds(where, self.seeds_of(name))
        for key, choices in (
            ('fractions', task['fractions']),
            ('methods', task.get('methods', self.methods)),
        ):
            if len({*choices}) < len(choices):
                raise ValueError(f'{where}: {key}={list(choices)} names one twice: leave it out')
        self._check_methods(f'{where}: options', task.get('options', ()))
        for key in ('prompt_lr_mult', 'full_lr_mult'):
            if not task.get(key, 1) > 0:
                raise ValueError(f'{where}: {key}={task[key]} is no factor: use > 0')
        self._check_rates(where, name)
        self._check_scenarios(where, task)
        if '::' not in task['config'] and not Path(task['config']).exists():
            raise ValueError(f'{where} has no config {task["config"]}')
        if task.get('validate_on_rest') and (
            'long_tail' in task or any(metric.startswith('coco/') for metric in task['metrics'])
        ):
            raise ValueError(
                f'{where}: validate_on_rest is for data sets without a long tail, and not for '
                'metrics that read an annotation file'
            )
        for fraction in task['fractions']:
            if not 0 < fraction <= 1:
                raise ValueError(f'{where}: fraction {fraction} is no part of the labels')
        for key in ('steps', 'few_steps'):
            if task.get(key, 2) < 2:
                raise ValueError(f'{where}: {key}={task[key]} leaves no step after the warm-up')

    def _check_rates(self, where: str, name: str) -> None:
        lrs, task = list(self._lrs(name)), self.tasks[name]
        try:
            rates = self.rates_of(name)
            good = rates and all(is_rate(*rate) for rate in rates)
        except (TypeError, ValueError):
            good = False
        if not good:
            raise ValueError(
                f'{where}: lrs={lrs} is no grid of learning rates: use [1e-3, 3e-3], or '
                '[1e-3, (3e-3, 0.5)] for one with half of the multiples in the backbone'
            )
        if len({*rates}) < len(rates):
            raise ValueError(f'{where}: lrs={lrs} names one twice: leave it out')
        for method in task.get('methods', self.methods):
            for _, part in self.rates_of(name, method):
                self.backbone_options(name, method, part)

    @staticmethod
    def _check_scenarios(where: str, task: dict) -> None:
        wanted = task.get('scenarios', {})
        if not isinstance(wanted, dict):
            raise ValueError(f'{where}: scenarios={wanted}: use a dict, or leave it out')
        for key in wanted:
            if key not in SCENARIOS:
                raise ValueError(f'{where}: scenarios.{key} is unknown: use {", ".join(SCENARIOS)}')
        for severity in wanted.get('severities', ()):
            if severity not in range(1, 6):
                raise ValueError(f'{where}: scenarios.severities has {severity}: use 1 to 5')
        for attack, budgets in wanted.get('attacks', {}).items():
            try:
                check_budgets(attack, budgets)
            except ValueError as error:
                raise ValueError(f'{where}: {error}') from error
            if not task['metrics'][0].startswith(('accuracy/', 'shots/', 'single-label/')):
                raise ValueError(
                    f'{where}: attacks are for classifiers; {task["metrics"][0]} is no accuracy'
                )

    def check_ready(self, tasks: Iterable[str]) -> None:
        """Look for what some tasks need, before the first run.

        Raises:
            ValueError: a config has no dataloader of a split, or one of which no part can be shown.
            ModuleNotFoundError: a library that corrupts or attacks is not installed.
        """
        for name in tasks:
            task = self.tasks[name]
            cfg = load_config(task['config'], cfg_options=dict(task.get('cfg_options', {})))
            for split in ('train', 'val', 'test'):
                if not cfg.get(f'{split}_dataloader'):
                    raise ValueError(
                        f"{self.path}: task '{name}': {task['config']} has no {split}_dataloader"
                    )
            wanted = task.get('scenarios', {})
            tested = cfg.test_dataloader.dataset
            if wanted.get('every', 1) > 1 and {'dataset', 'datasets'} & set(tested):
                raise ValueError(
                    f"{self.path}: task '{name}': scenarios.every={wanted['every']} is for a plain "
                    f'test data set, not for {tested.type} around another: leave it out'
                )
            start = tested.get('indices')
            if wanted.get('every', 1) > 1 and isinstance(start, int) and start < 0:
                raise ValueError(
                    f"{self.path}: task '{name}': scenarios.every={wanted['every']} cannot count "
                    f'from the end: give the test data set a list in place of indices={start}'
                )
            if wanted.get('severities'):
                Corrupt(CORRUPTIONS[0], 1)
            if wanted.get('attacks'):
                attack_library()

    def runs(self) -> list[Run]:
        """All runs: what can be compared first comes first."""
        return [
            Run(name, method, fraction, lr, seed, part)
            for name, task in self.tasks.items()
            for fraction, seed, method in itertools.product(
                task['fractions'], self.seeds_of(name), task.get('methods', self.methods)
            )
            for lr, part in self.rates_of(name, method)
        ]

    def _lrs(self, task: str) -> list:
        return self.tasks[task].get('lrs', self.lrs)

    def rates_of(self, task: str, method: str | None = None) -> list[tuple[float, float]]:
        """The grid of a task: learning rates, and what multiplies the multiples in the backbone.

        Args:
            task: its name.
            method: without, the points of all methods. One that trains nothing in the backbone has
                each learning rate once.
        """
        pairs = [lr if isinstance(lr, (list, tuple)) else (lr, 1.0) for lr in self._lrs(task)]
        # As a key tells them: a run knows no more digits.
        rates = [(float(f'{lr:g}'), float(f'{part:g}')) for lr, part in pairs]
        if method and not self._multiple(self._own_options(task, method)):
            rates = [*dict.fromkeys((lr, 1.0) for lr, _ in rates)]
        return rates

    def seeds_of(self, task: str) -> list[int]:
        """The seeds of a task."""
        return list(self.tasks[task].get('seeds', self.seeds))

    @staticmethod
    def _multiple(options: dict) -> str:
        """Which multiple of the rate is that of a method; none of head-only."""
        policy = options.get('policy')
        return {'full': 'full_lr_mult', 'head-only': ''}.get(policy, 'prompt_lr_mult')

    def backbone_options(self, task: str, method: str, lr_part: float = 1.0) -> dict:
        """What a method adds to the backbone of a task's config.

        Args:
            task: name of the task.
            method: name of the method.
            lr_part: what its multiple of the rate is multiplied by.

        Raises:
            ValueError: a part is asked for, and neither the task nor the method has the multiple.
        """
        found, plan = self._own_options(task, method), self.tasks[task]
        key = self._multiple(found)
        if key in plan:
            found.setdefault(key, plan[key])
        if lr_part != 1:
            where = f"{self.path}: task '{task}'"
            if not key:
                raise ValueError(
                    f"{where}: '{method}' trains nothing in the backbone of which a rate could "
                    f'have x{lr_part:g}: leave that out'
                )
            if key not in found:
                raise ValueError(
                    f'{where}: a rate has x{lr_part:g} of the multiple in the backbone, and that '
                    f"of '{method}' is left to the config: tell it, by {key} of the task or of the "
                    "method's options"
                )
            found[key] = round(found[key] * lr_part, 12)
        return found

    def _own_options(self, task: str, method: str) -> dict:
        """Those of a method, without what a task says of all."""
        plan = self.tasks[task]
        if method in self.variants:
            found = copy.deepcopy(self.variants[method])
        else:
            found = copy.deepcopy(METHODS[method])
            _update(found, self.options.get(plan['backbone'], {}).get(method))
        _update(found, plan.get('options', {}).get(method))
        return found

    def setting(self, run: Run) -> str:
        """A digest of all that a run's result follows from, but for the code of the libraries.

        Results of another setting (other steps, options or defaults of a prompt) are none of this
        study. What is off by default and not asked for counts as not there, so that results stay
        when a prompt gets an option.
        """
        # A multiplier is among the options of the methods that it concerns.
        apart = [
            'fractions', 'lrs', 'seeds', 'methods', 'options', 'prompt_lr_mult', 'full_lr_mult',
        ]  # fmt: skip
        if run.fraction == 1:
            apart.append('validate_on_rest')  # There is no rest.
        task = {k: v for k, v in self.tasks[run.task].items() if k not in apart}
        options = self.backbone_options(run.task, run.method, run.lr_part)
        plan = dict(task=task, config=self._config(task['config']), options=options)
        if options.get('policy', 'prompts') == 'prompts':
            given = options.pop('prompt', None)
            prompt = prompt_config(given)
            defaults = _defaults(prompt_class(prompt))
            whole = {**defaults, **prompt}
            plan['prompt'] = {
                key: value
                for key, value in whole.items()
                if value or key not in defaults or value != defaults[key]
            }
            plan['width'] = None if chooses_width(given) else (SHARE, RATIOS)
        return hashlib.sha1(json.dumps(plan, sort_keys=True, default=str).encode()).hexdigest()[:12]

    def _config(self, path: str) -> str:
        """A task's config as text, without the folders of this machine."""
        if path not in self._configs:
            text = json.dumps(load_config(path).to_dict(), sort_keys=True, default=str)
            folders = (
                os.environ.get('PROTUNE_DATA', 'data'),
                os.environ.get('PROTUNE_WEIGHTS', 'weights'),
            )
            for folder in sorted(folders, key=len, reverse=True):  # One may be inside the other.
                text = text.replace(f'"{folder.rstrip("/")}/', '"/')
            self._configs[path] = text
        return self._configs[path]


def _update(found: dict, chosen: dict | None) -> None:
    """Add options of a method to what it has; of a prompt, option by option."""
    for key, value in (chosen or {}).items():
        old = found.get(key)
        if isinstance(value, dict):
            # A prompt may be told by its name.
            found[key] = {**(NAMED_PROMPTS[old] if isinstance(old, str) else old or {}), **value}
        else:
            found[key] = value


def _defaults(kind: type) -> dict:
    """Options of a prompt type that have a default, but for what the layer beside it decides."""
    given = inspect.signature(kind).parameters.values()
    own = ('conv_type', 'padding_mode')
    return {p.name: p.default for p in given if p.default is not p.empty and p.name not in own}
