"""What is wrong with the file of a study, told before anything is built from it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from protune_mm.robustness import check_budgets, check_metric

from .methods import METHODS
from .runs import is_rate

if TYPE_CHECKING:
    from .plan import Study

NEEDED = ('config', 'backbone', 'metrics', 'fractions', 'steps')
OPTIONAL = (
    'few_steps', 'lrs', 'cfg_options', 'channels_last', 'long_tail', 'scenarios', 'prompt_lr_mult',
    'full_lr_mult', 'validate_on_rest', 'methods', 'options', 'seeds',
)  # fmt: skip
"""Keys of a task."""
SCENARIOS = ('every', 'severities', 'shifts', 'attacks')
"""Keys of a task's scenarios."""


def check_study(study: Study) -> None:
    """Look at all that the file of a study says.

    Raises:
        ValueError: what is wrong, with the name of the file and task.
    """
    path = study.path
    for name in study.variants:
        if name in METHODS:
            raise ValueError(f"{path}: variant '{name}' has the name of a method: use another")
    for name in (*study.tasks, *study.variants):
        if ' ' in name:
            raise ValueError(
                f"{path}: '{name}' has a space, which parts the key of a run: "
                f"use '{name.replace(' ', '-')}'"
            )
    for key in ('methods', 'lrs', 'seeds'):
        _check_list(path, key, getattr(study, key))
    _check_methods(study, path, study.methods)
    _check_seeds(path, study.seeds)
    for backbone, by_method in study.options.items():
        _check_methods(study, f"{path}: options of '{backbone}'", by_method)
    for name in study.tasks:
        _check_task(study, name)


def _check_list(where: str, key: str, value: object) -> None:
    if isinstance(value, (str, dict)) or not isinstance(value, Iterable):
        raise ValueError(f'{where}: {key}={value!r} is no list: use [{value!r}]')


def _check_methods(study: Study, where: str, methods: Iterable[str]) -> None:
    for method in methods:
        if method not in study.known:
            raise ValueError(f"{where}: method '{method}' is unknown: use {', '.join(study.known)}")


def _check_seeds(where: str, seeds: list) -> None:
    whole = all(isinstance(seed, int) and seed >= 0 for seed in seeds)
    if not (seeds and whole and len({*seeds}) == len(seeds)):
        raise ValueError(f'{where}: seeds={seeds}: use different whole numbers, [0, 1, 2]')


def _check_task(study: Study, name: str) -> None:
    where, task = f"{study.path}: task '{name}'", study.tasks[name]
    for key in NEEDED:
        if key not in task:
            raise ValueError(f'{where} has no `{key}`: a task has {", ".join(NEEDED)}')
    for key in task:
        if key not in NEEDED + OPTIONAL:
            raise ValueError(
                f'{where} has `{key}`, which is unknown: a task may have {", ".join(OPTIONAL)}'
            )
    for key in ('metrics', 'fractions', 'methods', 'lrs', 'seeds'):
        _check_list(where, key, task.get(key, []))
    if study.options and task['backbone'] not in study.options:
        raise ValueError(
            f"{where}: options has none for backbone='{task['backbone']}': it has "
            f"{', '.join(study.options)}; add '{task['backbone']}': {{}} if there are none"
        )
    _check_methods(study, where, task.get('methods', ()))
    _check_seeds(where, study.seeds_of(name))
    for key in ('metrics', 'fractions', 'methods'):
        choices = task.get(key, study.methods)  # Only methods may be left out.
        if not choices:
            raise ValueError(f'{where}: {key}=[] names none')
        if len({*choices}) < len(choices):
            raise ValueError(f'{where}: {key}={list(choices)} names one twice: leave it out')
    for metric in task['metrics']:
        try:
            check_metric(metric)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
    _check_methods(study, f'{where}: options', task.get('options', ()))
    for key in ('prompt_lr_mult', 'full_lr_mult'):
        if not task.get(key, 1) > 0:
            raise ValueError(f'{where}: {key}={task[key]} is no factor: use > 0')
    _check_scenarios(where, task)
    if '::' not in task['config'] and not Path(task['config']).exists():
        raise ValueError(f'{where} has no config {task["config"]}')
    _check_rates(study, where, name)  # It may read the config.
    if task.get('validate_on_rest') and (
        'long_tail' in task
        or any(metric.startswith(('coco/', 'lvis/')) for metric in task['metrics'])
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


def _check_rates(study: Study, where: str, name: str) -> None:
    task = study.tasks[name]
    lrs = list(task.get('lrs', study.lrs))
    try:
        rates = study.rates_of(name)
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
    for method in task.get('methods', study.methods):
        for _, part in study.rates_of(name, method):
            study.backbone_options(name, method, part)


def _check_scenarios(where: str, task: dict) -> None:
    wanted = task.get('scenarios', {})
    if not isinstance(wanted, dict):
        raise ValueError(f'{where}: scenarios={wanted}: use a dict, or leave it out')
    for key in wanted:
        if key not in SCENARIOS:
            raise ValueError(f'{where}: scenarios.{key} is unknown: use {", ".join(SCENARIOS)}')
    every = wanted.get('every', 1)
    if not isinstance(every, int) or every < 1:
        raise ValueError(f'{where}: scenarios.every={every!r}: use a whole number from 1 on')
    _check_list(where, 'scenarios.severities', wanted.get('severities', []))
    for severity in wanted.get('severities', ()):
        if severity not in range(1, 6):
            raise ValueError(f'{where}: scenarios.severities has {severity}: use 1 to 5')
    for key in ('shifts', 'attacks'):
        if not isinstance(wanted.get(key, {}), dict):
            raise ValueError(f'{where}: scenarios.{key}={wanted[key]!r}: use a dict by name')
    for shift, steps in wanted.get('shifts', {}).items():
        _check_list(where, f'scenarios.shifts.{shift}', steps)
    for attack, budgets in wanted.get('attacks', {}).items():
        try:
            check_budgets(attack, budgets)
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error
        if not task['metrics'][0].startswith(('accuracy/', 'shots/', 'single-label/')):
            raise ValueError(
                f'{where}: attacks are for classifiers; {task["metrics"][0]} is no accuracy'
            )
