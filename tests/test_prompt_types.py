"""Every prompt type keeps the same contract in every kind of backbone."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn import functional as F

import protune_mm
from protune_mm.checkpoints import tuned_state_dict
from protune_mm.prompts import Adapter, ConvAdapter, LoRA, LoRand, Mona
from protune_mm.registry import PROMPTS
from protune_mm.tuned import frozen_tensors, prompts
from tests.conftest import (
    EVERY,
    EXAMPLES,
    build_protuned,
    build_stock,
    flat,
    image,
    move_prompts,
    pair,
)

PROMPTS.import_from_location()
TYPES = sorted(PROMPTS.module_dict)
types = pytest.mark.parametrize('kind', TYPES)
examples = pytest.mark.parametrize(('library', 'family'), EXAMPLES)


def small_options(kind):
    """Options that fit the small examples."""
    small = dict(Adapter=dict(hidden=32), LoRA=dict(rank=2), Mona=dict(hidden=4))
    small.update(LoRand=dict(rank=2), ProTuningBlock=dict(ratio=8))
    return small.get(kind, {})


def prompt_config(kind):
    return dict(type=kind, **small_options(kind))


@pytest.mark.parametrize(
    ('block', 'bounds'),
    [
        (Adapter(384, authors_init=True), dict(down=384**-0.5)),
        (
            Mona(96, hidden=40, authors_init=True),
            {'down': 96**-0.5, 'filters.0': 1 / 3, 'filters.2': 1 / 7, 'mix': 40**-0.5},
        ),
    ],
)
def test_rivals_can_start_as_their_authors_code_does(block, bounds):
    """Uniform within one over the root of the inputs, as torch's layers do without being asked."""
    for name, bound in bounds.items():
        weight = block.get_submodule(name).weight
        assert 0.8 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert not block(torch.randn(1, block.down.in_channels, 4, 4)).any()


def test_all_types_are_tried():
    assert set(TYPES) >= {
        'Adapter',
        'ConvAdapter',
        'LoRA',
        'LoRand',
        'Mona',
        'ProTuningBlock',
        'ScaleShift',
    }


@types
@pytest.mark.parametrize('shape', [(16, 8, 12), (24, 1, 1), (8, 3, 2)])
def test_keeps_the_shape_and_starts_at_zero(kind, shape):
    channels, height, width = shape
    block = PROMPTS.get(kind)(channels, **small_options(kind))
    x = torch.randn(2, channels, height, width)
    assert block(x).shape == x.shape
    assert not block(x).any()
    start = copy.deepcopy(block.state_dict())
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    assert block(x).any()
    block.init_weights()
    assert not block(x).any()
    assert set(start) == set(block.state_dict())
    other = PROMPTS.get(kind)(channels, zero_init=False)
    assert other(x).any()


@types
@examples
def test_contract(library, family, kind):
    stock, tuned = pair(library, family, prompt=prompt_config(kind), lean=False)
    x = image()
    with torch.no_grad():
        for a, b in zip(flat(stock(x)), flat(tuned(x)), strict=True):
            assert torch.equal(a, b)
    added = set(tuned.state_dict()) - set(stock.state_dict())
    assert added == set(protune_mm.tuned_parameters(tuned))
    assert all('.prompt.' in name for name in added)
    assert len(prompts(tuned)) >= 2
    lean = pair(library, family, prompt=prompt_config(kind), lean=True)[1]
    grads = []
    for backbone in (tuned, lean):
        move_prompts(backbone)
        before = {n: t.clone() for n, t in frozen_tensors(backbone)}
        outs = flat(backbone.train()(x))
        sum(o.square().mean() for o in outs).backward()
        own = protune_mm.tuned_parameters(backbone)
        for name, parameter in backbone.named_parameters():
            assert (parameter.grad is not None) == (name in own), name
        reached = [name for name, parameter in own.items() if parameter.grad.any()]
        assert len(reached) == len(own), set(own) - set(reached)
        torch.optim.SGD(own.values(), 0.1).step()
        assert all(torch.equal(t, before[n]) for n, t in frozen_tensors(backbone))
        grads.append([*outs, *(p.grad for p in own.values())])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-3 * a.abs().max() + 1e-7  # float32, lean


