"""One epoch of the real configs, on real images and weights, where they are there."""

import os
from pathlib import Path

import pytest
import torch

from tests.conftest import run_tool

DATA = Path(os.environ.get('PROTUNE_DATA', 'data'))
WEIGHTS = Path(os.environ.get('PROTUNE_WEIGHTS', 'weights'))
RUNS = {
    'mask_rcnn_protune_mobilenetv2_camvid': ('camvid', 'train_dataloader.dataset.indices=8'),
    'retinanet_protune_mobilenetv2_fruit': ('fruit', 'train_dataloader.dataset.indices=8'),
    'fcn_protune_mobilenetv2_camvid': ('camvid', 'train_dataloader.dataset.indices=16'),
    'mobilenetv2_protune_flowers5': ('flowers5', 'train_dataloader.dataset.indices=64'),
    'vit-s_protune_flowers5': ('flowers5', 'train_dataloader.dataset.indices=64'),
}
FILES = {'vit-s_protune_flowers5': 'vit_s14_saliency_fp16.pth'}


@pytest.mark.parametrize('name', RUNS)
def test_real_configs_train(name, tmp_path):
    folder, few = RUNS[name]
    weights = WEIGHTS / FILES.get(name, 'mobilenetv2_imagenet.pth')
    for needed, variable in ((DATA / folder, 'PROTUNE_DATA'), (weights, 'PROTUNE_WEIGHTS')):
        if not needed.exists():
            pytest.skip(f'{needed} is not there; set {variable}')
    options = [few, 'train_cfg.max_epochs=1', 'default_hooks.checkpoint.save_best=None']
    done = run_tool(
        'tools/train.py',
        f'configs/small/{name}.py',
        '--no-validate',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        *options,
    )
    text = done.stdout + done.stderr
    assert 'frozen tensors are bit-identical to the start' in text
    assert 'no weights were loaded' not in text
    assert 'loaded weights lack' not in text
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    source = torch.load(weights, weights_only=True)['state_dict']
    for key, tensor in source.items():
        # The position embedding is resized to the smaller image.
        if f'backbone.{key}' in state and key != 'pos_embed':
            assert torch.equal(state[f'backbone.{key}'], tensor.float()), key
