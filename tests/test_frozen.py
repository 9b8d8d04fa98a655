"""Frozen means exact: after training, every frozen parameter and buffer is bit-identical."""

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

import protune_mm
from protune_mm.subclass import stock_type
from protune_mm.tuned import frozen_modules, frozen_tensors, prompts
from tests.conftest import EXAMPLES, build_protuned, build_stock, flat, image


def snapshot(module):
    return {name: tensor.clone() for name, tensor in frozen_tensors(module)}


def assert_unmoved(module, before):
    now = dict(frozen_tensors(module))
    assert set(now) == set(before)
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), f'{name} moved'


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_training_steps_move_prompts_and_nothing_else(library, family):
    tuned = build_protuned(library, family)
    before = snapshot(tuned)
    start = {n: p.clone() for n, p in protune_mm.tuned_parameters(tuned).items()}
    # All parameters, with weight decay: what a stock Runner hands to the optimizer.
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        tuned.train()
        optimizer.zero_grad()
        sum(output.square().mean() for output in flat(tuned(image()))).backward()
        optimizer.step()
    assert_unmoved(tuned, before)
    for name, parameter in protune_mm.tuned_parameters(tuned).items():
        assert not torch.equal(parameter, start[name]), f'{name} did not train'
    assert len(before) + len(start) == len(tuned.state_dict())


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_dropout_and_drop_path_stay_off(library, family):
    # MobileNetV2, and ResNet but for mmpretrain's, know no rates.
    plain = family.name == 'MobileNetV2' or (family.name == 'ResNet' and library != 'mmpretrain')
    rates = {} if plain else dict(drop_path_rate=0.9)
    tuned = build_protuned(library, family, **rates)
    expected = flat(tuned.eval()(image()))
    assert tuned.train() is tuned
    for a, b in zip(expected, flat(tuned(image())), strict=True):
        assert torch.equal(a, b)
    for name, module in frozen_modules(tuned):
        assert not module.training, name
    for name, prompt in prompts(tuned).items():
        assert prompt.training, name
    nn.Sequential(tuned).eval()
    assert not any(prompt.training for prompt in prompts(tuned).values())


FROZEN_STAGES = [
    dict(base='mmdet.ResNet', depth=18, frozen_stages=4, norm_eval=True),
    dict(base='mmseg.ResNetV1c', depth=18, frozen_stages=2),
    dict(base='mmpretrain.ResNet', depth=18, frozen_stages=4, norm_eval=True),
    dict(base='mmdet.MobileNetV2', frozen_stages=7, norm_eval=True, widen_factor=0.25),
    dict(base='mmpretrain.ConvNeXt', arch='atto', frozen_stages=4),
    dict(base='mmdet.SwinTransformer', frozen_stages=4, embed_dims=24),
    dict(base='mmpretrain.SwinTransformer', frozen_stages=3),
    dict(base='mmpretrain.VisionTransformer', arch='deit-tiny', frozen_stages=12),
    dict(base='mmseg.VisionTransformer', embed_dims=48, num_layers=4, norm_eval=True),
]


@pytest.mark.parametrize('config', FROZEN_STAGES, ids=lambda c: c['base'])
def test_prompts_stay_trainable_whatever_the_stock_freeze_says(config):
    bn = dict(norm_cfg=dict(type='BN'))
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', prompt=bn, **config))
    for _ in range(2):
        tuned.train()
        for name, parameter in tuned.named_parameters():
            assert parameter.requires_grad == ('prompt' in name.split('.')), name
        for prompt in prompts(tuned).values():
            assert prompt.norm1.training, "norm_eval is for the backbone's own norms"
    if 'frozen_stages' in config:
        assert tuned.frozen_stages == config['frozen_stages'], 'stays as written'


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))


class Regressor(BaseModel):
    """The smallest model with a backbone: predicts the mean of an image."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = MODELS.build(backbone)
        self.head = nn.LazyLinear(1)
        self.forward(torch.zeros(1, 3, 64, 64))

    def forward(self, inputs, mode='tensor'):
        x = self.head(flat(self.backbone(inputs))[-1].flatten(2).mean(2))
        return {'loss': (x - inputs.mean((1, 2, 3))[:, None]).square().mean()}


def loader():
    return dict(
        dataset=Images(),
        batch_size=2,
        num_workers=0,
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=lambda items: dict(inputs=torch.stack(items)),
    )


def runner(tmp_path, backbone, cls=Runner, **more):
    more.setdefault('train_cfg', dict(by_epoch=True, max_epochs=2))
    return cls(
        model=Regressor(backbone),
        work_dir=str(tmp_path),
        train_dataloader=loader(),
        optim_wrapper=more.pop(
            'optim_wrapper', dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1))
        ),
        default_hooks=dict(logger=None, checkpoint=None),
        experiment_name=str(tmp_path).replace('/', '_'),
        **more,
    )


LOOPS = [dict(by_epoch=True, max_epochs=3), dict(by_epoch=False, max_iters=5, val_interval=10)]


@pytest.mark.filterwarnings('ignore:Lazy modules are a new feature')
@pytest.mark.parametrize('loop', LOOPS, ids=['epochs', 'iterations'])
def test_a_stock_runner_leaves_batch_statistics_alone(tmp_path, loop):
    backbone = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, norm_eval=False)
    run = runner(tmp_path, backbone, train_cfg=loop)
    run.model.init_weights()
    before = snapshot(run.model)
    run.train()
    assert_unmoved(run.model, before)
    assert any('running_mean' in name for name in before)


@pytest.mark.filterwarnings('ignore:Lazy modules are a new feature')
def test_policies_head_only_and_full(tmp_path):
    base = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18)
    head = MODELS.build(dict(base, policy='head-only')).train()
    assert protune_mm.tuned_parameters(head) == {}
    assert not any(p.requires_grad for p in head.parameters())
    assert not any(m.training for m in head.modules())
    full = MODELS.build(dict(base, policy='full', norm_eval=False))
    full.train()
    assert stock_type(full) is type(full), 'the stock object, no subclass'
    assert all(p.requires_grad for p in full.parameters())
    assert full.layer1[0].bn1.training


@pytest.mark.parametrize('mode', [True, False])
def test_prompts_keep_the_mode_of_the_module(mode):
    stock = build_stock(*EXAMPLES[0].values)
    stock.train(mode)
    tuned = protune_mm.protune(stock)
    assert all(prompt.training == mode for prompt in prompts(tuned).values())
