"""Whether a config trains on images that are to validate, or scores others than it shows."""

from __future__ import annotations

import itertools

from ..registry import type_name
from .subsets import FewLabels, LongTailed

WHOLE_FILE = ('CocoMetric', 'LVISMetric', 'CocoOccludedSeparatedMetric')
"""Metrics that score all images of their annotation file, shown or not."""


def check_rest(train: dict | None, val: dict | None) -> None:
    """Refuse to train on what validates, where one split is to be the rest of the other.

    Args:
        train: config of the training dataloader.
        val: of the one that validates.

    Raises:
        ValueError: both are of one data set, one is the rest of a part, and the other is no part
            within that part.
    """
    parts = [_part_of(loader.get('dataset')) if loader else None for loader in (train, val)]
    if None in parts or parts[0][0] != parts[1][0]:
        return
    # The first level that differs counts: up to it both are the same images, and what is chosen
    # further out stays within.
    levels = itertools.zip_longest(*(levels for _, levels in parts), fillvalue=_WHOLE)
    one, two = next((pair for pair in levels if pair[0] != pair[1]), (_WHOLE, _WHOLE))
    if one['rest'] == two['rest']:
        return
    rest, other = (one, two) if one['rest'] else (two, one)
    if other['seed'] != rest['seed'] or other['fraction'] > rest['fraction']:
        names = ['train', 'val'] if one['rest'] else ['val', 'train']
        raise ValueError(
            f'{names[0]}_dataloader has the rest of fraction={rest["fraction"]:g}, seed='
            f'{rest["seed"]}, and {names[1]}_dataloader fraction={other["fraction"]:g}, seed='
            f'{other["seed"]} of the same data set, so that images are in both: give both one '
            'seed, and the rest a fraction that is as large'
        )


def metrics_of(evaluator: dict | list | None) -> list:
    """The metrics of a split, from one, a list of them, or an evaluator around either."""
    found = evaluator.get('metrics', evaluator) if isinstance(evaluator, dict) else evaluator
    if isinstance(found, (list, tuple)):
        return list(found)
    return [] if found is None else [found]


def check_annotations(loader: dict | None, evaluator: dict | list | None) -> None:
    """Refuse a metric that reads more images from its file than are shown.

    MMDetection's ``CocoMetric`` counts every image of its ``ann_file`` that it was not shown as
    missed.

    Args:
        loader: config of a dataloader that validates or tests.
        evaluator: of its metrics.

    Raises:
        ValueError: the data set is a part of one, and a metric has an ``ann_file``.
    """
    if not loader or not shows_part(loader.get('dataset')):
        return
    for metric in metrics_of(evaluator):
        if isinstance(metric, dict) and metric.get('ann_file') and type_name(metric) in WHOLE_FILE:
            raise ValueError(
                f'the data set shows a part of its images, and {type_name(metric)} counts all of '
                f'{metric["ann_file"]}, those left out as missed: give it ann_file=None, and '
                "PackDetInputs of the pipeline 'instances' among its meta_keys"
                f'{_as_options(loader["dataset"])}'
            )


_NEEDED = ('img_id', 'ori_shape', 'img_shape', 'scale_factor')
"""Of what a detector's step packs, that which a score needs."""


def _as_options(dataset: dict) -> str:
    """The same for a command, where the data set itself has the pipeline."""
    for i, step in enumerate(dataset.get('pipeline') or ()):
        if type_name(step) == 'PackDetInputs':
            keys = [key for key in step.get('meta_keys', ()) if key != 'instances']
            keys = ','.join([*(keys or _NEEDED), 'instances'])
            return (
                '. For a quick look: --cfg-options test_evaluator.ann_file=None '
                f'"test_dataloader.dataset.pipeline.{i}.meta_keys=({keys})" (or val_)'
            )
    return ''


def shows_part(dataset: object) -> bool:
    """Whether a data set's config takes a part of the images of its annotation file."""
    if not isinstance(dataset, dict):
        return False
    whole = type_name(dataset) == FewLabels.__name__ and dataset.get('fraction') == 1
    part = type_name(dataset) in (FewLabels.__name__, LongTailed.__name__) and not whole
    if part or dataset.get('indices') is not None:
        return True
    return any(map(shows_part, dataset.get('datasets') or [dataset.get('dataset')]))


_WHOLE = dict(fraction=1.0, seed=0, rest=False)
"""What :class:`FewLabels` has where its config does not say, and all of a data set."""


def _part_of(dataset: object) -> tuple[dict, list[dict]] | None:
    """Which data set a config reads, and the parts that it takes of it, the innermost first."""
    levels = []
    while isinstance(dataset, dict) and isinstance(dataset.get('dataset'), dict):
        if type_name(dataset) == FewLabels.__name__:
            levels.insert(0, {key: dataset.get(key, value) for key, value in _WHOLE.items()})
        dataset = dataset['dataset']
    if not isinstance(dataset, dict):
        return None
    own = ('pipeline', 'test_mode')
    return {key: value for key, value in dataset.items() if key not in own}, levels
