"""Whether a config trains on images that are to validate."""

from __future__ import annotations

from ..registry import type_name
from .subsets import FewLabels


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
