"""Dataset wrappers of the study: few labels and class imbalance."""

from .subsets import FewLabels, LongTailed, Subset

__all__ = ['FewLabels', 'LongTailed', 'Subset']
