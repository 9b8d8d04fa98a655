"""Corruptions, attacks, shots and class maps: known answers; the tool on all three libraries."""

import argparse
import importlib
import json

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from mmpretrain.models import ImageClassifier
from mmpretrain.structures import DataSample

from protune_mm.robustness import (
    CORRUPTIONS,
    ClassMap,
    MappedAccuracy,
    PixelModel,
    ShotAccuracy,
    attacks,
    check_metric,
    corrupted,
    per_cent,
    robust_accuracy,
    summary,
)
from tests.conftest import ROOT, run_tool
from tests.small_runs import QUICK, SHAPES, data

corruptions = pytest.importorskip('imagecorruptions', reason='requirements/robustness.txt')
torchattacks = pytest.importorskip('torchattacks', reason='requirements/robustness.txt')


def corrupt(name, severity, path='a.png', size=(48, 64)):
    image = np.random.RandomState(0).randint(0, 255, (*size, 3), dtype=np.uint8)
    step = TRANSFORMS.build(dict(type='protune_mm.Corrupt', corruption=name, severity=severity))
    return image, step(dict(img=image.copy(), img_path=path))['img']


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_every_corruption_changes_the_image_the_same_way_each_time(name):
    state = np.random.get_state()[1].copy()
    image, made = corrupt(name, 2)
    assert (made.shape, made.dtype) == (image.shape, np.uint8)
    assert not np.array_equal(made, image)
    assert np.array_equal(corrupt(name, 2)[1], made)
    assert (np.random.get_state()[1] == state).all(), 'other random numbers stay as they were'
    assert np.array_equal(corrupt(name, 0)[1], image)
    if name.endswith('noise'):
        assert not np.array_equal(corrupt(name, 2, 'b.png')[1], made)


def test_a_kept_image_is_as_if_made_again():
    step = TRANSFORMS.build(
        dict(type='protune_mm.Corrupt', corruption='fog', severity=3, cache=True)
    )
    image, fresh = corrupt('fog', 3, 'kept.png')
    for _ in range(2):
        made = step(dict(img=image.copy(), img_path='kept.png'))['img']
        assert np.array_equal(made, fresh)
        made[:] = 0  # What later transforms do to it is not kept.


def test_kept_images_take_no_more_than_their_room(monkeypatch):
    from protune_mm.robustness import corruptions as module

    held, (image, fresh) = {}, corrupt('fog', 3, 'kept1.png')
    monkeypatch.setattr(module, '_corrupted_images', held)
    monkeypatch.setattr(module, 'CACHE_BYTES', image.nbytes)
    step = TRANSFORMS.build(
        dict(type='protune_mm.Corrupt', corruption='fog', severity=3, cache=True)
    )
    for name in ('kept0.png', 'kept1.png', 'kept1.png'):
        made = step(dict(img=image.copy(), img_path=name))['img']
    assert [path for path, *_ in held] == ['kept0.png']
    assert np.array_equal(made, fresh)


def test_kept_images_of_one_file_are_told_apart():
    step = TRANSFORMS.build(
        dict(type='protune_mm.Corrupt', corruption='contrast', severity=1, cache=True)
    )
    images = [np.full((32, 32, 3), grey, np.uint8) for grey in (90, 200)]
    made = [step(dict(img=image, img_path='tiles.png'))['img'] for image in images]
    assert made[0].mean() < 100 < made[1].mean()


def test_images_of_floats_are_as_those_of_whole_numbers():
    """As LoadImageFromFile(to_float32=True) gives them."""
    image, made = corrupt('gaussian_noise', 2)
    step = TRANSFORMS.build(
        dict(type='protune_mm.Corrupt', corruption='gaussian_noise', severity=2)
    )
    for path in ('a.png', None):
        whole = step(dict(img=image, img_path=path))['img']
        found = step(dict(img=image.astype(np.float32), img_path=path))['img']
        assert found.dtype == np.float32
        assert np.array_equal(found, whole)
    assert np.array_equal(step(dict(img=image, img_path='a.png'))['img'], made)


