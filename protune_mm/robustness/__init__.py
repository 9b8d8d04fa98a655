"""Scores under corruption, attack, imbalance and a change of the classes."""

from .attacks import ATTACKS, PixelModel, robust_accuracy
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
    'corrupted',
    'robust_accuracy',
    'summary',
]
