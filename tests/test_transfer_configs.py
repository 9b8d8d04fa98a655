"""Configs for public sets read data of their layout, and validate on no test image."""

import pickle

import cv2
import mat4py
import numpy as np
import pytest
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, DefaultScope

from protune_mm import load_config
from tests.conftest import ROOT

CONFIGS = sorted(p.stem for p in (ROOT / 'configs/transfer').glob('*.py'))
PER_CLASS = 20
"""Images of each of two classes in each split."""


def jpg(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = abs(hash(str(path))) % 2**31
    image = np.random.RandomState(seed).randint(0, 255, (40, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(path), image)


def text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines))


def caltech101(root):
    for split in ('train', 'test'):
        names = [f'{c}/{split}{i}.jpg' for c in ('a', 'b') for i in range(PER_CLASS)]
        text(root / f'meta/{split}.txt', [f'{n} {int(n[0] == "b")}' for n in names])
        for name in names:
            jpg(root / '101_ObjectCategories' / name)


def pets(root):
    for split in ('trainval', 'test'):
        names = [f'{c}_{split}{i}' for c in (1, 2) for i in range(PER_CLASS)]
        text(root / f'annotations/{split}.txt', [f'{n} {n[0]} 1 1' for n in names])
        for name in names:
            jpg(root / 'images' / f'{name}.jpg')


def food101(root):
    for split in ('train', 'test'):
        names = [f'{c}/{split}{i}' for c in ('apple_pie', 'waffles') for i in range(PER_CLASS)]
        text(root / f'meta/{split}.txt', names)
        for name in names:
            jpg(root / 'images' / f'{name}.jpg')


def sun397(root):
    for split, part in (('Training', 'train'), ('Testing', 'test')):
        kinds = ('/a/abbey', '/y/youth_hostel')
        names = [f'{c}/{part}{i}.jpg' for c in kinds for i in range(PER_CLASS)]
        text(root / f'Partitions/{split}_01.txt', names)
        for name in names:
            jpg(root / 'SUN397' / name[1:])


def flowers102(root):
    splits = dict(trnid=range(1, 41), valid=range(41, 81), tstid=range(81, 121))
    root.mkdir(parents=True)
    mat4py.savemat(str(root / 'setid.mat'), {k: list(v) for k, v in splits.items()})
    mat4py.savemat(str(root / 'imagelabels.mat'), dict(labels=[1 + i % 2 for i in range(120)]))
    for i in range(1, 121):
        jpg(root / 'jpg' / f'image_{i:05d}.jpg')


def dtd(root):
    names = [f'{c}/{c}_{i}.jpg' for i in range(60) for c in ('banded', 'zigzagged')]
    images = dict(
        name=names,
        set=[1 + i % 3 for i in range(60) for _ in range(2)],
        **{'class': [1 + (name[0] == 'z') * 46 for name in names]},
    )
    (root / 'imdb').mkdir(parents=True)
    mat4py.savemat(str(root / 'imdb/imdb.mat'), dict(images=images))
    for name in names:
        jpg(root / 'images' / name)


def aircraft(root):
    for split in ('train', 'val', 'test'):
        names = [f'{i}{split}' for i in range(2 * PER_CLASS)]
        kinds = [('707-320', 'Yak-42')[i % 2] for i in range(2 * PER_CLASS)]
        lines = [f'{n} {k}' for n, k in zip(names, kinds, strict=True)]
        text(root / f'data/images_variant_{split}.txt', lines)
        for name in names:
            jpg(root / 'data/images' / f'{name}.jpg')


def cars(root):
    folders = dict(train='cars_train_annos', test='cars_test_annos_withlabels')
    (root / 'devkit').mkdir(parents=True)
    for split, annotations in folders.items():
        names = [f'{i:05d}.jpg' for i in range(2 * PER_CLASS)]
        kinds = [1 + i % 2 for i in range(2 * PER_CLASS)]
        found = dict(annotations={'fname': names, 'class': kinds})
        mat4py.savemat(str(root / f'devkit/{annotations}.mat'), found)
        for name in names:
            jpg(root / f'cars_{split}' / name)


def cub(root):
    count = 4 * PER_CLASS
    names = [f'{"ab"[i % 2]}/{i}.jpg' for i in range(count)]
    text(root / 'images.txt', [f'{i + 1} {name}' for i, name in enumerate(names)])
    text(root / 'image_class_labels.txt', [f'{i + 1} {1 + i % 2}' for i in range(count)])
    text(root / 'train_test_split.txt', [f'{i + 1} {int(i < count // 2)}' for i in range(count)])
    for name in names:
        jpg(root / 'images' / name)