@types
def test_survives_deepcopy_and_loads_its_own_file(kind):
    library, family = EXAMPLES[-1].values
    tuned = pair(library, family, prompt=prompt_config(kind))[1]
    move_prompts(tuned)
    x = image()
    other = copy.deepcopy(tuned)
    fresh = pair(library, family, prompt=prompt_config(kind))[1]
    assert not fresh.load_state_dict(tuned.state_dict()).missing_keys
    with torch.no_grad():
        for a, b, c in zip(*(flat(m(x)) for m in (tuned, other, fresh)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


def test_formulas():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)

    def made(cls, **more):
        block = cls(8, zero_init=False, **more).double()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        return block

    def close(block, expected):
        torch.testing.assert_close(block(x), expected)  # float64

    a = made(Adapter, hidden=4)
    hidden = F.relu(torch.einsum('oi,bihw->bohw', a.down.weight[..., 0, 0], x)
                    + a.down.bias[:, None, None])  # fmt: skip
    close(a, 0.1 * (torch.einsum('oi,bihw->bohw', a.up.weight[..., 0, 0], hidden)
                    + a.up.bias[:, None, None]))  # fmt: skip
    c = made(ConvAdapter, ratio=4)
    hidden = F.relu(F.conv2d(x, c.down.weight, c.down.bias, padding=1, groups=2))
    close(c, F.conv2d(hidden, c.up.weight, c.up.bias) * c.alpha)
    lora = made(LoRA, rank=3, alpha=6)
    weight = lora.up.weight[..., 0, 0] @ lora.down.weight[..., 0, 0]
    close(lora, 2 * torch.einsum('oi,bihw->bohw', weight, x))
    m = made(Mona, hidden=4)
    norm = F.layer_norm(x.permute(0, 2, 3, 1), (8,), m.norm.weight, m.norm.bias)
    down = m.down(norm.permute(0, 3, 1, 2) * m.norm_scale + m.scale * x)
    down = down + (m.filters[0](down) + m.filters[1](down) + m.filters[2](down)) / 3
    close(m, m.up(F.gelu(down + m.mix(down))))
    assert [f.kernel_size for f in m.filters] == [(3, 3), (5, 5), (7, 7)]
    r = made(LoRand, rank=3)
    w = sum(r.down_in[i] @ r.kernel[i] @ r.down_out[i] for i in range(2))
    v = sum(r.up_in[i] @ r.kernel[i] @ r.up_out[i] for i in range(2))
    rows = F.gelu(x.permute(0, 2, 3, 1) @ w + r.down_bias) @ v + r.up_bias
    close(r, rows.permute(0, 3, 1, 2))


@examples
@pytest.mark.parametrize('lean', [False, True])
@pytest.mark.parametrize('kind', ['LoRA', 'ScaleShift'])
def test_merges_into_the_stock_weights(library, family, lean, kind):
    stock, tuned = pair(library, family, prompt=prompt_config(kind), lean=lean)
    move_prompts(tuned)
    x = image()
    with torch.no_grad():
        expected = flat(tuned(x))
        assert protune_mm.merge(tuned) is tuned
        got = flat(tuned(x))
    for a, b in zip(expected, got, strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32
    assert set(tuned.state_dict()) == set(stock.state_dict())
    stock.load_state_dict(tuned.state_dict())
    with torch.no_grad():
        for a, b in zip(flat(stock(x)), got, strict=True):
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


def merged_is_the_same(tuned, *sizes):
    move_prompts(tuned)
    images = [image(1, size, size) for size in sizes]
    with torch.no_grad():
        expected = [flat(tuned(x)) for x in images]
        protune_mm.merge(tuned)
        for x, outs in zip(images, expected, strict=True):
            for a, b in zip(outs, flat(tuned(x)), strict=True):
                assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


def lora_resnet(**more):
    return MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, prompt=dict(type='LoRA'),
             **more)
    ).eval()  # fmt: skip


