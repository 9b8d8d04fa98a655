"""The optimizer holds what trains and no more; stock rules never reach prompts."""

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.optim import wrap_constructor

OURS = 'protune_mm.ProTuneOptimWrapperConstructor'


class Model(BaseModel):
    def __init__(self, backbone, head=True):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        if head:
            self.neck = nn.Sequential(nn.Conv2d(512, 8, 1), nn.BatchNorm2d(8))
            self.head = nn.Linear(8, 2)

    def forward(self, inputs):
        return self.head(self.neck(self.backbone(inputs)[-1]).mean((2, 3)))

    def get_layer_depth(self, name):
        return self.backbone.get_layer_depth(name, 'backbone.')


def resnet(**more):
    return dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, **more)


def groups(model, config):
    """Name of each optimized parameter to its group."""
    names = {id(p): name for name, p in model.named_parameters()}
    wrapper = build_optim_wrapper(model, wrap_constructor(config))
    return {
        names[id(p)]: group for group in wrapper.optimizer.param_groups for p in group['params']
    }


SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-2)
RULES = {
    'none': None,
    'multiplier': dict(custom_keys=dict(backbone=dict(lr_mult=0.1, decay_mult=0.5))),
    'norm_and_bias': dict(norm_decay_mult=0.0, bias_lr_mult=2.0, bypass_duplicate=True),
}


@pytest.mark.parametrize('rules', RULES)
def test_holds_exactly_what_trains(rules, log):
    model = Model(resnet())
    found = groups(model, dict(optimizer=SGD, paramwise_cfg=RULES[rules]))
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert 'is skipped since its requires_grad' not in log.text, 'no line per frozen parameter'
    assert all(p.numel() for p in model.parameters()), 'the model is whole again'


@pytest.mark.parametrize('kind', ['ConvAdapter', 'Mona', 'LoRand'])
def test_scales_of_channels_do_not_decay(kind):
    model = Model(resnet(prompt=dict(type=kind)))
    found = groups(model, dict(optimizer=SGD))
    for name, parameter in protune_mm.tuned_parameters(model).items():
        last = name.rpartition('.')[2]
        scale = last in ('alpha', 'scale', 'norm_scale') or parameter.ndim == 1
        assert found[name]['weight_decay'] == (0.0 if scale else 1e-2), name


@pytest.mark.parametrize('rules', RULES)
def test_prompts_have_the_base_rate_and_decay_on_weights_only(rules):
    model = Model(resnet(prompt=dict(norm_cfg=dict(type='BN'), learnable_scale=True)))
    found = groups(model, dict(optimizer=SGD, paramwise_cfg=RULES[rules]))
    for name, parameter in protune_mm.tuned_parameters(model).items():
        assert found[name]['lr'] == 0.1, name
        assert found[name]['weight_decay'] == (1e-2 if parameter.ndim > 1 else 0.0), name
        assert found[name]['momentum'] == 0.9, name


def test_prompt_multipliers():
    model = Model(resnet())
    rules = dict(prompt_lr_mult=3.0, prompt_decay_mult=0.5)
    found = groups(model, dict(optimizer=SGD, paramwise_cfg=rules))
    weight = found['backbone.layer1.1.prompt.up.weight']
    assert (weight['lr'], weight['weight_decay']) == (pytest.approx(0.3), 5e-3)
    assert found['backbone.layer1.1.prompt.up.bias']['lr'] == pytest.approx(0.3)
    assert found['head.weight']['lr'] == 0.1


def test_prompt_multipliers_of_the_defaults_of_the_optimizer():
    model = Model(resnet())
    rules = dict(prompt_lr_mult=3.0, prompt_decay_mult=0.0)
    found = groups(model, dict(optimizer=dict(type='AdamW'), paramwise_cfg=rules))
    weight = found['backbone.layer1.1.prompt.up.weight']
    assert (weight['lr'], weight['weight_decay']) == (pytest.approx(3e-3), 0.0)
    assert (found['head.weight']['lr'], found['head.weight']['weight_decay']) == (1e-3, 1e-2)


