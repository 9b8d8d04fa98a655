"""Parts of a training set, fixed by a seed, for the data sets of all three libraries."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import mmcv
import numpy as np
from mmengine.dataset import BaseDataset, ConcatDataset
from mmengine.registry import DATASETS as ROOT

from ..registry import DATASETS

MIXERS = ('MultiImageMixDataset', 'RepeatDataset', 'ClassBalancedDataset')
"""Wrappers that show an image more than once, or mix others of their data set into it."""


class Subset:
    """Wraps a data set and shows only some of its images.

    Args:
        dataset: config of the data set, or the data set itself.
        seed: which images are chosen. Default 0.
        lazy_init: wait until the first use. Default False.

    Raises:
        ValueError: the data set is a wrapper that repeats or mixes images: it belongs outside.
    """

    def __init__(self, dataset: dict | BaseDataset, seed: int = 0, lazy_init: bool = False) -> None:
        self.dataset = ROOT.build(dataset) if isinstance(dataset, dict) else dataset
        self._check_wrappers(self.dataset)
        self.seed = seed
        self.indices: list[int] = []
        self._fully_initialized = False
        if not lazy_init:
            self.full_init()

    @property
    def metainfo(self) -> dict:
        """A copy of the data set's own; of several joined by MMDetection, of the first."""
        return copy.deepcopy(one_metainfo(self.dataset))

    @property
    def CLASSES(self) -> tuple[str, ...] | None:  # noqa: N802
        """Names of the classes, as hooks of MMPretrain ask for them."""
        return self.metainfo.get('classes')

    @property
    def pipeline(self) -> Any:
        """The transforms; where a hook switches them in training, of all data sets inside."""
        return next(_innermost(self.dataset)).pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        for dataset in _innermost(self.dataset):
            dataset.pipeline = pipeline

    def get_gt_labels(self) -> np.ndarray:
        """The label of each image that is shown, for a classifier's hooks."""
        self.full_init()
        return np.array([self.get_data_info(i)['gt_label'] for i in range(len(self))])

    def full_init(self) -> None:
        """Read the data set and choose the images."""
        if self._fully_initialized:
            return
        self.dataset.full_init()
        labels = [image_labels(self.dataset.get_data_info(i)) for i in range(len(self.dataset))]
        self.indices = self.choose(labels)
        self._check_masks()
        found: dict[int, tuple[object, list[int]]] = {}
        for index in self.indices:
            innermost, own = located(self.dataset, index)
            found.setdefault(id(innermost), (innermost, []))[1].append(own)
        # Copies in other processes have other ids, so the data sets themselves are kept.
        self._shown = list(found.values())
        self._fully_initialized = True

    def _check_wrappers(self, dataset: object) -> None:
        """Refuse wrappers inside this one that show or mix in what is not chosen."""
        for kind in type(dataset).__mro__:
            if kind.__name__ in MIXERS:
                raise ValueError(
                    f'{type(self).__name__} around {kind.__name__} would not keep to its part of '
                    f'the images: put it inside, around the data set of {kind.__name__}'
                )
        inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
        for each in inner:
            if hasattr(each, 'full_init'):
                self._check_wrappers(each)

    def _check_masks(self) -> None:
        """Refuse a part of a segmentation set in which a class has no pixel."""
        infos = [self.dataset.get_data_info(i) for i in self.indices]
        # Those of a detector are of something else: ids of panoptic segments, or stuff.
        masks = sum(bool(info.get('seg_map_path')) and 'instances' not in info for info in infos)
        classes = self.metainfo.get('classes')
        if not masks or not classes or masks == len(self.dataset):
            return
        left = set(range(len(classes)))
        for info in infos:
            left -= mask_labels(info)
            if not left:
                return
        shown = set(self.indices)
        for i in range(len(self.dataset)):
            lost = set() if i in shown else left & mask_labels(self.dataset.get_data_info(i))
            if lost:  # Else no image of the whole set has it.
                raise ValueError(
                    f'{masks} of {len(self.dataset)} images leave no pixel of class '
                    f"'{self.class_name(min(lost))}': use another fraction, another seed or "
                    'allow_missing=True'
                )

    def choose(self, labels: list[set[int]]) -> list[int]:
        """Indices of the images that are shown.

        Args:
            labels: the classes in each image; empty where the data set does not tell.
        """
        raise NotImplementedError

    def class_name(self, label: int) -> str:
        """Name of a class, for messages."""
        names = self.metainfo.get('classes') or ()
        return names[label] if label < len(names) else str(label)

    def get_data_info(self, index: int) -> dict:
        """Annotation of one of the images that are shown."""
        self.full_init()
        return self.dataset.get_data_info(self.indices[index])

    def __getitem__(self, index: int) -> Any:
        """One image after the pipeline."""
        self.full_init()
        # For an image whose boxes are all lost its data set draws another, which is to be one of
        # these. Told each time, as two parts may share a data set; of a part of a part the outer
        # one tells.
        innermost, _ = located(self.dataset, self.indices[index])
        if '_rand_another' in vars(innermost):
            return self.dataset[self.indices[index]]
        shown = next(own for each, own in self._shown if each is innermost)
        innermost._rand_another = lambda: shown[np.random.randint(len(shown))]
        try:
            return self.dataset[self.indices[index]]
        finally:
            del innermost._rand_another

    def get_cat_ids(self, index: int) -> list[int]:
        """Classes in one of the images that are shown, for a ClassBalancedDataset around."""
        self.full_init()
        return self.dataset.get_cat_ids(self.indices[index])

    def __len__(self) -> int:
        """Number of images that are shown."""
        self.full_init()
        return len(self.indices)