LORA_BASES = (
    dict(base='mmdet.ResNet', depth=18),
    dict(base='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=(64, 96)),
)


@pytest.mark.parametrize('base', LORA_BASES)
def test_weights_of_low_precision_keep_a_small_change(base):
    config = dict(type='protune_mm.ProTuned', prompt=dict(type='LoRA'), **base)
    tuned = MODELS.build({**config, 'lean': dict(dtype='bfloat16')}).eval()
    stock = [out.detach() for out in flat(tuned(image()))]
    for prompt in prompts(tuned).values():
        nn.init.normal_(prompt.up.weight, std=1e-4)
    expected = flat(tuned(image()))
    protune_mm.merge(tuned)
    for a, b, c in zip(expected, flat(tuned(image())), stock, strict=True):
        # Of the change alone, which bfloat16 rounds away.
        assert (a - b).abs().max() <= 1e-2 * (a - c).abs().max()
    other = MODELS.build({**config, 'policy': 'head-only'}).eval()
    other.load_state_dict(tuned_state_dict(tuned))
    for a, b in zip(flat(other(image())), flat(tuned(image())), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


def test_what_is_merged_is_of_another_base():
    tuned = lora_resnet()
    move_prompts(tuned)
    protune_mm.merge(tuned)
    state = tuned_state_dict(tuned)
    assert torch.equal(state['layer1.0.conv1.weight'], tuned.layer1[0].conv1.weight)
    other = lora_resnet(policy='head-only')
    other.load_state_dict(state)
    for a, b in zip(flat(tuned(image())), flat(other(image())), strict=True):
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32
    with pytest.raises(ValueError, match='Pro-tuned already'):
        protune_mm.protune(tuned, prompt=dict(type='LoRA'))


def test_several_sets_are_not_merged():
    tuned = lora_resnet()
    protune_mm.PromptSets(tuned)
    with pytest.raises(ValueError, match='ResNet has PromptSets'):
        protune_mm.merge(tuned)
    tuned(image())


def test_maps_as_wide_as_they_have_channels_merge_too():
    """Behind the stem of ConvNeXt with images of 96 pixels: which axis is it?"""
    arch = dict(depths=[1, 1, 1, 1], channels=[24, 32, 48, 64])
    for more in (dict(), dict(linear_pw_conv=False)):
        tuned = MODELS.build(
            dict(type='protune_mm.ProTuned', base='mmpretrain.ConvNeXt', arch=arch,
                 gap_before_final_norm=False, out_indices=(0, 3), prompt=dict(type='ScaleShift'),
                 **more)
        ).eval()  # fmt: skip
        merged_is_the_same(tuned, 64, 96)


@pytest.mark.parametrize('mode', ['reflect', 'circular'])
def test_lora_pads_as_its_layer(mode):
    conv = dict(type='Conv2d', padding_mode=mode)
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, conv_cfg=conv,
             prompt=dict(type='LoRA'))
    ).eval()  # fmt: skip
    merged_is_the_same(tuned, 64)


def test_layers_that_compute_their_weight_are_left_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(
                nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
                nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)),
                nn.Conv2d(4, 4, 3),
            )

    assert LoRA.layers(Net()) == ['block.2']


def test_a_checkpointed_transformer_knows_no_grid_in_backward():
    config = dict(type='protune_mm.ProTuned', base='mmseg.MixVisionTransformer', with_cp=True,
                  embed_dims=8, num_heads=[1, 1, 2, 2])  # fmt: skip
    with pytest.raises(ValueError, match='with_cp=True, which computes blocks again in backward'):
        MODELS.build(dict(config, prompt=dict(type='Adapter')))


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('kind', ['LoRA', 'Adapter', 'ProTuningBlock'])
def test_images_of_other_than_three_channels(kind, channels):
    config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, in_channels=channels)
    tuned = MODELS.build(dict(config, prompt=prompt_config(kind)))
    sum(o.mean() for o in tuned(torch.randn(2, channels, 32, 32))).backward()
    assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        # Maps inside blocks that take tokens; blocks without padding, which make 17 pixels of 35.
        (dict(base='mmseg.MSCAN', embed_dims=[8, 16, 24, 32], depths=[1] * 4), 64),
        (dict(base='mmpretrain.InceptionV3', aux_logits=False), 299),
    ],
)
def test_adapters_where_blocks_are_special(config, size):
    tuned = MODELS.build(dict(config, type='protune_mm.ProTuned', prompt=dict(type='Adapter')))
    outs = flat(tuned.eval()(image(1, size, size)))
    sum(o.square().mean() for o in outs).backward()
    assert all(p.up.weight.grad is not None for p in prompts(tuned).values())


