"""What a study's runs need of its configs and data sets, looked at before the first of them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from protune_mm import load_config
from protune_mm.config import library
from protune_mm.datasets.rest import check_rest
from protune_mm.registry import type_name
from protune_mm.robustness import CORRUPTIONS, Corrupt, after_loading, attack_library, corrupted

from .plan import Study
from .run_config import config_of, evaluators_of, holder_of
from .runs import Run


def check_ready(study: Study, tasks: Iterable[str]) -> None:
    """Look for what some tasks need, before the first run.

    Raises:
        ValueError: a config has no dataloader of a split, one of which no part can be shown, or one
            whose images cannot be changed as the scenarios ask.
        ModuleNotFoundError: a library that corrupts or attacks is not installed.
    """
    for name in tasks:
        task, where = study.tasks[name], f"{study.path}: task '{name}'"
        cfg = load_config(task['config'], cfg_options=dict(task.get('cfg_options', {})))
        for split in ('train', 'val', 'test'):
            if not cfg.get(f'{split}_dataloader'):
                raise ValueError(f'{where}: {task["config"]} has no {split}_dataloader')
        try:
            _check_rest(cfg, task)
            _check_scenarios(cfg, task.get('scenarios', {}))
        except ValueError as error:
            raise ValueError(f'{where}: {error}') from error


def _check_rest(cfg: Config, task: dict) -> None:
    """Refuse ``validate_on_rest`` where it is not clear which pipelines to exchange."""
    if not task.get('validate_on_rest'):
        return
    holders = dict(train=holder_of(cfg.train_dataloader), val=cfg.val_dataloader)
    for split, holder in holders.items():
        dataset = holder['dataset']
        if 'pipeline' not in dataset:
            raise ValueError(
                f'validate_on_rest is for a plain data set, and the {split} split is '
                f'{type_name(dataset)} around others: leave it out'
            )


def _check_scenarios(cfg: Config, wanted: dict) -> None:
    loader, every = cfg.test_dataloader, wanted.get('every', 1)
    tested = loader.dataset
    if every > 1 and {'dataset', 'datasets'} & set(tested):
        raise ValueError(
            f'scenarios.every={every} is for a plain test data set, not for {tested.type} around '
            'another: leave it out'
        )
    start = tested.get('indices')
    if every > 1 and isinstance(start, int) and start < 0:
        raise ValueError(
            f'scenarios.every={every} cannot count from the end: give the test data set a list in '
            f'place of indices={start}'
        )
    for shift, steps in wanted.get('shifts', {}).items():
        after_loading(loader, list(steps))
        for step in steps:
            try:
                with DefaultScope.overwrite_default_scope(library(cfg)):
                    TRANSFORMS.build(copy.deepcopy(step))
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                told = str(error).strip('"\'')
                raise ValueError(f'scenarios.shifts.{shift}: {step}: {told}') from error
    if wanted.get('severities'):
        corrupted(loader, CORRUPTIONS[0], 1)
        Corrupt(CORRUPTIONS[0], 1)
    if wanted.get('attacks'):
        attack_library()


def check_apart(cfg: Config) -> None:
    """Refuse a task that trains on images it chooses or is tested by, or chooses by test images.

    Raises:
        ValueError: two of its splits have an image in common, or it cannot be told.
    """
    seen: dict[str, set] = {}
    with DefaultScope.overwrite_default_scope(library(cfg)):
        for split in ('train', 'val', 'test'):
            dataset = DATASETS.build(copy.deepcopy(cfg[f'{split}_dataloader'].dataset))
            found = {_image_of(dataset.get_data_info(i), split) for i in range(len(dataset))}
            for other, images in seen.items():
                if found & images:
                    raise ValueError(
                        f'{len(found & images)} of {len(found)} images of its {split} split are '
                        f'in its {other} split: give them images of their own, by '
                        'protune_mm.FewLabels and its rest=True, or by `indices`'
                    )
            seen[split] = found


def _image_of(info: dict, split: str) -> str | bytes:
    """What tells an image from all others: its file, by whatever path, or what it is."""
    if info.get('img_path'):
        return os.path.realpath(info['img_path'])
    if 'img' in info:  # Sets such as CIFAR hold their images and have no paths.
        return np.asarray(info['img']).tobytes()
    raise ValueError(
        f'images of its {split} split have neither img_path nor img, so it cannot be told whether '
        'its splits share some: let get_data_info of the data set return one of these'
    )


def check_changed(cfg: Config, wanted: dict) -> None:
    """Change the first test image as a task's scenarios ask, once for each kind of them.

    Raises:
        ValueError: that failed, as it would after the training.
    """
    loader = cfg.test_dataloader
    changed = {
        f'shifts.{name}': after_loading(loader, list(steps))
        for name, steps in wanted.get('shifts', {}).items()
    }
    if wanted.get('severities'):
        changed['severities'] = corrupted(loader, CORRUPTIONS[0], wanted['severities'][0])
    with DefaultScope.overwrite_default_scope(library(cfg)):
        for key, changing in changed.items():
            try:
                DATASETS.build(copy.deepcopy(changing['dataset']))[0]
            except Exception as error:
                raise ValueError(
                    f'scenarios.{key}: the first test image: {type(error).__name__}: {error}'
                ) from error


def pipelines(dataset: dict) -> Iterator[list[dict]]:
    """Those of a data set's config, within its wrappers."""
    if 'pipeline' in dataset:
        yield dataset['pipeline']
        return
    for inner in dataset.get('datasets') or [dataset.get('dataset')]:
        if inner:
            yield from pipelines(inner)


def check_evaluators(cfg: Config, every: int) -> None:
    """Refuse COCO's metric without an annotation file where no step gives it the boxes.

    Args:
        cfg: the config of a run.
        every: of its task's scenarios, which test on a part of the images where it is above 1.

    Raises:
        ValueError: the metric would fail after the training.
    """
    for split in ('val', 'test'):
        told = all(
            'instances' in step.get('meta_keys', ())
            for pipeline in pipelines(cfg[f'{split}_dataloader'].dataset)
            for step in pipeline
            if type_name(step) == 'PackDetInputs'
        )
        for evaluator in evaluators_of(cfg, split):
            alone = not evaluator.get('ann_file') or (split == 'test' and every > 1)
            kind = type_name(evaluator)
            if kind in ('CocoMetric', 'LVISMetric') and alone and not told:
                raise ValueError(
                    f'the {split} split is a part of the images, so {kind} takes the boxes '
                    f"from them: add LoadAnnotations to its pipeline, and 'instances' to the "
                    'meta_keys of PackDetInputs'
                )


def check_data(study: Study, runs: Iterable[Run]) -> None:
    """Build the data sets of each task, fraction and seed of some runs, before the first of them.

    Raises:
        ValueError: a fraction leaves a class empty, two splits have an image in common, or an
            image cannot be changed as the scenarios ask.
    """
    first = {(run.task, run.fraction, run.seed): run for run in runs}
    for run in first.values():
        try:
            cfg = config_of(study, run, '')
            check_rest(cfg.train_dataloader, cfg.val_dataloader)
            check_apart(cfg)
            task = study.tasks[run.task]
            wanted = task.get('scenarios', {})
            check_evaluators(cfg, wanted.get('every', 1))
            check_changed(cfg, wanted)
        except ValueError as error:
            where = f"task '{run.task}', fraction {run.fraction:g}, seed {run.seed}"
            raise ValueError(f'{where}: {error}') from error
