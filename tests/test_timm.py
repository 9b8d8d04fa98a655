"""Backbones of timm, through MMPretrain's wrapper, tell where their stages end."""

import pytest
import torch
from mmengine.registry import MODELS

import protune_mm
from protune_mm.tuned import frozen_tensors, prompts
from tests.conftest import flat, move_prompts

pytest.importorskip('timm', reason='timm is not installed: requirements/tests.txt has it')

FEATURES = dict(features_only=True)
VIT = dict(depth=4, embed_dim=48, num_heads=3)
CASES = {
    # name: arguments, image, stages
    'resnet10t': (dict(), (64, 96), ['layer1', 'layer2', 'layer3', 'layer4']),
    'resnet10t-stem-read': (
        dict(features_only=True, out_indices=(0, 2)), (64, 96), ['act1', 'layer1', 'layer2'],
    ),
    'mobilenetv3_small_050': (
        dict(features_only=True, out_indices=(2, 3, 4)), (64, 96),
        [f'blocks.{i}' for i in (0, 1, 3, 5)],
    ),
    'regnety_002': (dict(), (64, 96), ['s1', 's2', 's3', 's4']),
    'deit_tiny_distilled_patch16_224': (
        VIT, (224, 224), [f'blocks.{i}' for i in range(4)],
    ),
    # Patches of a map.
    'vit_small_r26_s32_224': (
        dict(VIT, img_size=(64, 96)), (64, 96), [f'blocks.{i}' for i in range(4)],
    ),
    'convnext_atto': (FEATURES, (64, 96), [f'stages_{i}' for i in range(4)]),
    'swin_tiny_patch4_window7_224': (
        dict(**FEATURES, depths=(1, 1, 2, 1), embed_dim=24, num_heads=(1, 2, 3, 6)),
        (224, 224), [f'layers_{i}' for i in range(4)],
    ),
    'vit_tiny_patch16_224': (
        dict(VIT, dynamic_img_size=True), (64, 96), [f'blocks.{i}' for i in range(4)],
    ),
    'vit_small_patch14_reg4_dinov2': (
        dict(VIT, **FEATURES, out_indices=(1, 3), img_size=(70, 98)), (70, 98),
        ['blocks.1', 'blocks.3'],
    ),
    'xcit_nano_12_p16_224': (dict(depth=4), (64, 96), [f'blocks.{i}' for i in range(4)]),
    'mixer_s32_224': (dict(), (224, 224), [f'blocks.{i}' for i in (1, 3, 5, 7)]),
    'levit_128s': (dict(), (224, 224), [f'stages.{i}' for i in range(3)]),
}  # fmt: skip


def wrapped(name, lean=None, **more):
    config = dict(type='mmpretrain.TIMMBackbone', model_name=name.partition('-')[0], **more)
    torch.manual_seed(0)
    backbone = MODELS.build(config).requires_grad_(False)
    backbone.train(False)
    return backbone if lean is None else protune_mm.protune(backbone, lean=lean)


@pytest.mark.parametrize('name', CASES)
def test_a_timm_backbone(name):
    arguments, size, stages = CASES[name]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = flat(wrapped(name, **arguments)(x))
        for lean, tolerance in ((False, 0), (True, 1e-4)):  # float32
            got = flat(wrapped(name, lean, **arguments)(x))
            for a, b in zip(expected, got, strict=True):
                assert (a - b).abs().max() <= tolerance * a.abs().max()
    for lean in (False, True):
        tuned = wrapped(name, lean, **arguments)
        names = [m._protune_site.name for m in tuned.modules() if hasattr(m, '_protune_site')]
        assert names == stages
        own = protune_mm.tuned_parameters(tuned)
        assert sum(p.numel() for p in own.values()) <= 0.08 * sum(
            t.numel() for _, t in frozen_tensors(tuned)
        )
        move_prompts(tuned)
        before = {n: t.clone() for n, t in frozen_tensors(tuned)}
        sum(o.square().mean() for o in flat(tuned.train()(x))).backward()
        for key, parameter in tuned.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (key in own), key
        assert all(torch.equal(t, before[n]) for n, t in frozen_tensors(tuned))