def test_what_is_no_change_of_weights_is_not_merged():
    library, family = EXAMPLES[0].values
    tuned = pair(library, family)[1]
    keys = list(tuned.state_dict())
    with pytest.raises(ValueError, match='ProTuningBlock cannot be merged: it is no change'):
        protune_mm.merge(tuned)
    assert list(tuned.state_dict()) == keys


def test_places():
    library, family = EXAMPLES[-1].values  # mmpretrain's VisionTransformer
    assert (library, family.name) == ('mmpretrain', 'VisionTransformer')
    at = {k: list(prompts(pair(library, family, prompt=prompt_config(k))[1])) for k in TYPES}
    assert all(name.endswith('.ffn.prompt') for name in at['Adapter'])
    assert len(at['Mona']) == len(at['LoRand']) == len(at['Adapter'])
    only = pair(library, family, prompt=dict(type='LoRA', layers=('qkv',)))[1]
    assert all(name.endswith('.qkv.prompt') for name in prompts(only))
    with pytest.raises(ValueError, match=r"prompt.last='series': prompt.type='LoRA' runs"):
        pair(library, family, prompt=dict(type='LoRA', last='series'))
    with pytest.raises(ValueError, match=r"'nothing': there are qkv, proj, 0, 1$"):
        pair(library, family, prompt=dict(type='LoRA', layers=('nothing',)))


def test_lora_says_that_it_passes_multihead_attention_by(log):
    from mmseg.models.backbones import VisionTransformer

    stock = VisionTransformer(
        img_size=32, embed_dims=32, num_layers=2, num_heads=2, out_indices=(0, 1)
    )
    tuned = protune_mm.protune(stock, prompt=dict(type='LoRA', rank=2))
    assert 'LoRA: TransformerEncoderLayer has nn.MultiheadAttention' in log.text
    assert prompts(tuned)
    assert not any('attn' in name for name in prompts(tuned))


@examples
def test_affine_adds_scales_and_shifts_to_the_prompts(library, family):
    stock, tuned = pair(library, family, affine=True)
    kinds = {type(prompt).__name__ for prompt in prompts(tuned).values()}
    assert kinds == {'ProTuningBlock', 'ScaleShift'}
    x = image()
    with torch.no_grad():
        for a, b in zip(flat(stock(x)), flat(tuned(x)), strict=True):
            assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32, lean
    plain = pair(library, family)[1]
    more = set(protune_mm.tuned_parameters(tuned)) - set(protune_mm.tuned_parameters(plain))
    assert more
    assert all(name.endswith(('.prompt.scale', '.prompt.shift')) for name in more)
    sum(o.square().mean() for o in flat(tuned.train()(x))).backward()
    assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())


NO_LAYER = [
    (library, name, 'LoRA')
    for library, name in (('mmdet', 'SSDVGG'), ('mmpretrain', 'ConvMixer'), ('mmseg', 'CGNet'))
]
"""Their blocks are the norms and activations at the end of their stages."""