def test_the_stock_rules_still_reach_neck_and_head():
    model = Model(resnet())
    rules = dict(custom_keys=dict(neck=dict(lr_mult=0.5)), norm_decay_mult=0.0)
    found = groups(model, dict(optimizer=SGD, paramwise_cfg=rules))
    assert found['neck.0.weight']['lr'] == 0.05
    assert found['head.weight']['lr'] == 0.1


LAYER_DECAY = [
    ('mmdet.LearningRateDecayOptimizerConstructor', 'mmpretrain.ConvNeXt', 'layer_wise'),
    ('mmseg.LearningRateDecayOptimizerConstructor', 'mmpretrain.ConvNeXt', 'stage_wise'),
    ('mmpretrain.LearningRateDecayOptimWrapperConstructor', 'mmpretrain.VisionTransformer', None),
]


@pytest.mark.parametrize(('constructor', 'base', 'kind'), LAYER_DECAY)
@pytest.mark.filterwarnings('ignore:LearningRateDecayOptimizerConstructor is deprecated')
def test_layer_decay_never_reaches_prompts(constructor, base, kind):
    arch = 'atto' if base.endswith('ConvNeXt') else 'deit-tiny'
    backbone = dict(type='protune_mm.ProTuned', base=base, arch=arch)
    model = Model(backbone, head=False)
    model.head = nn.Linear(8, 2)
    rules = dict(decay_rate=0.5, num_layers=12, decay_type=kind)
    if kind is None:
        rules = dict(layer_decay_rate=0.5)
    config = dict(
        optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
        constructor=constructor,
        paramwise_cfg=rules,
    )
    found = groups(model, config)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert {found[name]['lr'] for name in protune_mm.tuned_parameters(model)} == {1e-3}


def test_prompts_alone_can_be_optimized():
    model = Model(resnet(), head=False)
    found = groups(model, dict(optimizer=SGD, paramwise_cfg=RULES['norm_and_bias']))
    assert set(found) == set(protune_mm.tuned_parameters(model))


def test_nothing_to_train_is_an_error():
    model = Model(resnet(policy='head-only'), head=False)
    with pytest.raises(ValueError, match='nothing to optimize'):
        build_optim_wrapper(model, wrap_constructor(dict(optimizer=SGD)))


def test_several_optimizers_are_refused():
    from mmengine.optim import OptimWrapper, OptimWrapperDict
    from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

    def constructor(part):
        class Several:
            def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
                pass

            def __call__(self, model):
                one = torch.optim.SGD(getattr(model, part).parameters(), lr=0.1)
                return OptimWrapperDict(one=OptimWrapper(one))

        return Several

    for part in ('backbone', 'head'):
        name = f'Several{part}'
        OPTIM_WRAPPER_CONSTRUCTORS.register_module(name=name, module=constructor(part))
        try:
            with pytest.raises(ValueError, match=f'{name} builds several optimizers'):
                build_optim_wrapper(
                    Model(resnet()), wrap_constructor(dict(optimizer=SGD, constructor=name))
                )
        finally:
            OPTIM_WRAPPER_CONSTRUCTORS.module_dict.pop(name)


def test_wrapping_twice_changes_nothing():
    once = wrap_constructor(dict(optimizer=SGD, constructor='X', paramwise_cfg=dict(a=1)))
    assert once['constructor'] == OURS
    assert once['paramwise_cfg'] == dict(a=1, constructor='X')
    assert wrap_constructor(once) is once


def test_a_step_moves_what_is_held():
    model = Model(resnet()).train()
    wrapper = build_optim_wrapper(model, wrap_constructor(dict(optimizer=SGD)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    wrapper.update_params(model(torch.randn(2, 3, 64, 64)).square().mean())
    for name, parameter in model.named_parameters():
        inner = '.down.' in name or '.spatial.' in name  # No gradient behind a zero start.
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.requires_grad and not inner) or (inner and moved), name