@pytest.mark.parametrize('name', CORRUPTIONS)
def test_a_grey_image_keeps_its_shape_and_sides(name):
    step = TRANSFORMS.build(dict(type='protune_mm.Corrupt', corruption=name, severity=1))
    image = np.full((48, 64), 40, np.uint8)
    image[:, 32:] = 200
    made = step(dict(img=image, img_path='a.png'))['img']
    assert (made.shape, made.dtype) == (image.shape, np.uint8)
    assert made[:, 32:].mean() > made[:, :32].mean()
    more = step(dict(img=image[..., None], img_path='a.png'))['img']
    assert np.array_equal(more[..., 0], made)


@pytest.mark.parametrize(
    ('image', 'message'),
    [
        (np.zeros((28, 40), np.uint8), 'an image has 28x40 pixels: corruptions need at least'),
        (np.zeros((40, 40, 4), np.uint8), r'an image has the shape \(40, 40, 4\): corruptions'),
        (np.full((32, 32, 3), 0.5), 'an image of float64 has no whole pixels from 0 to 255'),
        (np.full((32, 32, 3), np.nan), 'an image of float64 has no whole pixels from 0 to 255'),
        (np.full((32, 32, 3), 300, np.uint16), 'an image of uint16 has no whole pixels'),
    ],
)
def test_images_that_no_corruption_takes(image, message):
    step = TRANSFORMS.build(dict(type='protune_mm.Corrupt', corruption='fog', severity=1))
    with pytest.raises(ValueError, match=message):
        step(dict(img=image, img_path='a.png'))


def test_severity_grows():
    errors = []
    for severity in range(1, 6):
        image, made = corrupt('gaussian_noise', severity)
        errors.append(np.abs(made.astype(float) - image).mean())
    assert errors == sorted(errors)


def test_the_corruption_comes_right_after_the_image():
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize'), dict(type='LoadAnnotations')]
    plain = dict(dataset=dict(type='Wrapper', dataset=dict(pipeline=steps)))
    got = corrupted(plain, 'fog', 3)['dataset']['dataset']['pipeline']
    assert [step['type'] for step in got[:3]] == [
        'LoadImageFromFile',
        'protune_mm.Corrupt',
        'Resize',
    ]
    assert len(steps) == 3, 'a copy'
    other = dict(dataset=dict(pipeline=[dict(type='LoadTiff'), dict(type='Resize')]))
    assert corrupted(other, 'fog', 3)['dataset']['pipeline'][1]['type'] == 'protune_mm.Corrupt'
    held = dict(dataset=dict(type='CIFAR10', pipeline=[dict(type='Resize')]))
    first = corrupted(held, 'fog', 3)
    assert first['dataset']['pipeline'][0] == dict(
        type='protune_mm.Corrupt', corruption='fog', severity=3, cache=False, rgb=True
    )
    # Also sets of others: none of its steps loads.
    assert corrupted(dict(dataset=dict(held['dataset'], type='MNIST')), 'fog', 3) == dict(
        dataset=dict(first['dataset'], type='MNIST')
    )
    # In each of several joined sets, which may share their pipeline, once.
    both = dict(dataset=dict(type='Joined', datasets=[plain['dataset'], held['dataset']] * 2))
    got = corrupted(Config(both), 'fog', 3)['dataset']['datasets']
    for one, two in (got[:2], got[2:]):
        types = [step['type'] for step in one['dataset']['pipeline']]
        assert types == ['LoadImageFromFile', 'protune_mm.Corrupt', 'Resize', 'LoadAnnotations']
        assert [step.get('rgb') for step in two['pipeline']] == [True, None]
    with pytest.raises(ValueError, match='the test data set, CIFAR10, has no `pipeline`'):
        corrupted(dict(dataset=dict(type='CIFAR10')), 'fog', 3)


