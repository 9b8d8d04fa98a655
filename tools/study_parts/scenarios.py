"""Scores of a run on its test split: clean, corrupted, shifted, attacked."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

from jobs import HopelessError
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner, TestLoop

from protune_mm.robustness import (
    CORRUPTIONS,
    AttackLoop,
    after_loading,
    check_attack,
    corrupted,
    found_nothing,
    per_cent,
    summary,
)

from .run_config import count_shown, evaluators_of
from .runs import Run


def scenario_metrics(task: dict) -> dict[str, str]:
    """Names of the scores under corruption and attack that a task asks for, and what each is of."""
    wanted = task.get('scenarios', {})
    names = {f'100 - mCE, severity {s}': 'corruption' for s in wanted.get('severities', ())}
    names |= {f'shifted, {name}': 'other domains' for name in wanted.get('shifts', ())}
    return names | {
        f'{attack}, {budget:g}/255': 'attacks'
        for attack, budgets in wanted.get('attacks', {}).items()
        for budget in budgets
    }


def scenario_scores(runner: Runner, cfg: Config, task: dict, run: Run) -> dict[str, float]:
    """Scores under corruption and attack, on a part of the test split."""
    wanted = task.get('scenarios')
    if not wanted:
        return {}
    cfg = copy.deepcopy(cfg)
    plain = cfg.test_dataloader
    every = wanted.get('every', 1)
    if every > 1:
        chosen = plain.dataset.get('indices')
        if not isinstance(chosen, (list, tuple)):  # A number stands for the first so many.
            chosen = range(len(runner.test_dataloader.dataset))
        plain.dataset.indices = list(chosen)[::every]
        count_shown(evaluators_of(cfg, 'test'), plain.dataset)
    metric, found = task['metrics'][0], {}

    def test(dataloader: dict) -> float:
        # With the seed what its workers draw is the same for all methods.
        loader = runner.build_dataloader(dataloader, seed=runner.seed)
        evaluator = runner.build_evaluator(copy.deepcopy(cfg.test_evaluator))
        runner._test_loop = TestLoop(runner, loader, evaluator)
        found = runner.test()
        return score(found, metric, run, runner.test_loop.evaluator.metrics)

    for name, steps in wanted.get('shifts', {}).items():
        # In points of 100, as all scores that are not of a metric of the task.
        score_there = test(after_loading(plain, list(steps)))
        found[f'shifted, {name}'] = score_there * (1 if per_cent(metric) else 100)
    for severity in wanted.get('severities', ()):
        scores = {
            (name, severity): test(corrupted(plain, name, severity, cache=True))
            for name in CORRUPTIONS
        }
        error = summary(1.0, scores, per_cent(metric))['mCE']
        found[f'100 - mCE, severity {severity}'] = 100 - error
    for attack, budgets in wanted.get('attacks', {}).items():
        loader = runner.build_dataloader(plain, seed=runner.seed)
        runner._test_loop = AttackLoop(runner, loader, attack, [b / 255 for b in budgets])
        found |= runner.test()
    return found


def check_scenarios(runner: Runner, task: dict) -> None:
    """Refuse attacks that a task's model cannot have, before it is trained.

    Raises:
        ValueError: it is no classifier, or one of too few classes.
    """
    for attack, budgets in task.get('scenarios', {}).get('attacks', {}).items():
        subset = runner.test_dataloader.dataset.metainfo.get('subset')
        check_attack(runner.model, attack, budgets, subset)


def score(found: dict, metric: str, run: Run, metrics: Iterable[BaseMetric]) -> float:
    """One of the scores of a run that did not diverge.

    Args:
        found: all of them.
        metric: the name of the one.
        run: whose they are.
        metrics: of the evaluator.

    Raises:
        HopelessError: it is not among them, and so will not be for other runs.
        ValueError: it is no number.
    """
    if found_nothing(metric, found, metrics):
        return 0.0
    there = ', '.join(f'{key} {value}' for key, value in found.items())
    told = f"task '{run.task}': no score {metric}: there are {there}"
    if metric not in found:
        raise HopelessError(told)
    if not math.isfinite(found[metric]):
        raise ValueError(told)
    return float(found[metric])
