"""Few labels and long tails: fixed by the seed, nested, and no class is lost unseen."""

import argparse
import copy
import pickle
import shlex

import cv2
import numpy as np
import pytest
from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.registry import DATASETS, DefaultScope

from protune_mm.datasets import FewLabels, LongTailed
from protune_mm.datasets.rest import check_annotations, check_rest
from protune_mm.datasets.subsets import mask_labels
from protune_mm.robustness import ClassMap, ShotAccuracy


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


def test_one_image_of_a_small_class_stays():
    data = classes(100, 9, 4)
    parts = [FewLabels(data, fraction, seed=2) for fraction in (0.04, 0.05, 0.2)]
    counts = [np.bincount([p.get_data_info(i)['gt_label'] for i in range(len(p))]) for p in parts]
    assert [count.tolist() for count in counts] == [[4, 1, 1], [5, 1, 1], [20, 2, 1]]
    assert set(shown(parts[0])) < set(shown(parts[1])) < set(shown(parts[2]))
    rest = FewLabels(data, 0.05, seed=2, rest=True)
    assert not set(shown(rest)) & set(shown(parts[1])), 'the rest is without them'


def test_a_part_without_a_class_is_shown_where_that_is_wanted(masks):
    data, whole = boxes(*[(0, 1)] * 50, (2,)), Labelled(masks)
    assert len(FewLabels(data, 0.1, allow_missing=True)) == 5
    assert len(FewLabels(classes(100, 4), 0.9, rest=True, allow_missing=True)) == 10
    for seed in range(4):
        assert len(FewLabels(whole, 0.1, seed, allow_missing=True)) == 2
    with pytest.raises(ValueError, match='leaves none of 3 images'):
        FewLabels(Labelled([{}] * 3), 0.1, allow_missing=True)


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


def test_masks_of_a_detector_are_no_maps_of_its_classes(masks):
    # Ids of panoptic segments, or stuff: each image has both classes by its boxes.
    told = [{**info, 'instances': [dict(bbox_label=0), dict(bbox_label=1)]} for info in masks]
    for seed in range(4):
        assert len(FewLabels(Labelled(told), 0.5, seed)) == 10


class Joined(Labelled):
    """As MMDetection's ConcatDataset, where its data sets say other things of themselves."""

    def __init__(self, *classes):
        super().__init__([dict(gt_label=i % 2) for i in range(10)])
        self.metainfo = [dict(classes=names, root=i) for i, names in enumerate(classes)]


def test_joined_data_sets_that_say_other_things_of_themselves():
    data = Joined(('rose', 'tulip'), ('rose', 'tulip'))
    part = FewLabels(data, 0.4)
    assert len(part) == 4
    assert part.metainfo['classes'] == ('rose', 'tulip')
    assert ClassMap(data, ['tulip', 'rose']).metainfo['classes'] == ['tulip', 'rose']
    data = Joined(('rose', 'tulip'), ('tulip', 'rose'))
    with pytest.raises(ValueError, match=r'have different classes, .* give each the same, by meta'):
        FewLabels(data, 0.01)


def without_odd(info):
    return None if info['number'] % 2 else info