def cifar(root, folder, train, test, key, classes):
    """Ten images of each class a file: every tenth validates."""
    count = 10 * classes
    (root / folder).mkdir(parents=True)
    for name in (*train, *test):
        seed = abs(hash(name)) % 2**31
        data = np.random.RandomState(seed).randint(0, 255, (count, 3072), dtype=np.uint8)
        entry = {'data': data, key: [i % classes for i in range(count)]}
        (root / folder / name).write_bytes(pickle.dumps(entry))


def cifar10(root):
    batches = [f'data_batch_{i}' for i in range(1, 6)]
    cifar(root, 'cifar-10-batches-py', batches, ['test_batch'], 'labels', 10)


def cifar100(root):
    cifar(root, 'cifar-100-python', ['train'], ['test'], 'fine_labels', 100)


def vtab1k(root):
    root = root / 'caltech101'
    for split, count in (('train800', 40), ('val200', 10), ('test', 30)):
        names = [f'images/{split}/{i:06d}.jpg' for i in range(count)]
        text(root / f'{split}.txt', [f'{name} {i % 2}' for i, name in enumerate(names)])
        for name in names:
            jpg(root / name)


MAKERS = {
    'caltech101': (caltech101, 'caltech-101'),
    'pets': (pets, 'Oxford-IIIT_Pets'),
    'food101': (food101, 'food-101'),
    'sun397': (sun397, 'SUN397'),
    'flowers102': (flowers102, 'Flowers102'),
    'dtd': (dtd, 'dtd'),
    'cars': (cars, 'Stanford_Cars'),
    'cub': (cub, 'CUB_200_2011'),
    'aircraft': (aircraft, 'fgvc-aircraft-2013b'),
    'cifar10': (cifar10, 'cifar10'),
    'cifar100': (cifar100, 'cifar100'),
    'vtab1k': (vtab1k, 'vtab-1k'),
}
"""Name of a set to what makes one like it, and its folder below data/."""


def set_of(name):
    """The set of a config, also of its versions with a long tail."""
    return name.removeprefix('resnet50_protune_').partition('-lt')[0]


@pytest.mark.parametrize('name', CONFIGS)
def test_reads_its_layout_and_validates_on_no_test_image(name, tmp_path, monkeypatch):
    cfg = load_config(f'configs/transfer/{name}.py')
    make, folder = MAKERS[set_of(name)]
    make(tmp_path / 'data' / folder)
    monkeypatch.delenv('VTAB_TASK', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('mmpretrain.datasets.cifar.check_md5', lambda *_: True)
    tail = '-lt' in name
    if tail:
        assert cfg.train_dataloader.dataset.ratio == int(name.partition('-lt')[2] or 100)
        assert cfg.test_evaluator[1].dataset == cfg.train_dataloader.dataset
        for part in (cfg.train_dataloader, cfg.test_evaluator[1]):
            part.dataset.ratio = 2  # Few images have no place between 1 and 100.
    seen = {}
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        for split in ('train', 'val', 'test'):
            dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
            sample = dataset[0]
            assert sample['inputs'].shape == (3, 224, 224)
            infos = [dataset.get_data_info(i) for i in range(len(dataset))]
            seen[split] = {
                info['img_path'] if 'img_path' in info else info['img'].tobytes() for info in infos
            }
            # Flowers102 and the first task of VTAB have no names.
            classes = len(dataset.metainfo.get('classes') or range(102))
            assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == classes
            assert len(seen[split]) == len(dataset) > 0
        evaluator = Evaluator(cfg.test_evaluator)
        if tail:
            assert sum(evaluator.metrics[1].counts.values()) == len(seen['train'])
    assert not seen['train'] & seen['val']
    assert not (seen['train'] | seen['val']) & seen['test']


def test_every_task_of_vtab(monkeypatch):
    config = 'configs/transfer/resnet50_protune_vtab1k.py'
    tasks = load_config(config).classes
    assert len(tasks) == 19
    for task, count in tasks.items():
        monkeypatch.setenv('VTAB_TASK', task)
        cfg = load_config(config)
        assert cfg.train_dataloader.dataset.data_root == f'data/vtab-1k/{task}'
        assert cfg.model.head.num_classes == cfg.data_preprocessor.num_classes == count
    monkeypatch.setenv('VTAB_TASK', 'pets')
    with pytest.raises(ValueError, match="VTAB_TASK='pets' is none of VTAB's tasks: use caltech"):
        load_config(config)


def test_every_config_is_tried():
    assert {set_of(name) for name in CONFIGS} == set(MAKERS)