@pytest.mark.parametrize('kind', ['ConvAdapter', 'LoRA'])
@pytest.mark.parametrize(('library', 'family'), EVERY)
def test_beside_the_layers_of_every_backbone(library, family, kind):
    """They have the stride, padding and kernel of the layer beside which they run."""
    with DefaultScope.overwrite_default_scope(library):
        stock = build_stock(library, family)
        try:
            expected = flat(stock(image()))
        except (RuntimeError, AssertionError, AttributeError):
            pytest.skip('it takes images of one size only')
        if (library, family.name, kind) in NO_LAYER:
            with pytest.raises(ValueError, match='finds no layer'):
                protune_mm.protune(stock, prompt=prompt_config(kind))
            return
        tuned = protune_mm.protune(stock, prompt=prompt_config(kind), lean=False).eval()
    assert prompts(tuned)
    for name, prompt in prompts(tuned).items():
        layer = tuned.get_submodule(name.removesuffix('.prompt').removesuffix('prompt'))
        if isinstance(layer, nn.Conv2d):
            for key in ('kernel_size', 'stride', 'padding', 'dilation'):
                assert getattr(prompt.down, key) == getattr(layer, key), (name, key)
            x = torch.randn(1, layer.in_channels, 19, 26)
            assert prompt(x).shape == layer(x).shape
    for a, b in zip(expected, flat(tuned(image())), strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # float32


def test_affine_beside_checkpointed_blocks():
    """What is computed again in backward has no gradients of its own to look at."""
    library, family = EXAMPLES[0].values
    with DefaultScope.overwrite_default_scope(library):
        plain, again = (
            build_protuned(library, family, affine=True, with_cp=with_cp)
            for with_cp in (False, True)
        )
    assert set(prompts(again)) == set(prompts(plain))
    assert any(getattr(module, 'with_cp', False) for module in again.modules())


def test_affine_leaves_out_norms_that_the_neck_does_not_see():
    """The last convolution of MobileNetV2, where the outputs are those of its stages."""
    library, family = next(p.values for p in EXAMPLES if p.id == 'mmpretrain-MobileNetV2')
    with DefaultScope.overwrite_default_scope(library):
        tuned = build_protuned(library, family, affine=True, out_indices=(1, 2, 4, 6)).train()
    sum(o.square().mean() for o in flat(tuned(image()))).backward()
    own = protune_mm.tuned_parameters(tuned)
    assert 'conv1.bn.prompt.scale' in own
    assert not [name for name, parameter in own.items() if parameter.grad is None]


NO_NORM = ('LeNet5', 'VGG', 'SSDVGG', 'AlexNet', 'HorNet')
"""Families whose examples have no norm, or none but of a class of their own."""


@pytest.mark.parametrize(('library', 'family'), EVERY)
def test_affine_fits_every_backbone(library, family):
    with DefaultScope.overwrite_default_scope(library):
        if family.name in NO_NORM:
            with pytest.raises(ValueError, match='finds no norm'):
                build_protuned(library, family, affine=True)
            return
        tuned = build_protuned(library, family, affine=True, lean=False).train()
    own = {n: p for n, p in prompts(tuned).items() if type(p).__name__ == 'ScaleShift'}
    assert own
    for name, prompt in own.items():
        norm = tuned.get_submodule(name.removesuffix('.prompt'))
        assert prompt.scale.numel() == norm.weight.numel()
    try:
        with DefaultScope.overwrite_default_scope(library):
            build_stock(library, family)(image())
    except (RuntimeError, AssertionError, AttributeError):
        return  # It takes images of one size only.
    sum(o.square().mean() for o in flat(tuned(image()))).backward()
    assert not [name for name, prompt in own.items() if prompt.shift.grad is None]


@pytest.mark.parametrize(
    ('prompt', 'message'),
    [
        (dict(type='LoRA', rank=0), 'rank=0 is no number of channels: use 1 or more'),
        (dict(type='LoRA', rank=2.5), 'rank=2.5 is no number of channels'),
        (dict(type='Adapter', hidden=0), 'hidden=0 is no number of channels'),
        (dict(type='Mona', hidden=-1), 'hidden=-1 is no number of channels'),
        (dict(type='ConvAdapter', ratio=0), 'ratio=0 leaves no channel: use a number above 0'),
        (dict(type='LoRand', rank=0), 'rank=0 is no number of channels'),
        (dict(type='LoRand', branches=0), 'branches=0 is no number of products'),
    ],
)
def test_sizes_that_are_none(prompt, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, prompt=prompt))


def test_one_name_of_layers_is_no_part_of_names():
    block = nn.Sequential()
    block.fc1, block.block = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert LoRA.layers(block, layers='fc1') == LoRA.layers(block, layers=('fc1',)) == ['fc1']


@pytest.mark.parametrize('layers', ['conv9', ('conv1', 'conv9')])
def test_a_name_that_no_layer_has_is_an_error(layers):
    """It would train another method than its user asked for."""
    prompt = dict(type='LoRA', layers=layers)
    with pytest.raises(ValueError, match=r"prompt.layers: .* ResNet .*'conv9': there are conv1, "):
        MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, prompt=prompt))
    # Some blocks have a shortcut with a convolution, others none.
    MODELS.build(
        dict(
            type='protune_mm.ProTuned',
            base='mmdet.ResNet',
            depth=50,
            prompt=dict(type='LoRA', layers=('conv3', '0')),
        )
    )
