"""Prompt types, one file each; importing the package registers them."""

from .pro_tuning import ProTuningBlock

__all__ = ['ProTuningBlock']
