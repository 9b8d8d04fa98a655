"""The other tuning policies train exactly what their names say, and nothing else moves."""

import pytest
import torch
from torch import nn

import protune_mm
from protune_mm.tuned import frozen_tensors
from tests.conftest import EXAMPLES, build_protuned, build_stock, flat, image

POLICIES = ('bias', 'norm', 'last-1', 'last-2')
examples = pytest.mark.parametrize(('library', 'family'), EXAMPLES)


def expected_names(policy, stock, family):
    if policy == 'bias':
        return {n for n, _ in stock.named_parameters() if n.endswith(('.bias', '_bias'))}
    if policy == 'norm':
        kinds = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
        norms = [
            name
            for name, module in stock.named_modules()
            if isinstance(module, kinds) or type(module).__name__ == 'HorNetLayerNorm'
        ]
        return {n for n, _ in stock.named_parameters() if n.rpartition('.')[0] in norms}
    blocks = [block for stage in family.split(stock) for block in stage.blocks]
    last = blocks[-int(policy[-1]) :]
    return {
        name for name, _ in stock.named_parameters() if any(name.startswith(f'{b}.') for b in last)
    }


@examples
@pytest.mark.parametrize('policy', POLICIES)
def test_what_trains_is_what_the_policy_says(library, family, policy):
    torch.manual_seed(0)
    stock = build_stock(library, family)
    tuned = build_protuned(library, family, policy=policy)
    tuned.load_state_dict(stock.state_dict())
    with torch.no_grad():
        for a, b in zip(flat(stock(image())), flat(tuned(image())), strict=True):
            assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # float32
    expected = expected_names(policy, stock, family)
    assert expected
    assert set(protune_mm.tuned_parameters(tuned)) == expected
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == expected
    tuned.train()
    assert {n for n, p in tuned.named_parameters() if p.requires_grad} == expected
    start = {n: t.clone() for n, t in tuned.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    sum(o.square().mean() for o in flat(tuned(image()))).backward()
    optimizer.step()
    frozen = dict(frozen_tensors(tuned))
    moved = {n for n, t in tuned.state_dict().items() if not torch.equal(t, start[n])}
    assert moved
    assert not moved & set(frozen)
    assert not set(frozen) & expected
    if policy in ('bias', 'norm'):
        assert moved <= expected
        assert not any(m.training for m in tuned.modules())


def test_last_blocks_run_as_in_fine_tuning():
    from mmengine.registry import MODELS

    config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, policy='last-1')
    tuned = MODELS.build(dict(config, norm_eval=False)).train()
    assert tuned.layer4[1].bn1.training
    assert not tuned.layer4[0].bn1.training
    before = tuned.layer4[1].bn1.running_mean.clone()
    tuned(image())
    assert not torch.equal(tuned.layer4[1].bn1.running_mean, before)
    keeping = MODELS.build(dict(config, norm_eval=True)).train()
    assert keeping.layer4[1].training
    assert not keeping.layer4[1].bn1.training
    tuned.eval()
    assert not tuned.layer4[1].bn1.training
    with pytest.raises(ValueError, match="policy='last-9': ResNet has 8 blocks"):
        MODELS.build(dict(config, policy='last-9'))


def tuned_names(base, policy, **options):
    from mmengine.registry import MODELS

    config = dict(type='protune_mm.ProTuned', base=base, policy=policy, **options)
    return set(protune_mm.tuned_parameters(MODELS.build(config)))


@pytest.mark.parametrize(
    ('base', 'options', 'there', 'absent'),
    [
        (
            'mmseg.VisionTransformer',
            dict(img_size=(64, 64), embed_dims=32, num_layers=2, num_heads=2, out_indices=[1]),
            {f'layers.1.{key}' for key in ('ln1.bias', 'attn.attn.in_proj_bias')},
            set(),
        ),
        (
            'mmseg.BEiT',
            dict(img_size=(64, 64), embed_dims=32, num_layers=2, num_heads=2, out_indices=[1]),
            {f'layers.0.attn.{key}' for key in ('q_bias', 'v_bias', 'proj.bias')},
            {'layers.0.attn.relative_position_bias_table'},
        ),
    ],
)
def test_biases_of_queries_keys_and_values_train(base, options, there, absent):
    found = tuned_names(base, 'bias', **options)
    assert there <= found
    assert not absent & found


def test_norms_of_a_networks_own_train():
    found = tuned_names('mmpretrain.HorNet', 'norm', arch='tiny')
    assert {'norm3.weight', 'norm3.bias', 'stages.0.0.norm1.weight'} <= found
    assert not any('dwconv' in name or 'pwconv' in name for name in found)


def test_a_policy_that_finds_nothing_is_refused():
    with pytest.raises(ValueError, match="policy='norm': VGG has no parameters of a norm"):
        tuned_names('mmpretrain.VGG', 'norm', depth=11)
