"""Scores under corruption, attack, imbalance and a change of the classes."""

from .attacks import (
    ATTACKS,
    AttackLoop,
    PixelModel,
    attack_library,
    check_attack,
    check_budgets,
    robust_accuracy,
)
from .class_map import ClassMap, MappedAccuracy
from .corruptions import (
    CORRUPTIONS,
    Corrupt,
    after_loading,
    check_metric,
    corrupted,
    found_nothing,
    per_cent,
    summary,
)
from .shots import ShotAccuracy

__all__ = [
    'ATTACKS',
    'CORRUPTIONS',
    'AttackLoop',
    'ClassMap',
    'Corrupt',
    'MappedAccuracy',
    'PixelModel',
    'ShotAccuracy',
    'after_loading',
    'attack_library',
    'check_attack',
    'check_budgets',
    'check_metric',
    'corrupted',
    'found_nothing',
    'per_cent',
    'robust_accuracy',
    'summary',
]
