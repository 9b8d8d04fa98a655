"""Every config of the repository builds, and has its head-only and full fine-tuning twins."""

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import protune_mm
from protune_mm import cli
from protune_mm.tuned import backbones
from tests.conftest import ROOT

CONFIGS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'configs').rglob('*protune_*.py'))


def build(cfg):
    init_default_scope(cfg.default_scope)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('path', CONFIGS)
def test_builds_with_its_twins(path):
    trained = {}
    for policy in (None, 'head-only', 'full'):
        model = build(cli.read_config(path, policy=policy))
        trained[policy] = {n for n, p in model.named_parameters() if p.requires_grad}
        tuned = set(protune_mm.tuned_parameters(model))
        assert bool(tuned) == (policy is None)
        if policy is None:
            prompts = tuned
            assert len(backbones(model)) == 1
    assert trained[None] == trained['head-only'] | prompts
    assert trained['head-only'] < trained['full']
    assert not prompts & trained['full']


def test_the_configs_a_user_expects_are_there():
    expected = {
        'mask_rcnn_protune_r50_coco',
        'faster_rcnn_protune_r50_coco',
        'retinanet_protune_r50_coco',
        'mask_rcnn_protune_swin-t_coco',
        'upernet_protune_r50_ade20k',
        'upernet_protune_r50_cityscapes',
        'upernet_protune_swin-t_ade20k',
        'upernet_protune_vit-b_ade20k',
        'resnet50_protune_in1k',
        'swin-t_protune_in1k',
        'vit-b_protune_in1k',
    }
    assert expected <= {path.rsplit('/', 1)[-1].removesuffix('.py') for path in CONFIGS}
    index = (ROOT / 'configs/metafile.yml').read_text()
    for name in expected:
        assert f'Config: configs/{name}.py' in index


@pytest.mark.parametrize('path', [p for p in CONFIGS if p.count('/') == 1])
def test_only_the_model_and_the_runner_differ_from_stock(path):
    cfg = protune_mm.load_config(path).to_dict()
    from mmengine.config import Config

    lines = (ROOT / path).read_text().splitlines()
    base = next(line.split("'")[1] for line in lines if line.startswith('_base_ ='))
    expected = Config.fromstring(f'_base_ = [{base!r}]', '.py').to_dict()
    for key, value in expected.items():
        if key != 'model':
            assert cfg[key] == value, key
    assert set(cfg) - set(expected) <= {'runner_type', 'checkpoint'}
    changed = cfg['model'].pop('backbone')
    expected['model'].pop('backbone')
    assert cfg['model'] == expected['model']
    assert changed['type'] == 'protune_mm.ProTuned'


@pytest.mark.parametrize('path', [p for p in CONFIGS if '/robustness/' in p])
def test_only_the_test_set_differs_from_the_config_that_was_trained(path):
    cfg = protune_mm.load_config(path).to_dict()
    trained = protune_mm.load_config('configs/resnet50_protune_in1k.py').to_dict()
    loader, trained_loader = cfg['test_dataloader'], trained['test_dataloader']
    assert loader['dataset'].pop('type') == 'protune_mm.ClassMap'
    assert loader['dataset']['dataset']['pipeline'] == trained_loader.pop('dataset').pop('pipeline')
    del loader['dataset']
    assert cfg.pop('test_evaluator') != trained.pop('test_evaluator')
    assert cfg == trained


def test_a_twin_of_the_same_seed_starts_with_the_same_neck_and_head():
    path = 'configs/small/mask_rcnn_protune_mobilenetv2_shapes.py'
    states = []
    for policy in (None, 'head-only', 'full'):
        cfg = cli.read_config(path, policy=policy)
        cfg.model.backbone.init_cfg = None
        torch.manual_seed(0)
        model = build(cfg)
        model.init_weights()
        states.append(
            {n: p for n, p in model.state_dict().items() if not n.startswith('backbone.')}
        )
    for other in states[1:]:
        for name, tensor in states[0].items():
            assert torch.equal(tensor, other[name]), name
