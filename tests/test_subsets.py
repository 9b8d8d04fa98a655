"""Few labels and long tails: fixed by the seed, nested, and no class is lost unseen."""

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope

from protune_mm.datasets import FewLabels, LongTailed


class Labelled:
    """As much of a data set as a wrapper asks for."""

    metainfo = {'classes': ('rose', 'tulip', 'daisy')}

    def __init__(self, infos):
        self.infos = infos

    def full_init(self):
        pass

    def get_data_info(self, index):
        return self.infos[index]

    def __getitem__(self, index):
        return index

    def __len__(self):
        return len(self.infos)


def classes(*counts):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    np.random.RandomState(1).shuffle(labels)
    return Labelled([dict(gt_label=int(label)) for label in labels])


def boxes(*images):
    return Labelled([dict(instances=[dict(bbox_label=i) for i in image]) for image in images])


def shown(subset):
    return [subset[i] for i in range(len(subset))]


def test_a_fraction_keeps_the_share_of_every_class():
    data = classes(100, 50, 10)
    few = FewLabels(data, 0.1)
    assert len(few) == 16
    labels = [few.get_data_info(i)['gt_label'] for i in range(len(few))]
    assert np.bincount(labels).tolist() == [10, 5, 1]
    assert len(set(shown(few))) == 16
    assert few.metainfo == Labelled.metainfo


def test_fractions_are_nested_and_fixed_by_the_seed():
    data = classes(100, 50, 10)
    assert set(shown(FewLabels(data, 0.1))) < set(shown(FewLabels(data, 0.5)))
    assert shown(FewLabels(data, 0.5)) == shown(FewLabels(data, 0.5, lazy_init=True))
    assert shown(FewLabels(data, 0.5)) != shown(FewLabels(data, 0.5, seed=1))
    assert len(FewLabels(data, 1.0)) == 160


def test_detection_draws_images():
    data = boxes(*[(0, 1)] * 30, *[(1, 2)] * 30)
    assert len(FewLabels(data, 0.25)) == 15
    assert len(FewLabels(Labelled([{}] * 20), 0.1)) == 2


@pytest.fixture
def masks(tmp_path):
    """Twenty masks: all have class 0 and 1, one has class 2; 255 is void."""
    infos = []
    for i in range(20):
        mask = np.full((4, 6), 255, np.uint8)
        mask[:2], mask[2] = 0, 1
        if i == 7:
            mask[3, 3] = 2
        cv2.imwrite(str(tmp_path / f'{i}.png'), mask)
        infos.append(dict(seg_map_path=str(tmp_path / f'{i}.png'), reduce_zero_label=False))
    return infos


def test_segmentation_draws_images_that_have_every_class(masks):
    data = Labelled(masks)
    seeds = {True: [], False: []}
    for seed in range(10):
        seeds[7 in shown(FewLabels(Labelled([{}] * 20), 0.5, seed))].append(seed)
    assert len(FewLabels(data, 0.5, seeds[True][0])) == 10
    with pytest.raises(ValueError, match="10 of 20 images leave no pixel of class 'daisy'"):
        FewLabels(data, 0.5, seeds[False][0])
    for info in masks:  # Label 0 is void and others count from 1.
        info['reduce_zero_label'] = True
    with pytest.raises(ValueError, match="leave no pixel of class 'tulip'"):
        FewLabels(data, 0.5, seeds[False][0])
    # No image of the whole set has a daisy now: a larger fraction would not help.
    assert len(FewLabels(data, 0.5, seeds[True][0])) == 10


def test_another_image_is_drawn_from_the_part():
    data = boxes(*[(0, 1)] * 30)
    few = FewLabels(data, 0.1)
    assert {data._rand_another() for _ in range(50)} == set(shown(few))


def test_the_rest_is_what_was_not_chosen():
    data = classes(100, 50, 10)
    few, rest = FewLabels(data, 0.9, seed=3), FewLabels(data, 0.9, seed=3, rest=True)
    assert sorted(shown(few) + shown(rest)) == list(range(160))
    labels = [rest.get_data_info(i)['gt_label'] for i in range(len(rest))]
    assert np.bincount(labels).tolist() == [10, 5, 1]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: FewLabels(classes(9, 9), 0), 'fraction=0 is no part'),
        (lambda: FewLabels(classes(9, 9), 1.5), 'fraction=1.5 is no part'),
        (lambda: FewLabels(classes(100, 4), 0.1), r"leaves no image of class 'tulip', which 4 of"),
        (lambda: FewLabels(boxes(*[(0,)] * 50, (2,)), 0.1), r"leaves no image of class 'daisy'"),
        (lambda: FewLabels(Labelled([{}] * 3), 0.1), 'leaves none of 3 images'),
        (
            lambda: FewLabels(classes(100, 4), 0.9, rest=True),
            r"fraction=0.9 \(rest\) leaves no image of class 'tulip', which 4 of",
        ),
        (lambda: LongTailed(classes(9, 9), 0.5), 'ratio=0.5 is below 1'),
        (lambda: LongTailed(classes(9, 9), 100), "ratio=100 leaves no image of class 'tulip'"),
        (lambda: LongTailed(boxes((0, 1)), 10), 'every image needs one label'),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(('ratio', 'counts'), [(1, [100] * 3), (100, [100, 10, 1])])
def test_a_long_tail_is_exponential(ratio, counts):
    tail = LongTailed(classes(100, 100, 100), ratio)
    assert tail.class_counts() == counts
    assert shown(tail) == shown(LongTailed(classes(100, 100, 100), ratio))


def test_both_are_built_from_a_config_of_any_library(tmp_path):
    folder = tmp_path / 'train'
    for name in ('a', 'b'):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            (folder / name / f'{i}.jpg').touch()
    data = dict(type='CustomDataset', data_root=str(tmp_path), data_prefix='train')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        import mmpretrain.datasets  # noqa: F401

        few = DATASETS.build(dict(type='protune_mm.FewLabels', dataset=data, fraction=0.5))
        assert len(few) == 20
        tail = DATASETS.build(dict(type='protune_mm.LongTailed', dataset=data, ratio=10))
        assert tail.class_counts() == [20, 2]
