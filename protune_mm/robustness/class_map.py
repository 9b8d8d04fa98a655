"""Test on the images of one data set with the classes of another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.registry import DATASETS as ROOT

from ..datasets.subsets import Subset, image_labels, located, one_metainfo
from ..registry import DATASETS, METRICS


@DATASETS.register_module()
class ClassMap(Subset):
    """A classification set whose labels are those of the set a model was trained on.

    Images of classes that the map does not name are left out: ImageNet-A and ImageNet-R have 200 of
    ImageNet's thousand classes.

    Args:
        dataset: config of the data set to test on, or the data set itself.
        classes: name of each of its classes to the name of the class it is for the model. Default:
            classes of the same name; ``'indices'``: its names are positions in ``target``.
        target: names of the model's classes, in the order of its outputs; or the folder that the
            model was trained on, whose sub-folders are the classes in alphabetical order.
        lazy_init: wait until the first use. Default False.

    Raises:
        ValueError: the map names a class that one of the two sets does not have, or has twice, or
            it names none, or an image has several classes.
    """

    def __init__(
        self,
        dataset: dict | BaseDataset,
        target: list[str] | str,
        classes: dict[str, str] | str | None = None,
        lazy_init: bool = False,
    ) -> None:
        if isinstance(dataset, dict):
            dataset = ROOT.build(dataset)
        own = list(one_metainfo(dataset).get('classes') or ())
        if not own:  # Some know their classes when they have read their folders.
            dataset.full_init()
            own = list(one_metainfo(dataset).get('classes') or ())
        if not own:
            raise ValueError('the data set names no classes, so they cannot be mapped')
        if isinstance(target, str):
            if not Path(target).is_dir():
                raise ValueError(
                    f"target='{target}' is no folder: give the folder of training images, whose "
                    'sub-folders are the classes, or a list of their names'
                )
            target = sorted(path.name for path in Path(target).iterdir() if path.is_dir())
        if classes is None:
            classes = {name: name for name in own if name in set(target)}
            if not classes:
                raise ValueError(f'no class of the data set ({own[0]}, ...) is one of the target')
        elif classes == 'indices':
            for name in own:
                if not name.isdecimal() or int(name) >= len(target):
                    raise ValueError(
                        f"classes='indices': '{name}' is no position among the {len(target)} "
                        'classes of target'
                    )
            classes = {name: target[int(name)] for name in own}
        elif isinstance(classes, str):
            raise ValueError(f"classes='{classes}' is unknown: use 'indices' or a dict of names")
        for known, names, side in (
            (own, classes, 'the data set'),
            (target, classes.values(), 'target'),
        ):
            for name in names:
                if name not in known:
                    raise ValueError(
                        f"the class map names '{name}', which {side} does not have: it has "
                        f'{", ".join(map(str, known[:10]))}{", ..." if len(known) > 10 else ""}'
                    )
                if list(known).count(name) > 1:
                    raise ValueError(
                        f"{side} has {list(known).count(name)} classes named '{name}': give the "
                        'classes names of their own, such as those of their folders'
                    )
        self.new = {own.index(a): list(target).index(b) for a, b in classes.items()}
        self.target = list(target)
        super().__init__(dataset, lazy_init=lazy_init)

    @property
    def metainfo(self) -> dict:
        """Of the data set, with the classes of the model, and ``subset``: those that occur."""
        return {
            **super().metainfo,
            'classes': self.target,
            'subset': sorted(set(self.new.values())),
        }

    def choose(self, labels: list[set[int]]) -> list[int]:
        """See :class:`Subset`."""
        for found in labels:
            if len(found) > 1:
                raise ValueError(
                    'ClassMap is for images of one class; one of these has the classes '
                    f'{", ".join(map(str, sorted(found)))}'
                )
        return [i for i, found in enumerate(labels) if found and found <= set(self.new)]

    def get_data_info(self, index: int) -> dict:
        """Annotation with the label of the model."""
        info = super().get_data_info(index)
        return {**info, 'gt_label': self.new[next(iter(image_labels(info)))]}

    def __getitem__(self, index: int) -> object:
        """One image after the pipeline, with the label of the model."""
        self.full_init()
        innermost, _ = located(self.dataset, self.indices[index])
        return innermost.pipeline(self.get_data_info(index))


@METRICS.register_module()
class MappedAccuracy(BaseMetric):
    """Top-1 accuracy on a :class:`ClassMap`: only its classes are answers.

    Its result is ``top1``, in per cent.

    Raises:
        ValueError: the data set is no :class:`ClassMap`.
    """

    default_prefix = 'accuracy'

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Note whether the best class of the subset is the right one."""
        subset = (self.dataset_meta or {}).get('subset')
        if subset is None:
            raise ValueError(
                'MappedAccuracy is for a protune_mm.ClassMap: put one around the test data set, or '
                "use type='Accuracy'"
            )
        for sample in data_samples:
            best = subset[int(sample['pred_score'][subset].argmax())]
            self.results.append(best == int(sample['gt_label']))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """See the class."""
        return {'top1': 100 * mean(results)}
