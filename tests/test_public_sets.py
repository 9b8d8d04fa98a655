"""Configs for COCO, ADE20K, Cityscapes and ImageNet read data of their layout, whole or in part."""

import copy
import json

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS, DefaultScope

from protune_mm import load_config
from protune_mm.config import library
from tests.conftest import ROOT

CONFIGS = sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
COUNT = 4
"""Images in each split."""


def picture(path, channels=3, high=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(path)))
    shape = (48, 64, channels) if channels > 1 else (48, 64)
    cv2.imwrite(str(path), rng.integers(0, high, shape, dtype=np.uint8))


def coco(root):
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        images = [dict(id=i, file_name=f'{i:012d}.jpg', height=48, width=64) for i in range(COUNT)]
        boxes = [
            dict(
                id=i, image_id=i, category_id=1 + i % 2, bbox=[8, 8, 20, 20], area=400, iscrowd=0,
                segmentation=[[8, 8, 28, 8, 28, 28, 8, 28]],
            )
            for i in range(COUNT)
        ]  # fmt: skip
        kinds = [dict(id=1, name='person'), dict(id=2, name='bicycle')]
        found = dict(images=images, annotations=boxes, categories=kinds)
        (root / f'annotations/instances_{split}2017.json').write_text(json.dumps(found))
        for image in images:
            picture(root / f'{split}2017' / image['file_name'])


def ade20k(root):
    for split in ('training', 'validation'):
        for i in range(COUNT):
            picture(root / f'images/{split}/{i}.jpg')
            picture(root / f'annotations/{split}/{i}.png', 1, 151)


def cityscapes(root):
    for split in ('train', 'val'):
        for i in range(COUNT):
            name = f'{split}/city/city_{i:06d}_000019'
            picture(root / f'leftImg8bit/{name}_leftImg8bit.png')
            picture(root / f'gtFine/{name}_gtFine_labelTrainIds.png', 1, 19)


def imagenet(root):
    (root / 'meta').mkdir(parents=True)
    for split in ('train', 'val'):
        names = [f'n0{i % 2}/{i}.JPEG' for i in range(COUNT)]
        lines = [f'{name} {i % 2}' for i, name in enumerate(names)]
        (root / f'meta/{split}.txt').write_text('\n'.join(lines))
        for name in names:
            picture(root / split / name)


MAKERS = {
    'coco': (coco, 'coco', 80),
    'ade20k': (ade20k, 'ade/ADEChallengeData2016', 150),
    'cityscapes': (cityscapes, 'cityscapes', 19),
    'in1k': (imagenet, 'imagenet', 1000),
}
"""Last part of a config's name to what makes a set like its own, its folder, and its classes."""


# The stack's own: of a transform in mmseg's stock ADE20K config, and of pycocotools with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
@pytest.mark.filterwarnings('ignore:`reduce_zero_label` will be deprecated')
@pytest.mark.parametrize('name', CONFIGS)
def test_reads_its_layout(name, tmp_path, monkeypatch):
    cfg = load_config(f'configs/{name}.py')
    make, folder, classes = MAKERS[name.rpartition('_')[2]]
    make(tmp_path / 'data' / folder)
    monkeypatch.chdir(tmp_path)
    with DefaultScope.overwrite_default_scope(library(cfg)):
        for split in ('train', 'val', 'test'):
            dataset = DATASETS.build(copy.deepcopy(cfg[f'{split}_dataloader'].dataset))
            assert len(dataset) == COUNT
            sample = dataset[0]
            assert sample['inputs'].shape[0] == 3
            truth = sample['data_samples']
            if split == 'train' and library(cfg) == 'mmdet':
                assert len(truth.gt_instances.bboxes) == 1
                assert ('masks' in truth.gt_instances) == ('mask' in name)
            elif library(cfg) == 'mmseg':
                size = sample['inputs'].shape[-2:] if split == 'train' else (48, 64)
                assert truth.gt_sem_seg.data.shape[-2:] == size  # Those to test by keep theirs.
            elif library(cfg) == 'mmpretrain':
                assert truth.gt_label.item() == 0
            if library(cfg) != 'mmpretrain':  # Its sets know their classes by their folders.
                assert len(dataset.metainfo['classes']) == classes
        # Half of the labels, with the config's own data set and transforms.
        half = dict(type='protune_mm.FewLabels', dataset=cfg.train_dataloader.dataset, fraction=0.5)
        few = DATASETS.build(half)
        whole = DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))
        assert len(few) == COUNT // 2
        paths = [whole.get_data_info(i)['img_path'] for i in range(COUNT)]
        assert {few.get_data_info(i)['img_path'] for i in range(len(few))} < set(paths)
        assert few[0]['inputs'].shape[0] == 3
        assert few.metainfo['classes'] == whole.metainfo['classes']


def test_every_config_is_tried():
    assert {name.rpartition('_')[2] for name in CONFIGS} == set(MAKERS)
