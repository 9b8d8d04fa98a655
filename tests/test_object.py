"""A Pro-tuned backbone is the stock object: it copies, pickles, loads and averages like one."""

import copy
import io
import pickle

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.frozen import ProTunedBackbone
from protune_mm.subclass import stock_type
from protune_mm.tuned import frozen_tensors, is_frozen_backbone, prompts
from tests.conftest import EXAMPLES, build_protuned, flat, image, move_prompts, pair


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
@pytest.mark.parametrize(
    'clone',
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: ExponentialMovingAverage(m).module,
    ],
    ids=['deepcopy', 'pickle', 'ema'],
)
def test_a_copy_computes_the_same_and_is_independent(library, family, clone):
    tuned = build_protuned(library, family)
    move_prompts(tuned)
    other = clone(tuned)
    x = image()
    with torch.no_grad():
        expected = flat(tuned(x))
        for a, b in zip(expected, flat(other(x)), strict=True):
            assert torch.equal(a, b)
        for prompt in prompts(other).values():
            prompt.up.weight.zero_()
        for a, b in zip(expected, flat(tuned(x)), strict=True):
            assert torch.equal(a, b), 'the copy shares memory with the original'
    assert isinstance(other, ProTunedBackbone)
    names = [name for name, _ in frozen_tensors(tuned)]
    assert is_frozen_backbone(other)
    assert names
    assert names == [name for name, _ in frozen_tensors(other)]
    other.train()
    assert set(protune_mm.tuned_parameters(other)) == set(protune_mm.tuned_parameters(tuned))
    assert other._protune is not tuned._protune


def test_class_and_names_are_stock():
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
    from mmdet.models.backbones import ResNet
    from mmdet.models.backbones.resnet import BasicBlock

    assert stock_type(tuned) is ResNet
    assert stock_type(tuned.layer1[1]) is BasicBlock
    assert type(tuned).__name__ == 'ResNet'
    assert type(tuned.layer1[0]) is BasicBlock
    assert isinstance(tuned.layer1[1], BasicBlock)
    other = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
    assert type(other) is type(tuned), 'the subclass is cached'


def test_an_old_swin_checkpoint_is_converted_as_in_stock():
    """mmpretrain's Swin converts only if `self.__class__ is SwinTransformer`."""
    config = dict(arch=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 4]))
    stock = MODELS.build(dict(type='mmpretrain.SwinTransformer', **config))
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmpretrain.SwinTransformer', **config)
    )
    nn.init.constant_(stock.norm3.weight, 3.0)
    old = {k.replace('norm3.', 'norm.'): v for k, v in stock.state_dict().items()}
    cls = type(tuned)
    tuned.load_state_dict(dict(old))
    assert torch.equal(tuned.norm3.weight, stock.norm3.weight)
    assert type(tuned) is cls


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_a_saved_state_returns(library, family):
    _, tuned = pair(library, family)
    move_prompts(tuned)
    file = io.BytesIO()
    torch.save(tuned.state_dict(), file)
    file.seek(0)
    other = build_protuned(library, family)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = image()
    for a, b in zip(flat(tuned(x)), flat(other(x)), strict=True):
        assert torch.equal(a, b)


def test_missing_part_of_the_prompts_is_an_error():
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
    state = tuned.state_dict()
    state.pop('layer1.1.prompt.up.bias')
    with pytest.raises(RuntimeError, match=r'layer1\.1\.prompt\.up\.bias'):
        tuned.load_state_dict(state)
