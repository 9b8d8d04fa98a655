"""Whether a config trains on images that are to validate, or scores others than it shows."""

from __future__ import annotations

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
    if None in parts or parts[0]['of'] != parts[1]['of'] or parts[0]['rest'] == parts[1]['rest']:
        return
    rest, other = sorted(parts, key=lambda part: part['rest'], reverse=True)
    if other['seed'] != rest['seed'] or other['fraction'] > rest['fraction']:
        names = ['train', 'val'] if parts[0]['rest'] else ['val', 'train']
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
    if not loader or not _shows_part(loader.get('dataset')):
        return
    for metric in metrics_of(evaluator):
        if isinstance(metric, dict) and metric.get('ann_file') and type_name(metric) in WHOLE_FILE:
            raise ValueError(
                f'the data set shows a part of its images, and {type_name(metric)} counts all of '
                f'{metric["ann_file"]}, those left out as missed: give it ann_file=None, and '
                "PackDetInputs of the pipeline 'instances' among its meta_keys"
            )


def _shows_part(dataset: object) -> bool:
    if not isinstance(dataset, dict):
        return False
    whole = type_name(dataset) == FewLabels.__name__ and dataset.get('fraction') == 1
    if type_name(dataset) in (FewLabels.__name__, LongTailed.__name__) and not whole:
        return True
    return any(map(_shows_part, dataset.get('datasets') or [dataset.get('dataset')]))


def _part_of(dataset: object) -> dict | None:
    """Which part of which data set a config asks for, within wrappers; all of it without any."""
    part = dict(fraction=1.0, seed=0, rest=False)
    while isinstance(dataset, dict) and isinstance(dataset.get('dataset'), dict):
        if type_name(dataset) == FewLabels.__name__:
            part = {key: dataset.get(key, value) for key, value in part.items()}
        dataset = dataset['dataset']
    if not isinstance(dataset, dict):
        return None
    own = ('pipeline', 'test_mode')
    return dict(part, of={key: value for key, value in dataset.items() if key not in own})
