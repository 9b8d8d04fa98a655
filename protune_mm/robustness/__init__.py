"""Scores under corruption, attack, imbalance and a change of the classes."""

from .attacks import ATTACKS, PixelModel, check_attack, robust_accuracy
from .class_map import ClassMap, MappedAccuracy
from .corruptions import CORRUPTIONS, Corrupt, corrupted, summary
from .shots import ShotAccuracy

__all__ = [
    'ATTACKS',
    'CORRUPTIONS',
    'ClassMap',
    'Corrupt',
    'MappedAccuracy',
    'PixelModel',
    'ShotAccuracy',
    'check_attack',
    'corrupted',
    'robust_accuracy',
    'summary',
]