@DATASETS.register_module()
class FewLabels(Subset):
    """A fraction of a training set.

    A smaller fraction with the same seed is part of a larger one. Classification keeps the share
    of every class, and of each at least one image; detection and segmentation draw images.

    Args:
        dataset: config of the data set, or the data set itself.
        fraction: part of the images, above 0 and at most 1.
        seed: which images are chosen. Default 0.
        rest: show the images that are not chosen instead, for validation. Default False.
        lazy_init: wait until the first use. Default False.
        allow_missing: show the part also where it has no image of a class. Default False.

    Raises:
        ValueError: the fraction is out of range, or leaves no image, or none of a class.
    """

    def __init__(
        self,
        dataset: dict | BaseDataset,
        fraction: float,
        seed: int = 0,
        rest: bool = False,
        lazy_init: bool = False,
        allow_missing: bool = False,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f'fraction={fraction} is no part of a training set: use 0 to 1')
        self.fraction, self.rest, self.allow_missing = fraction, rest, allow_missing
        super().__init__(dataset, seed, lazy_init)

    def _check_masks(self) -> None:
        if not self.allow_missing:
            super()._check_masks()

    def choose(self, labels: list[set[int]]) -> list[int]:
        """See :class:`Subset`."""
        order = np.random.RandomState(self.seed).permutation(len(labels)).tolist()
        single = bool(labels) and all(len(found) == 1 for found in labels)
        if single:
            chosen = []
            for label in sorted(set.union(*labels)):
                mine = [i for i in order if label in labels[i]]
                # Of a small class one, as it is no larger with another seed.
                chosen += mine[: max(1, round(self.fraction * len(mine)))]
        else:
            chosen = order[: round(self.fraction * len(labels))]
        if self.rest:
            chosen = sorted(set(order) - set(chosen))
        part = f'fraction={self.fraction}{" (rest)" if self.rest else ""}'
        if not chosen:
            raise ValueError(f'{part} leaves none of {len(labels)} images')
        lost = set().union(*labels) - set().union(*(labels[i] for i in chosen))
        if lost and not self.allow_missing:
            count = sum(min(lost) in found for found in labels)
            raise ValueError(
                f"{part} leaves no image of class '{self.class_name(min(lost))}', which {count} of "
                f'{len(labels)} images have: use a {"smaller" if self.rest else "larger"} fraction'
                f'{"" if single else ", another seed"} or allow_missing=True'
            )
        return sorted(chosen)


