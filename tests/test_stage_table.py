"""The stage table says the truth about every backbone it lists."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.stages import FAMILIES, find_family
from protune_mm.tuned import backbones, prompts
from tests.conftest import EXAMPLES, build_protuned, build_stock, flat, image

FULL_SIZE = [
    dict(type='mmdet.ResNet', depth=50),
    dict(type='mmdet.ResNeXt', depth=50, groups=32, base_width=4),
    dict(type='mmdet.ResNet', depth=18),
    dict(type='mmdet.SwinTransformer'),
    dict(type='mmdet.MobileNetV2'),
    dict(type='mmseg.ResNetV1c', depth=101),
    dict(type='mmseg.ResNetV1d', depth=50),
    dict(type='mmseg.VisionTransformer', out_indices=(2, 5, 8, 11)),
    dict(type='mmpretrain.ConvNeXt', arch='tiny'),
    dict(type='mmpretrain.ConvNeXt', arch='small'),
    dict(type='mmpretrain.ResNeXt', depth=50),
    dict(type='mmpretrain.VisionTransformer', arch='base'),
    dict(type='mmpretrain.SwinTransformer', arch='base'),
    dict(type='mmpretrain.MobileNetV2'),
]


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_channels_are_what_the_blocks_yield(library, family):
    tuned = build_protuned(library, family, stages='blocks')
    seen = {}
    for name, prompt in prompts(tuned).items():
        prompt.register_forward_hook(
            lambda _m, i, _o, name=name: seen.update({name: i[0].shape[1]})
        )
    tuned(image())
    for name in prompts(tuned):
        site = tuned.get_submodule(name.removesuffix('.prompt'))._protune_site
        assert seen[name] == site.channels, name


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_every_stage_ends_in_a_block_of_its_own(library, family):
    backbone = build_stock(library, family)
    stages = family.split(backbone)
    blocks = [block for stage in stages for block in stage.blocks]
    assert len(stages) == 4
    assert len(set(blocks)) == len(blocks)
    for block in blocks:
        assert not isinstance(backbone.get_submodule(block), nn.Sequential | nn.ModuleList), block


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_gradient_reaches_every_prompt_and_nothing_frozen(library, family):
    for stages in (None, 'blocks'):
        tuned = build_protuned(library, family, stages=stages).train()
        sum(output.square().mean() for output in flat(tuned(image()))).backward()
        tuned_names = protune_mm.tuned_parameters(tuned)
        for name, parameter in tuned.named_parameters():
            assert (parameter.grad is not None) == (name in tuned_names), name


@pytest.mark.parametrize('config', FULL_SIZE, ids=lambda c: '-'.join(map(str, c.values()))[:48])
def test_prompts_stay_under_8_percent(config):
    base = dict(config)
    tuned = MODELS.build(dict(base, type='protune_mm.ProTuned', base=base['type']))
    new = sum(p.numel() for p in protune_mm.tuned_parameters(tuned).values())
    old = sum(p.numel() for p in tuned.parameters()) - new
    assert 0 < new / old < 0.08


def test_stages_beyond_what_a_neck_reads_get_no_prompt():
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, out_indices=(0, 1))
    )
    assert [name.split('.')[0] for name in prompts(tuned)] == ['layer1', 'layer2']


def test_mobilenet_stages_end_where_resolution_changes_or_a_neck_reads():
    def names(kind, **more):
        tuned = MODELS.build(dict(type='protune_mm.ProTuned', base=kind, **more))
        return [name.split('.')[0] for name in prompts(tuned)]

    assert names('mmpretrain.MobileNetV2') == ['layer2', 'layer3', 'layer5', 'layer7']
    assert names('mmdet.MobileNetV2', out_indices=(0, 2, 3)) == [
        'layer1', 'layer2', 'layer3', 'layer4',
    ]  # fmt: skip
    dilated = dict(strides=(1, 2, 2, 1, 1, 1, 1), dilations=(1, 1, 1, 2, 2, 4, 4))
    assert names('mmseg.MobileNetV2', out_indices=(1, 2, 4, 6), **dilated) == [
        'layer2', 'layer3', 'layer5', 'layer7',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('out_indices', 'expected'),
    [(-1, [2, 5, 8, 11]), ([8], [1, 3, 6, 8]), ([3, 11], [3, 11]), ((2, 5, 8, 11), [2, 5, 8, 11])],
)
def test_plain_vit_stages_end_at_out_indices_else_at_an_even_split(out_indices, expected):
    tuned = MODELS.build(
        dict(
            type='protune_mm.ProTuned',
            base='mmpretrain.VisionTransformer',
            arch=dict(embed_dims=16, num_layers=12, num_heads=2, feedforward_channels=16),
            out_indices=out_indices,
        )
    )
    assert [int(name.split('.')[1]) for name in prompts(tuned)] == expected


def test_a_subclass_is_found_through_its_parent_and_a_namesake_is_not():
    from mmdet.models.backbones import ResNet

    class Mine(ResNet):
        pass

    class ResNeXt(nn.Module):
        pass

    assert find_family(Mine).name == 'ResNet'
    assert find_family(ResNeXt) is None
    assert find_family(type(protune_mm.protune(Mine(18)))).name == 'ResNet'


def test_a_users_own_backbone_names_its_stages():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(True))
            self.body = nn.Conv2d(8, 24, 3, 2, 1)

        def forward(self, x):
            return self.body(self.stem(x))

    tuned = protune_mm.protune(Mine(), stages=['stem', 'body'])
    assert list(prompts(tuned)) == ['stem.2.prompt', 'body.prompt']
    assert [p.down.in_channels for p in prompts(tuned).values()] == [8, 24]
    assert list(backbones(tuned)) == ['']
    assert all(not m._forward_hooks for m in tuned.modules()), 'the probe leaves no hook'
    tuned(image()).mean().backward()
    assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())


def test_every_family_of_the_table_has_an_example_in_a_library():
    for family in FAMILIES:
        assert family.examples, family.name


@pytest.mark.parametrize(
    'config',
    [
        dict(base='mmdet.ResNet', depth=18, out_indices=(0, 1), stages=['layer1', 'layer4']),
        dict(
            base='mmpretrain.VisionTransformer',
            arch='deit-tiny',
            out_indices=[5],
            stages=['layers.11'],
        ),
    ],
)
def test_a_stage_that_reaches_no_output_is_refused(config):
    with pytest.raises(ValueError, match=r'is none whose output reaches what the backbone'):
        MODELS.build(dict(type='protune_mm.ProTuned', **config))


def test_a_users_own_token_backbone_takes_its_grid_from_patch_embed():
    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Conv2d(3, 16, 16, 16)

        def forward(self, x):
            x = self.proj(x)
            return x.flatten(2).transpose(1, 2), x.shape[2:]

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch_embed = Embed()
            self.blocks = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))

        def forward(self, x):
            return self.blocks(self.patch_embed(x)[0])

    tuned = protune_mm.protune(Mine(), stages=['blocks.0', 'blocks.1'])
    tuned(image()).mean().backward()
    assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())


def test_prompts_take_the_dtype_of_their_block():
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18)).to(torch.bfloat16)
    tuned = protune_mm.protune(stock)
    assert flat(tuned(image().to(torch.bfloat16)))[0].dtype == torch.bfloat16


def test_series_without_a_last_block_says_so(log):
    MODELS.build(
        dict(
            type='protune_mm.ProTuned',
            base='mmdet.ResNet',
            depth=18,
            stages=['layer1'],
            prompt='paper',
        )
    )
    assert "prompt.last='series' has no effect" in log.text


class OwnBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()

    def forward(self, x):
        return x + self.relu(self.norm(self.conv(x)))


class OwnNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.layer1 = nn.Sequential(OwnBlock(8), OwnBlock(8))
        self.layer2 = nn.Sequential(OwnBlock(8), OwnBlock(8))

    def forward(self, x):
        first = self.layer1(self.stem(x))
        return first, self.layer2(first)


class OwnChild(OwnNet):
    pass


@pytest.fixture
def own_row(monkeypatch):
    from protune_mm import stages
    from protune_mm.features import Maps
    from protune_mm.stages import Family, Stage, add_family

    monkeypatch.setattr(stages, '_own', {})
    names = ('layer1', 'layer2')
    row = Family(
        'OwnNet',
        split=lambda net: [Stage(name, (f'{name}.0', f'{name}.1')) for name in names],
        layout=Maps(),
    )
    add_family(OwnNet, row)
    with pytest.raises(TypeError, match='give the class of the backbone'):
        add_family('OwnNet', row)


@pytest.mark.parametrize(
    ('options', 'count'),
    [
        (dict(), 2),
        (dict(stages='blocks'), 4),
        (dict(stages='inside', prompt='principal'), 4),
        (dict(prompt=dict(type='LoRA', rank=2)), 4),
        (dict(policy='last-1'), 0),
    ],
)
@pytest.mark.parametrize('kind', [OwnNet, OwnChild])
def test_a_class_of_ones_own_has_a_row_of_ones_own(own_row, kind, options, count):
    tuned = protune_mm.protune(kind(), **options).train()
    assert len(prompts(tuned)) == count
    sum(output.square().mean() for output in flat(tuned(image()))).backward()
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None for p in trained.values())