@DATASETS.register_module()
class Numbers(BaseDataset):
    """Forty images of two classes, of which a step of the pipeline may lose every second."""

    METAINFO = {'classes': ('a', 'b')}

    def __init__(self, start=0, lost=False, **more):
        self.start = start
        super().__init__(pipeline=[without_odd if lost else dict], **more)

    def load_data_list(self):
        return [dict(number=self.start + i, gt_label=i // 2 % 2) for i in range(40)]

    def get_cat_ids(self, index):
        return [self.get_data_info(index)['gt_label']]


def numbers(data, times=1):
    return {data[i]['number'] for _ in range(times) for i in range(len(data))}


def in_part(part):
    return {part.get_data_info(i)['number'] for i in range(len(part))}


@pytest.mark.parametrize(
    'part',
    [
        FewLabels(Numbers(lost=True), 0.2),
        FewLabels(ConcatDataset([Numbers(lost=True), Numbers(40, lost=True)]), 0.2),
        FewLabels(LongTailed(Numbers(lost=True), 2), 0.5),
    ],
)
def test_an_image_that_is_lost_gives_way_to_one_of_the_part(part):
    even = {number for number in in_part(part) if not number % 2}
    assert even < in_part(part)
    assert numbers(part, times=20) == even


def test_a_copy_for_another_process_is_a_part_too():
    part = FewLabels(ConcatDataset([Numbers(lost=True), Numbers(40, lost=True)]), 0.2)
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert numbers(copied, times=5) <= in_part(part)


def test_parts_of_one_data_set_keep_to_themselves():
    data = Numbers(lost=True)
    few, rest = FewLabels(data, 0.2), FewLabels(data, 0.2, rest=True)
    for part in (few, rest, few):
        assert numbers(part, times=20) <= in_part(part)
    assert len(numbers(data, times=5)) == 20, 'and the data set draws from all of its own'


def mixed(dataset):
    from mmdet.datasets import MultiImageMixDataset

    with DefaultScope.overwrite_default_scope('mmdet'):
        return MultiImageMixDataset(dataset, pipeline=[])


REPEATED = dict(type='RepeatDataset', times=3, dataset=dict(type='Numbers'))


@pytest.mark.parametrize(
    ('wrapped', 'name'),
    [
        (RepeatDataset(Numbers(), 3), 'RepeatDataset'),
        (ClassBalancedDataset(Numbers(), 0.1), 'ClassBalancedDataset'),
        (mixed(Numbers()), 'MultiImageMixDataset'),
        (ConcatDataset([REPEATED, Numbers()]), 'RepeatDataset'),
    ],
)
def test_a_part_belongs_inside_what_repeats_or_mixes_images(wrapped, name):
    for make in (lambda: FewLabels(wrapped, 0.2), lambda: LongTailed(wrapped, 2)):
        with pytest.raises(ValueError, match=f'around {name} would not keep to its part .* inside'):
            make()


def test_what_repeats_or_mixes_images_takes_a_part():
    few = dict(type='protune_mm.FewLabels', fraction=0.2, dataset=dict(type='Numbers'))
    own = in_part(DATASETS.build(few))
    assert len(own) == 8
    for whole, times in (
        (RepeatDataset(few, 3), 3),
        (ClassBalancedDataset(few, 0.9), 2),
        (mixed(few), 1),
    ):
        assert numbers(whole) == own
        assert len(whole) == 8 * times
    # Each image counts once, however often it is shown.
    metric = ShotAccuracy(dict(type='RepeatDataset', times=3, dataset=few))
    assert sum(metric.counts.values()) == 8


def test_classes_of_a_mask_are_those_that_the_library_loads(tmp_path):
    from mmseg.datasets.transforms import LoadAnnotations

    mask = np.array([[0, 1, 2, 3, 255]], np.uint8)
    cv2.imwrite(str(tmp_path / 'mask.png'), mask)
    for reduced in (False, True):
        for label_map in (None, {0: 1, 1: 0, 2: 255}):
            info = dict(seg_map_path=str(tmp_path / 'mask.png'), label_map=label_map)
            info |= dict(reduce_zero_label=reduced, seg_fields=[])
            loaded = LoadAnnotations()(dict(info))['gt_seg_map']
            assert mask_labels(info) == set(loaded.ravel().tolist())


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
        (
            lambda: FewLabels(boxes(*[(0, 1)] * 50, (2,)), 0.1),
            r"leaves no image of class 'daisy', which 1 of 51 .* larger fraction, another seed or",
        ),
        (lambda: FewLabels(Labelled([{}] * 3), 0.1), 'leaves none of 3 images'),
        (
            lambda: FewLabels(classes(100, 4), 0.9, rest=True),
            r"\(rest\) leaves no image of class 'tulip', which 4 of .* a smaller fraction or allow",
        ),
        (lambda: FewLabels(classes(4, 4), 1, rest=True), r'1 \(rest\) leaves none of 8 images'),
        (lambda: LongTailed(classes(9, 9, 9), 0.5), 'ratio=0.5 is below 1'),
        (lambda: LongTailed(classes(9, 9, 9), 50), "ratio=50 leaves no image of class 'daisy'"),
        (lambda: LongTailed(classes(9, 0, 9), 2), "LongTailed: no image has class 'tulip'"),
        (lambda: LongTailed(classes(9, 9), 2), "LongTailed: no image has class 'daisy'"),
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


def loader(name, data_root='set', around=None, **part):
    found = dict(type='CustomDataset', data_root=data_root, pipeline=[dict(type=name)])
    if part:
        found = dict(type='protune_mm.FewLabels', dataset=found, **part)
    return dict(dataset=dict(type=around, dataset=found) if around else found)


@pytest.mark.parametrize(
    ('train', 'val', 'apart'),
    [
        (dict(fraction=0.9), dict(fraction=0.9, rest=True), True),
        (dict(fraction=0.1), dict(fraction=0.9, rest=True), True),
        (dict(fraction=0.1, around='protune_mm.LongTailed'), dict(fraction=0.9, rest=True), True),
        (dict(fraction=0.1, seed=1), dict(fraction=0.9, seed=1, rest=True), True),
        (dict(fraction=0.1, rest=True), dict(fraction=0.1), True),
        (dict(fraction=0.1, seed=1), dict(fraction=0.9, rest=True), False),
        (dict(fraction=0.1, seed=1, around='RepeatDataset'), dict(fraction=0.9, rest=True), False),
        (dict(fraction=0.95), dict(fraction=0.9, rest=True), False),
        (dict(), dict(fraction=0.9, rest=True), False),
        (dict(fraction=0.1, rest=True), dict(fraction=0.5), False),
        # Another set, and parts of which none is to be the rest of the other.
        (dict(fraction=0.1, seed=1, data_root='other'), dict(fraction=0.9, rest=True), True),
        (dict(), dict(fraction=0.9), True),
    ],
)
def test_the_rest_of_another_part_is_refused(train, val, apart):
    train, val = loader('Train', **train), loader('Val', **val)
    check_rest(train, None)
    if apart:
        check_rest(train, val)
        return
    with pytest.raises(ValueError, match='of the same data set, so that images are in both'):
        check_rest(train, val)


def nested(*parts):
    """A loader of parts of parts, the innermost first."""
    found = loader('Train')['dataset']
    for part in parts:
        found = dict(type='protune_mm.FewLabels', dataset=found, **part)
    return dict(dataset=found)


@pytest.mark.parametrize(
    ('train', 'val', 'apart'),
    [
        # As a study takes a part of what configs/transfer trains on.
        ([dict(fraction=0.9), dict(fraction=0.2, seed=1)], [dict(fraction=0.9, rest=True)], True),
        ([dict(fraction=0.9, seed=1), dict(fraction=0.2)], [dict(fraction=0.9, rest=True)], False),
        # Both within one part, of which one has the rest.
        (
            [dict(fraction=0.5, seed=3), dict(fraction=0.9)],
            [dict(fraction=0.5, seed=3), dict(fraction=0.9, rest=True)],
            True,
        ),
        (
            [dict(fraction=0.5, seed=3), dict(fraction=0.9, seed=1)],
            [dict(fraction=0.5, seed=3), dict(fraction=0.9, rest=True)],
            False,
        ),
        ([dict(fraction=0.5)], [dict(fraction=0.5), dict(fraction=0.9, rest=True)], False),
        # A part of the rest is still of the rest.
        ([dict(fraction=0.9)], [dict(fraction=0.9, rest=True), dict(fraction=0.5, seed=1)], True),
    ],
)
def test_of_parts_of_parts_the_first_that_differs_counts(train, val, apart):
    train, val = nested(*train), nested(*val)
    if apart:
        check_rest(train, val)
        return
    with pytest.raises(ValueError, match='of the same data set, so that images are in both'):
        check_rest(train, val)


@pytest.mark.parametrize(
    ('part', 'evaluator', 'fits'),
    [
        (dict(fraction=0.9, rest=True), dict(type='CocoMetric', ann_file='all.json'), False),
        (dict(fraction=0.9), [dict(type='CocoMetric', ann_file='all.json')], False),
        (dict(fraction=0.9), dict(metrics=[dict(type='CocoMetric', ann_file='a.json')]), False),
        (dict(fraction=0.9), dict(type='CocoMetric', ann_file=None), True),
        (dict(fraction=1), dict(type='CocoMetric', ann_file='all.json'), True),
        (dict(), dict(type='CocoMetric', ann_file='all.json'), True),
        (dict(fraction=0.9), dict(type='Accuracy'), True),
        (dict(fraction=0.9), dict(type='COCOCaption', ann_file='all.json'), True),
        (dict(fraction=0.9), [object()], True),
        (dict(fraction=0.9), None, True),
        (dict(indices=500), dict(type='CocoMetric', ann_file='all.json'), False),
        (dict(indices=[0, 3]), dict(type='CocoMetric', ann_file=None), True),
    ],
)
def test_a_metric_that_counts_images_left_out_is_refused(part, evaluator, fits):
    first = part.pop('indices', None)
    val = loader('Val', around='ConcatDataset' if evaluator is None else None, **part)
    val['dataset']['indices'] = first
    check_annotations(None, evaluator)
    if fits:
        check_annotations(val, evaluator)
        return
    with pytest.raises(ValueError, match=r'CocoMetric counts all of .*ann_file=None'):
        check_annotations(val, evaluator)


@pytest.mark.parametrize('keys', [{}, dict(meta_keys=('img_id', 'scale_factor'))])
def test_a_quick_look_at_some_images_has_the_options_that_its_error_tells(keys):
    pipeline = [dict(type='LoadImageFromFile'), dict(type='PackDetInputs', **keys)]
    dataset = dict(type='CocoDataset', indices=500, pipeline=pipeline)
    cfg = Config(
        dict(
            test_dataloader=dict(dataset=dataset),
            test_evaluator=dict(type='CocoMetric', ann_file='all.json'),
        )
    )
    with pytest.raises(ValueError, match='For a quick look: ') as told:
        check_annotations(cfg.test_dataloader, cfg.test_evaluator)
    options = shlex.split(str(told.value).partition('For a quick look: ')[2])[:3]
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(options).cfg_options)
    check_annotations(cfg.test_dataloader, cfg.test_evaluator)
    packed = cfg.test_dataloader.dataset.pipeline[1].meta_keys
    assert {'img_id', 'scale_factor', 'instances'} <= {*packed}


def test_hooks_find_in_a_part_what_a_data_set_has():
    """Of MMDetection one switches the pipeline, of MMPretrain two read classes and labels."""
    inner = [BaseDataset(lazy_init=True), BaseDataset(lazy_init=True)]
    for data in inner:
        data.data_list = [dict(gt_label=label, sample_idx=label) for label in (0, 1, 1, 0)]
        data._fully_initialized, data.serialize_data = True, False
        data._metainfo = dict(classes=('rose', 'tulip'))
        data.pipeline = len
    few = FewLabels(FewLabels(ConcatDataset(inner), 0.5), 1.0)
    assert few.CLASSES == ('rose', 'tulip')
    assert sorted(few.get_gt_labels().tolist()) == [0, 0, 1, 1]
    assert few.pipeline is len
    few.pipeline = switched = lambda info: info['gt_label'] + 10
    assert [data.pipeline for data in inner] == [switched] * 2
    assert shown(few) == [label + 10 for label in few.get_gt_labels()]