@DATASETS.register_module()
class LongTailed(Subset):
    """A classification set whose classes have exponentially fewer images.

    Class ``k`` of ``K`` keeps ``ratio ** (-k / (K - 1))`` times the images of the largest class, as
    far as it has them, as in *Class-Balanced Loss Based on Effective Number of Samples*, arXiv
    1901.05555, Section 5.

    Args:
        dataset: config of the data set, or the data set itself.
        ratio: images of the first class over those of the last, such as 10, 50 or 100.
        seed: which images are chosen. Default 0.
        lazy_init: wait until the first use. Default False.

    Raises:
        ValueError: the ratio is below 1 or leaves a class without an image, or images do not have
            one label each.
    """

    def __init__(
        self, dataset: dict | BaseDataset, ratio: float, seed: int = 0, lazy_init: bool = False
    ) -> None:
        if ratio < 1:
            raise ValueError(f'ratio={ratio} is below 1: it is the largest class over the smallest')
        self.ratio = ratio
        super().__init__(dataset, seed, lazy_init)

    def choose(self, labels: list[set[int]]) -> list[int]:
        """See :class:`Subset`."""
        if not all(len(found) == 1 for found in labels):
            raise ValueError('LongTailed is for classification: every image needs one label')
        single = np.array([next(iter(found)) for found in labels])
        order = np.random.RandomState(self.seed).permutation(len(single))
        classes = self.metainfo.get('classes') or ()
        counts = np.bincount(single, minlength=len(classes))
        last, chosen = max(1, len(counts) - 1), []
        for label, count in enumerate(counts):
            wanted = int(counts.max() * self.ratio ** (-label / last))
            if not count:
                raise ValueError(
                    f"LongTailed: no image has class '{self.class_name(label)}': leave it out of "
                    'the classes, or add images'
                )
            if wanted < 1:
                raise ValueError(
                    f"ratio={self.ratio} leaves no image of class '{self.class_name(label)}': the "
                    f'largest class has {counts.max()}'
                )
            mine = order[single[order] == label]
            chosen += mine[: min(wanted, count)].tolist()
        return sorted(chosen)

    def class_counts(self) -> list[int]:
        """Images that are left of each class."""
        labels = [next(iter(image_labels(self.get_data_info(i)))) for i in range(len(self))]
        return np.bincount(labels).tolist()


def located(dataset: object, index: int) -> tuple[object, int]:
    """The data set that reads an image, within its wrappers, and the image's index there."""
    if isinstance(dataset, Subset):
        return located(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        which, index = dataset._get_ori_dataset_idx(index)
        return located(dataset.datasets[which], index)
    if hasattr(dataset, '_get_ori_dataset_idx'):  # KFoldDataset of MMPretrain.
        return located(dataset.dataset, dataset._get_ori_dataset_idx(index))
    return dataset, index


def _innermost(dataset: object) -> Iterator[object]:
    """The data sets that read images, within the wrappers of a :class:`Subset`."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
        return
    for each in inner:
        yield from _innermost(each)


def without_mixers(dataset: object) -> object:
    """The data set that has each image once, within wrappers that repeat or mix them."""
    while type(dataset).__name__ in MIXERS:
        dataset = dataset.dataset
    return dataset


def one_metainfo(dataset: BaseDataset) -> dict:
    """What a data set says of itself, where MMDetection's ``ConcatDataset`` has a list of it.

    Raises:
        ValueError: the data sets in it have different classes.
    """
    found = dataset.metainfo
    if isinstance(found, dict):
        return found
    first, *others = found
    for other in others:
        if other.get('classes') != first.get('classes'):
            raise ValueError(
                f'the joined data sets have different classes, {first.get("classes")} and '
                f'{other.get("classes")}: give each the same, by metainfo=dict(classes=...)'
            )
    return first


def mask_labels(info: dict) -> set[int]:
    """Classes with a pixel in the mask of one image, in MMSegmentation's order of its steps."""
    mapping = info.get('label_map') or {}
    found = np.unique(mmcv.imread(info['seg_map_path'], flag='unchanged', backend='pillow'))
    labels = {int(label) for label in found}
    if info.get('reduce_zero_label', False):
        labels = {255 if label in (0, 255) else label - 1 for label in labels}
    return {mapping.get(label, label) for label in labels}


def image_labels(info: dict) -> set[int]:
    """Classes in one image, from its annotation; empty where only a mask file tells."""
    if 'gt_label' in info:
        return set(np.atleast_1d(info['gt_label']).tolist())
    return {
        instance['bbox_label']
        for instance in info.get('instances', ())
        if not instance.get('ignore_flag')
    }
