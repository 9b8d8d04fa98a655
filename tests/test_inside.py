"""Prompts inside blocks: every backbone, an exact start, a gradient for each, at the place told."""

import copy

import pytest
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.report import prompt_rows
from protune_mm.tuned import frozen_tensors, prompts
from tests.conftest import EVERY, image, move_prompts
from tests.test_every_backbone import DISCONTINUOUS, outputs, pair, pictures

OPTIONS = dict(stages='inside', prompt=dict(hidden=2))
# Their blocks hold no layer that returns a map or the tokens of the whole image.
REFUSED = ('SSDVGG', 'ConvMixer', 'Conformer', 'MViT', 'CGNet')
# Their branches become one layer.
DEPLOYED = ('RepVGG', 'MobileOne', 'RepLKNet', 'RepMLPNet', 'RIFormer', 'LeViT')
every = pytest.mark.parametrize(('library', 'family'), EVERY)
pytestmark = pytest.mark.usefixtures('library_scope')


@every
def test_every_backbone_starts_as_stock_and_each_prompt_learns(library, family):
    if family.name in REFUSED + DEPLOYED:
        why = 'branches .* become one layer' if family.name in DEPLOYED else 'finds no hidden layer'
        with pytest.raises(ValueError, match=f"stages='inside'.* {why}"):
            pair(library, family, True, **OPTIONS)
        return
    stock, tuned = pair(library, family, True, **OPTIONS)
    x = pictures(family)
    with torch.no_grad():
        for a, b in zip(outputs(stock, x), outputs(tuned, x), strict=True):
            if family.name not in DISCONTINUOUS:
                assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32
    move_prompts(tuned)
    tuned.train()
    sum(o.square().sum() for o in outputs(tuned, x) if o.requires_grad).backward()
    for name, prompt in prompts(tuned).items():
        assert prompt.up.bias.grad.abs().max() > 0, name
    frozen = [p for _, p in frozen_tensors(tuned)]
    assert frozen
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize(
    ('config', 'blocks', 'channels'),
    [
        (
            dict(type='mmpretrain.MobileNetV2'),
            ['layer1.0.conv.0.bn', 'layer2.0.conv.0.bn', 'layer2.1.conv.0.bn'],
            [32, 96, 144],
        ),
        (dict(type='mmdet.ResNet', depth=50), ['layer1.0.bn1', 'layer1.1.bn1'], [64, 64]),
        (dict(type='mmdet.ResNet', depth=18), ['layer1.0.bn1', 'layer1.1.bn1'], [64, 64]),
        (
            dict(type='mmpretrain.VisionTransformer', arch='deit-small', img_size=64),
            ['layers.0.ffn.layers.0.0', 'layers.1.ffn.layers.0.0'],
            [1536, 1536],
        ),
        (
            dict(type='mmpretrain.ConvNeXt', arch='tiny'),
            ['stages.0.0.pointwise_conv1', 'stages.0.1.pointwise_conv1'],
            [384, 384],
        ),
    ],
)
def test_the_place_is_the_hidden_layer_before_its_nonlinearity(config, blocks, channels):
    tuned = protune_mm.protune(MODELS.build(config), **OPTIONS)
    found = {name.removesuffix('.prompt'): p.down.in_channels for name, p in prompts(tuned).items()}
    assert list(found)[: len(blocks)] == blocks
    assert list(found.values())[: len(blocks)] == channels


def test_reads_and_joins_what_the_norm_returns():
    torch.manual_seed(0)
    tuned = protune_mm.protune(MODELS.build(dict(type='mmdet.ResNet', depth=18)), **OPTIONS)
    move_prompts(tuned)
    block = tuned.layer1[0]
    x = torch.randn(1, 64, 9, 7)
    hidden = nn.functional.batch_norm(
        block.conv1(x),
        block.bn1.running_mean,
        block.bn1.running_var,
        block.bn1.weight,
        block.bn1.bias,
        eps=block.bn1.eps,
    )
    hidden = (hidden + block.bn1.prompt(hidden)).relu()
    expected = (block.bn2(block.conv2(hidden)) + x).relu()
    # float32 through two convolutions.
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_stays_within_eight_per_cent_by_default():
    for config in (dict(type='mmpretrain.MobileNetV2'), dict(type='mmdet.ResNet', depth=50)):
        tuned = protune_mm.protune(MODELS.build(config), stages='inside')
        count = sum(p.numel() for p in protune_mm.tuned_parameters(tuned).values())
        assert 0 < count <= 0.08 * (sum(p.numel() for p in tuned.parameters()) - count)


@pytest.mark.parametrize('option', [dict(last='series'), dict(features='plain')])
def test_options_of_prompts_after_stages_are_an_error(option):
    with pytest.raises(ValueError, match='is for prompts after stages, not inside'):
        protune_mm.protune(
            MODELS.build(dict(type='mmdet.ResNet', depth=18)), stages='inside', prompt=option
        )


def test_unknown_backbones_are_refused_clearly():
    with pytest.raises(ValueError, match='is of no known backbone family'):
        protune_mm.protune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), stages='inside')


def test_blocks_that_are_computed_again_are_refused():
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18, with_cp=True))
    with pytest.raises(ValueError, match='has with_cp=True'):
        protune_mm.protune(stock, **OPTIONS)


@pytest.mark.parametrize('kind', ['LoRA', 'Mona'])
def test_types_with_places_of_their_own_are_refused(kind):
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    with pytest.raises(ValueError, match=f"prompt.type='{kind}' has places of its own"):
        protune_mm.protune(stock, stages='inside', prompt=dict(type=kind))


def test_prompts_that_went_with_their_norms_are_an_error():
    tuned = protune_mm.protune(MODELS.build(dict(type='mmdet.ResNet', depth=18)), **OPTIONS)
    nn.SyncBatchNorm.convert_sync_batchnorm(tuned)
    with pytest.raises(RuntimeError, match=r'has 0 of its 8 prompts left: layers .* were replaced'):
        tuned.train()


def test_prompts_that_went_after_a_forward_are_an_error():
    tuned = protune_mm.protune(MODELS.build(dict(type='mmdet.ResNet', depth=18)), **OPTIONS).eval()
    with torch.no_grad():
        tuned(image())
        again = copy.deepcopy(tuned)
        tuned(image())
        fuse_conv_bn(tuned)
        with pytest.raises(RuntimeError, match='has 0 of its 8 prompts left'):
            tuned(image())
        again(image())  # The copy has its own.


def test_the_report_says_inside():
    tuned = protune_mm.protune(MODELS.build(dict(type='mmdet.ResNet', depth=18)), **OPTIONS)
    assert {row['join'] for row in prompt_rows(tuned)} == {'inside'}
