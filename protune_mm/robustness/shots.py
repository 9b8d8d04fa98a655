"""Accuracy on classes with many, some and few training images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import mean

from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS

from ..datasets.subsets import image_labels, without_mixers
from ..registry import METRICS


@METRICS.register_module()
class ShotAccuracy(BaseMetric):
    """Mean accuracy over the classes with many, medium and few training images.

    Source of the split: *Large-Scale Long-Tailed Recognition in an Open World*, arXiv 1904.05160:
    more than 100 images, 20 to 100, fewer than 20.

    Args:
        dataset: config of the training set, to count the images of each class.
        bounds: fewest images of the medium group, and most. Default (20, 100).
        collect_device: as for every metric. Default ``'cpu'``.
        prefix: as for every metric. Default ``'shots'``.

    Its results are ``many``, ``medium`` and ``few``, in per cent, those of groups that have a
    class, and ``mean``, over all classes.
    """

    default_prefix = 'shots'

    def __init__(
        self,
        dataset: dict,
        bounds: tuple[int, int] = (20, 100),
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        train = without_mixers(DATASETS.build(dataset))  # Each image counts once.
        self.counts = Counter(
            label for i in range(len(train)) for label in image_labels(train.get_data_info(i))
        )
        self.bounds = bounds

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Note label and prediction of each image."""
        for sample in data_samples:
            label = int(sample['gt_label'])
            self.results.append((label, int(sample['pred_score'].argmax()) == label))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """See the class."""
        by_class: dict[int, list[bool]] = {}
        for label, right in results:
            by_class.setdefault(label, []).append(right)
        accuracy = {label: 100 * mean(right) for label, right in by_class.items()}
        groups: dict[str, list[float]] = {'many': [], 'medium': [], 'few': []}
        for label, value in accuracy.items():
            count, (low, high) = self.counts.get(label, 0), self.bounds
            groups['few' if count < low else 'many' if count > high else 'medium'].append(value)
        found = {name: mean(values) for name, values in groups.items() if values}
        return {**found, 'mean': mean(accuracy.values())}
