"""Dataset wrappers of the study: few labels and class imbalance."""

from .subsets import MIXERS, FewLabels, LongTailed, Subset

__all__ = ['MIXERS', 'FewLabels', 'LongTailed', 'Subset']