def test_an_image_without_a_file_is_corrupted_by_what_it_is():
    config = dict(type='protune_mm.Corrupt', corruption='gaussian_noise', severity=2)
    images = [np.full((32, 32, 3), grey, np.uint8) for grey in (90, 91)]
    made = [TRANSFORMS.build(dict(config, rgb=True))(dict(img=image))['img'] for image in images]
    again = TRANSFORMS.build(dict(config, rgb=True))(dict(img=images[0]))['img']
    turned = TRANSFORMS.build(config)(dict(img=images[0]))['img']
    assert np.array_equal(made[0], again)
    assert np.array_equal(made[0], turned[..., ::-1]), 'the library sees the same image'
    assert not np.array_equal(made[0], made[1])
    with pytest.raises(ValueError, match='no image to corrupt'):
        TRANSFORMS.build(config)(dict(img_path='a.png'))


def test_summary():
    scores = {('fog', 1): 60.0, ('fog', 2): 40.0, ('snow', 1): 30.0, ('snow', 2): 10.0}
    assert summary(70.0, scores, True) == {'mPC': 35, 'rPC': 50, 'mCE': 65}
    # Errors of 50 over 75 under fog, 80 over 100 under snow.
    other = {('fog', 1): 10.0, ('fog', 2): 40.0, ('snow', 1): 0.0, ('snow', 2): 0.0}
    got = summary(70.0, scores, True, other)
    assert got['mCE over baseline'] == pytest.approx(100 * (100 / 150 + 160 / 200) / 2)
    with pytest.raises(ValueError, match='the baseline has no score under snow 2: test it there'):
        summary(70.0, scores, True, dict(list(other.items())[:3]))
    with pytest.raises(ValueError, match='the baseline makes no error under fog'):
        summary(70.0, scores, True, dict.fromkeys(other, 100.0))
    scores = {key: value / 100 for key, value in scores.items()}
    assert summary(0.7, scores, False) == pytest.approx({'mPC': 0.35, 'rPC': 50, 'mCE': 65})
    with pytest.raises(ValueError, match=r'the score under fog 1, 60.0, is not within 0 and 1'):
        summary(0.7, {('fog', 1): 60.0}, False)


@pytest.mark.parametrize(
    ('metric', 'to_100'),
    [
        ('accuracy/top1', True), ('single-label/f1-score', True), ('multi-label/mAP', True),
        ('mIoU', True), ('retrieval/mAP', True), ('mDice', True), ('aAcc', True),
        ('shots/mean', True),
        ('coco_panoptic/PQ', True), ('coco/bbox_mAP', False), ('coco/segm_mAP_50', False),
        ('lvis/bbox_AP', False), ('pascal_voc/AP50', False), ('pascal_voc/mAP', False),
        ('openimages/AP50', False), ('fruit/bbox_mAP', False),
        ('a/coco/bbox_mAP', False), ('cityscapes/mAP', False), ('crowd_human/AP', False),
        ('averageScoreCategories', False), ('coco/occluded_recall', True), ('d1', False),
    ],
)  # fmt: skip
def test_which_scores_go_to_1(metric, to_100):
    assert per_cent(metric) is to_100


@pytest.mark.parametrize(
    ('metric', 'lower'),
    [
        ('rmse', True), ('crowd_human/mMR', True), ('val/loss', True), ('loss_cls', True),
        ('depth/abs_rel', True), ('error', True),
        ('crowd_human/mAP', False), ('accuracy/top1', False), ('mIoU', False), ('d1', False),
        ('my/score', False), ('coco/bbox_mAP', False),
    ],
)  # fmt: skip
def test_a_metric_that_is_better_where_it_is_lower_is_refused(metric, lower):
    if not lower:
        check_metric(metric)
        return
    with pytest.raises(ValueError, match=f"metric '{metric}' is better where it is lower, and"):
        check_metric(metric)


@pytest.fixture
def classifier():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.manual_seed(0)
        model = ImageClassifier(
            backbone=dict(
                type='protune_mm.ProTuned',
                base='ResNet',
                depth=18,
                stem_channels=8,
                base_channels=8,
            ),
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=5, in_channels=64),
            data_preprocessor=dict(mean=[120, 110, 100], std=[60, 50, 55], to_rgb=True),
        )
    model.backbone._protune.loads.given = True
    return model.eval()