@pytest.mark.parametrize('name', ['hrnet_w18_small', 'densenet121', 'rdnet_tiny'])
def test_a_timm_backbone_that_tells_no_stages(name):
    more = FEATURES if name.startswith('hrnet') else {}
    with pytest.raises(ValueError, match=r'TIMMBackbone tells no stages: name its stages'):
        wrapped(name, True, **more)


@pytest.mark.parametrize(
    ('name', 'what'),
    [
        ('volo_d1_224', 'VOLO returns channels last'),
        ('hiera_tiny_224', 'Hiera keeps its tokens in the order of its mask units'),
        ('tnt_s_patch16_224', 'TNT hands pixels and patches on'),
        ('pit_ti_224', 'PoolingVisionTransformer hands maps and class tokens on'),
        ('selecsls42', 'SelecSls hands lists of maps on'),
        ('samvit_base_patch16', 'VisionTransformerSAM returns channels last'),
        ('naflexvit_base_patch16_gap', 'NaFlexVit takes patches of any grid'),
    ],
)
def test_a_timm_backbone_with_no_place_for_prompts(name, what):
    with pytest.raises(ValueError, match=f'TIMMBackbone: {what}'):
        wrapped(name, True)


@pytest.mark.parametrize('kind', ['LoRA', 'ScaleShift'])
def test_layers_that_are_special_merge_or_are_left_out(kind):
    # All convolutions have standardized weights, all norms an activation inside.
    with pytest.raises(ValueError, match=r'finds no (layer|norm)'):
        protune_mm.protune(wrapped('resnetv2_50x1_bit', **FEATURES), prompt=dict(type=kind))
    # Some norms have an activation; convolutions pad by the size of their map.
    backbone = wrapped('tf_efficientnetv2_b0', **FEATURES)
    tuned = protune_mm.protune(backbone, prompt=dict(type=kind))
    move_prompts(tuned)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = flat(tuned(x))
        for a, b in zip(expected, flat(protune_mm.merge(tuned)(x)), strict=True):
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


@pytest.mark.parametrize('name', ['resnet10t', 'convnext_atto', 'swin_tiny_patch4_window7_224'])
def test_adapters_read_the_channels_of_what_they_are_beside(name):
    more, size, _ = CASES[name]
    tuned = protune_mm.protune(wrapped(name, **more), prompt=dict(type='Adapter')).train()
    outs = flat(tuned(torch.randn(1, 3, *size)))
    sum(o.square().mean() for o in outs).backward()
    assert all(p.up.weight.grad is not None for p in prompts(tuned).values())


@pytest.mark.filterwarnings('ignore:Using both features_only and checkpoint_path')
@pytest.mark.parametrize('library', ['mmpretrain', 'mmseg'])
def test_weights_that_the_wrapper_has_loaded_count(library, tmp_path, log):
    """As of ``pretrained=True``, without a network here."""
    import timm

    model = timm.create_model('resnet10t', features_only=True)
    torch.save(model.state_dict(), tmp_path / 'base.pth')
    config = dict(
        type='protune_mm.ProTuned',
        base=f'{library}.TIMMBackbone',
        model_name='resnet10t',
        features_only=True,
        pretrained=False,
        require_weights=True,
    )
    tuned = MODELS.build(dict(config, checkpoint_path=str(tmp_path / 'base.pth')))
    tuned.init_weights()
    with torch.no_grad():
        tuned(torch.randn(1, 3, 64, 64))
    stem = next(t for n, t in tuned.named_parameters() if n.endswith('conv1.0.weight'))
    assert torch.equal(stem, model.state_dict()['conv1.0.weight'])
    with pytest.raises(RuntimeError, match='no weights were loaded into it'):
        MODELS.build(config)(torch.randn(1, 3, 64, 64))
