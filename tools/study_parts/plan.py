"""What a study compares: its file, the methods, and the list of all runs."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import os

from mmengine.config import Config

from protune_mm import load_config
from protune_mm.inject import RATIOS, SHARE
from protune_mm.prompt_config import NAMED_PROMPTS, chooses_width, prompt_class, prompt_config

from .methods import METHODS
from .plan_checks import check_study
from .runs import Run


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
    the multiple of every method is halved, so that the head alone trains faster: that of the task
    or of its options, else that of the config. Head-only has each rate once.

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
        #: What each method adds to the backbone, those of the file among them.
        self.known = {**METHODS, **self.variants}
        self.methods, self.lrs, self.seeds = cfg.methods, cfg.lrs, cfg.seeds
        self.options = cfg.get('options', {})
        self.note = cfg.get('note', '')
        self.results_name = 'results.jsonl'
        self._configs: dict[str, str] = {}
        self._multiples: dict[str, dict[str, float]] = {}
        check_study(self)

    def forget_configs(self) -> None:
        """Read the configs of tasks again where they are asked for: they may have changed."""
        self._configs.clear()
        self._multiples.clear()

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
            ValueError: a part is asked for, and the method trains nothing in the backbone.
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
                found[key] = self._config_multiples(task)[key]
            found[key] = round(found[key] * lr_part, 12)
        return found

    def _config_multiples(self, task: str) -> dict[str, float]:
        """The multiples that a task's config has, or leaves at one."""
        if task not in self._multiples:
            plan = self.tasks[task]
            cfg = load_config(plan['config'], cfg_options=dict(plan.get('cfg_options', {})))
            rules = cfg.get('optim_wrapper', {}).get('paramwise_cfg') or {}
            backbone = (rules.get('custom_keys') or {}).get('backbone', {})
            self._multiples[task] = dict(
                prompt_lr_mult=rules.get('prompt_lr_mult', 1.0),
                full_lr_mult=backbone.get('lr_mult', 1.0),
            )
        return self._multiples[task]

    def _own_options(self, task: str, method: str) -> dict:
        """Those of a method, without what a task says of all."""
        plan = self.tasks[task]
        found = copy.deepcopy(self.known[method])
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