def batches(model, count=3):
    """Images with the labels that the model gives them, but for one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        inputs = [torch.randint(0, 255, (3, 32, 32), generator=generator).byte() for _ in range(4)]
        with torch.no_grad():
            ready = model.data_preprocessor(dict(inputs=torch.stack(inputs)))['inputs']
            labels = model(ready, mode='tensor').argmax(1)
        labels[0] = (labels[0] + 1) % 5
        yield dict(
            inputs=inputs,
            data_samples=[DataSample().set_gt_label(label) for label in labels.tolist()],
        )


def test_pixels_go_through_the_models_own_preprocessor(classifier):
    images = torch.randint(0, 255, (2, 3, 32, 32)).byte()
    with torch.no_grad():
        ready = classifier.data_preprocessor(dict(inputs=images))['inputs']
        expected = classifier(ready, mode='tensor')
        got = PixelModel(classifier)(images.float() / 255)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize('attack', ['fgsm', 'pgd', 'autoattack'])
def test_budget_zero_is_clean_and_a_larger_budget_never_helps(classifier, attack):
    few = attack == 'autoattack'  # It takes seconds an image.
    budgets = [0, 0.1] if few else [0, 0.002, 0.01, 0.1]
    found = robust_accuracy(classifier, batches(classifier, 1 if few else 3), attack, budgets)
    values = list(found.values())
    assert values[0] == 75
    assert values == sorted(values, reverse=True)
    assert values[-1] < 75
    assert not any(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize('attack', ['fgsm', 'pgd'])
def test_attacks_are_the_same_each_time(classifier, attack):
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(robust_accuracy(classifier, batches(classifier), attack, [0.002, 0.004]))
        assert torch.initial_seed() == seed
    assert found[0] == found[1]


def test_an_attack_stays_within_its_budget(classifier):
    batch = next(batches(classifier))
    pixels = torch.stack(batch['inputs']).float() / 255
    labels = torch.cat([s.gt_label for s in batch['data_samples']])
    for name in ('fgsm', 'pgd'):
        attack = attacks._attacker(name, PixelModel(classifier), 0.01)
        assert attack.eps == 0.01
        change = (attack(pixels, labels) - pixels).abs().max().item()
        assert change == pytest.approx(0.01, abs=1e-6)  # float32
    assert (attack.steps, attack.alpha, attack.random_start) == (10, 0.0025, True)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('fgms', [0]), "attack='fgms' is unknown: use one of fgsm, pgd, autoattack"),
        (('fgsm', [2, 1]), r'budgets=\[2, 1\] do not grow'),
        (('fgsm', []), r'budgets=\[\] do not grow'),
    ],
)
def test_bad_attacks(classifier, arguments, message):
    with pytest.raises(ValueError, match=message):
        robust_accuracy(classifier, [], *arguments)


def test_attacks_are_for_one_score_a_class_and_one_class_an_image(classifier):
    batch = next(batches(classifier))
    batch['data_samples'][2].set_gt_label([1, 3])
    with pytest.raises(ValueError, match=r'images of one class; one of these has .* \[1, 3\]$'):
        robust_accuracy(classifier, [batch], 'fgsm', [0])
    head = torch.nn.Module()
    head.num_classes, head.forward = 5, lambda features: [features[-1]] * 2  # As Conformer's.
    classifier.head = head
    with pytest.raises(ValueError, match='one score for each class; Module returns others'):
        robust_accuracy(classifier, [next(batches(Fixed(classifier)))], 'fgsm', [0])


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (lambda image: (image.float() - 120) / 55, '-2.182 to 2.4'),
        (lambda image: image.float() - 120, '-120 to 13'),
        (lambda image: image.float() / 255, '0 to 0.99'),
    ],
)
def test_attacks_are_on_pixels(classifier, change, told):
    batch = next(batches(classifier))
    batch['inputs'] = [change(image) for image in batch['inputs']]
    with pytest.raises(ValueError, match=f'pixels from 0 to 255; the test pipeline gives {told}'):
        robust_accuracy(classifier, [batch], 'fgsm', [0])


def test_float_images_may_end_past_the_range(classifier):
    """As a bicubic resize leaves them."""
    batch = next(batches(classifier))
    whole = robust_accuracy(classifier, [batch], 'fgsm', [0])
    batch['inputs'] = [image.float() for image in batch['inputs']]
    batch['inputs'][0][0, 0, :2] = torch.tensor([-20.0, 275.0])
    assert robust_accuracy(classifier, [batch], 'fgsm', [0]) == whole
    batch['inputs'] = [torch.zeros_like(image) for image in batch['inputs']]
    robust_accuracy(classifier, [batch], 'fgsm', [0])


class Fixed:
    """What `batches` asks of a classifier, with scores of its own."""

    def __init__(self, model):
        self.data_preprocessor = model.data_preprocessor

    def __call__(self, inputs, mode):
        return torch.eye(5)[torch.arange(len(inputs)) % 5]


def test_autoattack_is_the_standard_one(classifier):
    for answers, targets in ((range(5), 4), (range(1000), 9)):
        parts = attacks._attacker('autoattack', PixelModel(classifier, answers), 0.01).attacks
        assert [type(part).__name__ for part in parts] == ['APGD', 'APGDT', 'FAB', 'Square']
        assert [part.steps for part in parts[:3]] == [100, 100, 100]
        assert [part.n_target_classes for part in parts[1:3]] == [targets, targets]
        assert parts[3].n_queries == 5000
        assert {part.eps for part in parts} == {0.01}


def test_autoattack_wants_four_classes(classifier):
    classifier.head.num_classes = 3
    with pytest.raises(ValueError, match='autoattack needs at least 4 classes; there are 3'):
        robust_accuracy(classifier, [], 'autoattack', [0])


def test_only_the_classes_of_a_map_are_answers(classifier):
    """As in :class:`MappedAccuracy`: an image counts where the best of them is the right one."""
    answers, right, total, told = [1, 3], 0, 0, []
    for batch in batches(classifier, 6):
        pixels = torch.stack(batch['inputs']).float() / 255
        with torch.no_grad():
            best = PixelModel(classifier)(pixels)[:, answers].argmax(1)
        for i, sample in enumerate(batch['data_samples']):
            sample.set_gt_label(answers[i % 2])
            right, total = right + int(best[i] == i % 2), total + 1
        told.append(batch)
    assert 0 < right < total
    found = robust_accuracy(classifier, told, 'fgsm', [0, 0.1], answers)
    assert found[0] == 100 * right / total
    assert found[0.1] <= found[0]
    with pytest.raises(ValueError, match='autoattack needs at least 4 classes; there are 2'):
        robust_accuracy(classifier, told, 'autoattack', [0], answers)


def test_attacks_are_for_classifiers():
    with pytest.raises(
        ValueError, match='attacks are for classifiers of MMPretrain; Linear is none'
    ):
        robust_accuracy(torch.nn.Linear(1, 1), [], 'fgsm', [0])


@pytest.fixture
def folder(tmp_path, pictures):
    return dict(
        type='CustomDataset',
        data_root=str(pictures / 'classes'),
        pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
    )


def test_a_class_map(folder, tmp_path):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        config = dict(type='protune_mm.ClassMap', dataset=folder, target=['x', 'y', 'z'])
        mapped = DATASETS.build(dict(config, classes=dict(b='z')))
        assert len(mapped) == 3
        assert {mapped.get_data_info(i)['gt_label'] for i in range(3)} == {2}
        assert mapped[0]['data_samples'].gt_label.item() == 2
        assert mapped.metainfo['classes'] == ['x', 'y', 'z']
        for classes, message in (
            (dict(c='z'), "names 'c', which the data set does not have: it has a, b"),
            (dict(b='w'), "names 'w', which target does not have: it has x, y, z"),
        ):
            with pytest.raises(ValueError, match=message):
                ClassMap(folder, ['x', 'y', 'z'], classes)
        for target, classes, message in (
            (['x', 'y'], 'indices', "classes='indices': 'a' is no position among the 2"),
            (['x', 'y'], 'index', "classes='index' is unknown: use 'indices'"),
            ('nowhere/train', None, "target='nowhere/train' is no folder"),
        ):
            with pytest.raises(ValueError, match=message):
                ClassMap(folder, target, classes)
        # As ImageNet's names have 'crane', the bird and the machine.
        for own, target, side in (
            (folder, ['x', 'b', 'b'], 'target'),
            (dict(folder, metainfo=dict(classes=['b', 'b'])), ['x', 'b'], 'the data set'),
        ):
            with pytest.raises(ValueError, match=f"{side} has 2 classes named 'b': give"):
                ClassMap(own, target)
        # A pipeline may be within wrappers.
        twice = dict(type='mmengine.ConcatDataset', datasets=[folder, folder])
        within = ClassMap(twice, ['x', 'b'])
        assert within[len(within) - 1]['data_samples'].gt_label.item() == 1
        lazy = ClassMap(dict(folder, lazy_init=True), ['x', 'a'], lazy_init=True)
        assert len(lazy) == 3
        same = ClassMap(folder, ['z', 'b', 'y'])
        assert {same.get_data_info(i)['gt_label'] for i in range(len(same))} == {1}
        for name in ('n2', 'n1', 'a'):
            (tmp_path / 'train' / name).mkdir(parents=True)
        by_folder = ClassMap(folder, str(tmp_path / 'train'))
        assert {by_folder.get_data_info(i)['gt_label'] for i in range(len(by_folder))} == {0}
        with pytest.raises(ValueError, match=r'no class of the data set \(a, ...\) is one of'):
            ClassMap(folder, ['x'])
        several = DATASETS.build(folder)
        several.get_data_info = lambda index: dict(gt_label=[0, 1])
        with pytest.raises(ValueError, match=r'images of one class; one of these has .* 0, 1$'):
            ClassMap(several, ['a', 'b'])


def test_accuracy_on_a_class_map_asks_for_one():
    metric = MappedAccuracy()
    for metainfo in (None, dict(classes=['a', 'b'])):
        metric.dataset_meta = metainfo
        with pytest.raises(ValueError, match=r'is for a protune_mm.ClassMap: put one around'):
            metric.process({}, [dict(gt_label=torch.tensor([1]), pred_score=torch.rand(2))])


def test_accuracy_by_the_number_of_training_images(folder):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        metric = ShotAccuracy(folder, bounds=(3, 3))
    metric.counts = {0: 500, 1: 50, 2: 5}
    metric.bounds = (20, 100)
    scores = torch.eye(3)
    for label, guess in ((0, 0), (0, 1), (1, 1), (2, 0), (2, 2), (2, 2)):
        metric.process({}, [dict(gt_label=torch.tensor([label]), pred_score=scores[guess])])
    found = metric.evaluate(6)
    assert found == pytest.approx(
        {'shots/many': 50, 'shots/medium': 100, 'shots/few': 200 / 3, 'shots/mean': 650 / 9}
    )


@pytest.fixture
def imagenet(tmp_path):
    """Folders laid out as ImageNet's and its variants', with four classes."""
    import cv2

    image = np.random.RandomState(0).randint(0, 255, (40, 40, 3), dtype=np.uint8)
    names = [f'n0{i}' for i in range(4)]
    folders = {
        'imagenet/train': names,
        'imagenetv2-matched-frequency-format-val': ['0', '1', '2', '3'],
        'imagenet-a': names[1:3],
        'imagenet-r': names[:3],
        'sketch': names,
    }
    for folder, classes in folders.items():
        for name in classes:
            (tmp_path / 'data' / folder / name).mkdir(parents=True)
            cv2.imwrite(str(tmp_path / 'data' / folder / name / 'a.jpg'), image)
    return tmp_path


@pytest.mark.parametrize(('variant', 'subset'), [('v2', 4), ('a', 2), ('r', 3), ('sketch', 4)])
def test_a_config_for_every_variant_of_imagenet(imagenet, monkeypatch, variant, subset):
    from mmengine.runner import Runner

    from protune_mm import load_config

    cfg = load_config(f'configs/robustness/resnet50_protune_imagenet-{variant}.py')
    monkeypatch.chdir(imagenet)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        dataset = Runner.build_dataloader(dict(cfg.test_dataloader, num_workers=0)).dataset
        metric = MappedAccuracy()
    assert len(dataset) == len(dataset.metainfo['subset']) == subset
    labels = [dataset[i]['data_samples'].gt_label.item() for i in range(subset)]
    assert labels == dataset.metainfo['subset']
    # A model that always says the fourth class is right where that is one of the answers.
    metric.dataset_meta = dataset.metainfo
    score = torch.tensor([0.1, 0.3, 0.2, 0.4])
    metric.process({}, [dict(gt_label=torch.tensor([i]), pred_score=score) for i in labels])
    assert metric.evaluate(subset) == pytest.approx({'accuracy/top1': 100 / subset})


FEW = ('--corruptions', 'fog', 'contrast', '--severities', '1', '5')


def test_the_tool_on_a_classifier(trained_cls, tmp_path):
    config, checkpoint = trained_cls
    out = tmp_path / 'new' / 'robust.json'
    attack = ('--attacks', 'fgsm', '--budgets', 0, 2)
    common = (config, checkpoint, '--metric', 'accuracy/top1', '--work-dir', tmp_path, '--out', out)
    run_tool('tools/test_robustness.py', *common, *FEW, *attack)
    found = json.loads(out.read_text())['scores']
    corrupt = [found[f'{name} {severity}'] for name in ('fog', 'contrast') for severity in (1, 5)]
    of = ' (fog, contrast; severities 1, 5)'
    assert found[f'mPC{of}'] == pytest.approx(sum(corrupt) / 4)
    assert found[f'mCE{of}'] == pytest.approx(100 - found[f'mPC{of}'])
    assert 'mPC' not in found, 'it is not that of all fifteen'
    assert found['fgsm, 0/255'] == pytest.approx(found['clean'], abs=1e-3)
    assert found['fgsm, 2/255'] <= found['fgsm, 0/255']
    again = run_tool('tools/test_robustness.py', *common, *FEW, *attack, '--baseline', out)
    assert 'fog 1:' not in again.stdout, 'what is there is not computed again'
    assert f'mCE over baseline{of}: 100.0' in again.stdout
    found = json.loads(out.read_text())['scores']
    held = json.loads(out.read_text())
    held['about']['test images'] += 1
    (tmp_path / 'larger.json').write_text(json.dumps(held))
    larger = (*common[:-2], *FEW, '--baseline', tmp_path / 'larger.json')
    refused = run_tool('tools/test_robustness.py', *larger, check=False)
    assert 'larger.json has another number of test images: ' in refused.stderr
    assert 'clean:' not in refused.stdout
    more = ('--corruptions', 'snow', '--severities', '1', '--baseline', out)
    lacking = run_tool('tools/test_robustness.py', *common[:-2], *more, check=False)
    assert lacking.stderr.strip().endswith('has no score under snow 1: test it there, too')
    assert 'clean:' not in lacking.stdout, 'told before anything is tested'
    # Attacks that are asked for later are on the same weights.
    later = (*common[:-1], tmp_path / 'later.json', '--no-corruptions')
    run_tool('tools/test_robustness.py', *later)
    run_tool('tools/test_robustness.py', *later, *attack)
    second = json.loads((tmp_path / 'later.json').read_text())['scores']
    assert {k: v for k, v in found.items() if 'fgsm' in k or k == 'clean'} == second
    assert second['fgsm, budgets 0 2'] == {k: second[k] for k in ('fgsm, 0/255', 'fgsm, 2/255')}
    # How images are loaded decides no score.
    workers = ('--cfg-options', 'test_dataloader.num_workers=1')
    again = run_tool(
        'tools/test_robustness.py', *common, *FEW, *attack, '--baseline', out, *workers
    )
    assert 'fog 1:' not in again.stdout
    for more in (('--policy', 'head-only'), ('--cfg-options', 'test_dataloader.batch_size=1')):
        other = run_tool('tools/test_robustness.py', *common, *more, check=False)
        assert 'robust.json has the scores of another config: config with digest' in other.stderr
    assert json.loads(out.read_text())['scores'] == found, 'nothing is lost'
    ours = 'is no file that --out of tools/test_robustness.py has written'
    for text, told in (('{"accuracy/top1": 50.0}', ours), ('{"about"', 'is no JSON (')):
        (tmp_path / 'metrics.json').write_text(text)
        for where in (('--baseline',), ('--no-corruptions', '--out')):
            other = run_tool(
                'tools/test_robustness.py', *common[:-2], *where, tmp_path / 'metrics.json',
                check=False,
            )  # fmt: skip
            assert f'metrics.json {told}' in other.stderr.strip().splitlines()[-1]
        assert (tmp_path / 'metrics.json').read_text() == text
    held['about']['test images'] -= 2
    (tmp_path / 'grown.json').write_text(json.dumps(held))
    grown = run_tool(
        'tools/test_robustness.py', *common[:-1], tmp_path / 'grown.json', *FEW, check=False
    )
    assert 'the scores of another number of test images: test images 5, here 6;' in grown.stderr
    wrong = run_tool(
        'tools/test_robustness.py', *common[:3], 'accuracy', *common[4:6], *FEW, check=False
    )
    assert '--metric accuracy: there are accuracy/top1' in wrong.stderr
    lower = run_tool('tools/test_robustness.py', *common[:3], 'rmse', *common[4:6], check=False)
    assert "metric 'rmse' is better where it is lower" in lower.stderr
    assert 'clean:' not in lower.stdout


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return importlib.import_module('test_robustness')


def test_two_processes_with_one_file_keep_the_scores_of_both(tool, tmp_path):
    file = str(tmp_path / 'robust.json')
    one, two = tool.Scores(file, dict(metric='a')), tool.Scores(file, dict(metric='a'))
    one.note({'fog 1': 1, 'mCE over baseline': 3})
    two.note({'snow 1': 2}, but='mCE over baseline')
    one.note({'clean': 4})
    assert json.loads((tmp_path / 'robust.json').read_text())['scores'] == one.known
    assert one.known == {'fog 1': 1, 'snow 1': 2, 'clean': 4}
    (tmp_path / 'robust.json').unlink()
    tool.Scores(file, dict(metric='b')).note({'clean': 5})
    with pytest.raises(ValueError, match='has the scores of another metric: metric b, here a'):
        two.note({'fog 2': 1})


def test_a_checkpoint_may_be_an_address(tool):
    address = 'https://download.openmmlab.com/a.pth'
    args = argparse.Namespace(checkpoint=address, metric='accuracy/top1')
    about = tool.about_test(args, Config(dict(test_dataloader=dict())))
    assert (about['checkpoint'], about['checkpoint written at']) == (address, None)


def test_the_tool_on_a_detector_and_a_segmentor(trained, trained_seg, shapes, tmp_path):
    work, _ = trained
    checkpoint = max(work.glob('epoch_*.pth'))  # Another test may have gone on.
    detector = [SHAPES, checkpoint, '--metric', 'coco/bbox_mAP']
    options = ['--cfg-options', *QUICK, *data(shapes)]
    few = ['--corruptions', 'fog', '--severities', '1', '--work-dir', tmp_path]
    done = run_tool('tools/test_robustness.py', *detector, *few, *options)
    assert 'mPC (fog; severities 1): ' in done.stdout
    refused = run_tool(
        'tools/test_robustness.py', *detector, '--no-corruptions', '--attacks', 'fgsm',
        '--work-dir', tmp_path, *options, check=False,
    )  # fmt: skip
    assert refused.stderr.strip().endswith(
        'attacks are for classifiers of MMPretrain; MaskRCNN is none'
    )
    assert 'clean:' not in refused.stdout, 'refused before anything is tested'
    config, checkpoint = trained_seg
    done = run_tool('tools/test_robustness.py', config, checkpoint, '--metric', 'mIoU', *few)
    assert 'rPC (fog; severities 1): ' in done.stdout
