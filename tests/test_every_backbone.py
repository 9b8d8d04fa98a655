"""Every row of the stage table, in every library that has it: exact start, freeze, gradients."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import protune_mm
from protune_mm.hooks import FrozenGuardHook
from protune_mm.stages import FAMILIES
from protune_mm.tuned import frozen_tensors, heads, prompts
from tests.conftest import EVERY, build_protuned, build_stock, flat, move_prompts

every = pytest.mark.parametrize(('library', 'family'), EVERY)
pytestmark = pytest.mark.usefixtures('library_scope')


def pictures(family, batch=2):
    return torch.randn(batch, *family.image, generator=torch.Generator().manual_seed(1))


def pair(library, family, lean, dtype=torch.float32, **more):
    """A frozen stock backbone and a Pro-tuned one with the same weights, none of them zero."""
    torch.manual_seed(0)
    stock = build_stock(library, family)
    stock.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in stock.state_dict().items():
        if not tensor.is_floating_point() or 'relative_coords' in name:
            continue
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.abs().max() < 1e-3 or not torch.isfinite(tensor).all() or tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    tuned = build_protuned(library, family, lean=lean, **more)
    tuned.load_state_dict(stock.state_dict(), strict=family.name != 'SwinTransformerV2')
    stock.train(False)
    return stock.to(dtype), tuned.to(dtype).eval()


def outputs(backbone, x):
    torch.manual_seed(0)  # mmpretrain's reversible ViT seeds the generator itself.
    return flat(backbone(x))


@every
def test_the_start_is_that_of_the_stock_backbone(library, family):
    x = pictures(family)
    with torch.no_grad():
        for lean in (False, True):
            stock, tuned = pair(library, family, lean)
            expected, got = outputs(stock, x), outputs(tuned, x)
            assert [o.shape for o in expected] == [o.shape for o in got]
            for a, b in zip(expected, got, strict=True):
                assert torch.isfinite(a).all()
                if lean is False:
                    assert torch.equal(a, b)
                elif family.name not in DISCONTINUOUS:
                    assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


DISCONTINUOUS = ('Vig', 'PyramidVig')
"""They link nearest neighbours: rounding changes which, and so the output."""


@every
def test_gradient_reaches_every_prompt_and_nothing_frozen(library, family):
    _, tuned = pair(library, family, True)
    move_prompts(tuned)
    tuned.train()
    before = {name: tensor.clone() for name, tensor in frozen_tensors(tuned)}
    sum(o.square().sum() for o in outputs(tuned, pictures(family)) if o.requires_grad).backward()
    trained = {f'{n}.{k}' for n, m in heads(tuned).items() for k, _ in m.named_parameters()}
    trained |= set(protune_mm.tuned_parameters(tuned))
    unread = UNREAD.get(family.name, ())
    for name, parameter in tuned.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert reached == (name in trained and not name.startswith(unread)), name
    for name, tensor in frozen_tensors(tuned):
        assert torch.equal(tensor, before[name]), name


UNREAD = {'AlexNet': ('classifier',)}
"""Classifiers that the examples do not have or use."""


@pytest.mark.parametrize('stages', [None, 'blocks'])
@every
def test_channels_are_what_the_blocks_yield(library, family, stages):
    # One of LeNet5's blocks has six channels.
    more = dict(stages=stages, prompt=dict(hidden=2)) if stages else {}
    tuned = build_protuned(library, family, **more)
    seen = {}
    for name, prompt in prompts(tuned).items():
        prompt.register_forward_hook(
            lambda _m, i, _o, name=name: seen.update({name: i[0].shape[1]})
        )
    with torch.no_grad():
        tuned(pictures(family, 1))
    assert len(prompts(tuned)) >= 3
    for name in prompts(tuned):
        site = tuned.get_submodule(name.removesuffix('.prompt'))._protune_site
        assert seen[name] == site.channels, name


@every
def test_stages_have_blocks_of_their_own(library, family):
    backbone = build_stock(library, family)
    blocks = [block for stage in family.split(backbone) for block in stage.blocks]
    assert len(set(blocks)) == len(blocks)
    for block in blocks:
        # It would run a child named `prompt`.
        assert type(backbone.get_submodule(block)) not in (nn.Sequential, nn.ModuleList), block


@every
def test_lean_layers_compute_the_same(library, family):
    # Two make a position embedding in float32, whatever their dtype.
    dtype, tolerance = (torch.float64, 1e-9)
    if family.name in ('EdgeNeXt', 'XCiT'):
        dtype, tolerance = torch.float32, 1e-3
    x = pictures(family).to(dtype)
    results = []
    for lean in (False, True):
        _, tuned = pair(library, family, lean, dtype)
        move_prompts(tuned)
        tuned.to(dtype).train()
        given = x.clone().requires_grad_()
        found = outputs(tuned, given)
        sum(o.square().sum() for o in found if o.requires_grad).backward()
        grads = [p.grad for p in protune_mm.tuned_parameters(tuned).values()]
        results.append(([o.detach() for o in found], [given.grad, *grads]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    largest = max(g.norm() for g in results[0][1])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).norm() <= 10 * tolerance * largest


def test_rows_have_names_and_examples_of_their_own():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert all(family.examples for family in FAMILIES)


OUTPUTS = ('out_indices', 'out_indice', 'out_scales')
"""Spellings of the argument that chooses outputs."""


@every
def test_one_line_tells_of_stages_that_nobody_reads(library, family, log):
    stock = build_stock(library, family)
    key = next((key for key in OUTPUTS if key in vars(stock)), None)
    if key is None or family.head(stock) or family.name == 'SSDVGG':
        pytest.skip('it always returns the same outputs, or a classifier reads the last')
    argument = 'out_scales' if key == 'out_scales' else 'out_indices'
    kind = list if family.name == 'HiViT' else tuple
    # The first output that can be read alone.
    for first in range(20):
        message = ''
        try:
            few = build_protuned(library, family, **{argument: kind((first,))})
            break
        except ValueError as error:
            message = str(error)
        except AssertionError:
            assert family.name in LAST_ONLY
            return
        assert f'has no stage that {key}=' in message
    lines = [line for line in log.text.splitlines() if 'no prompt after' in line]
    if family.name in LAST_ONLY or (library, family.name) in NOTHING_LATER:
        assert not lines
    else:
        assert len(lines) == 1
        assert f'{key}={getattr(few, key)} reads nothing from there' in lines[0]


LAST_ONLY = ('HiViT', 'MixMIMTransformer', 'MlpMixer', 'RevVisionTransformer', 'TNT')
"""Backbones that return their last output only, whatever is asked for."""
NOTHING_LATER = (('mmseg', 'BiSeNetV1'), ('mmseg', 'BiSeNetV2'), ('mmdet', 'EfficientNet'))
"""The first output joins all paths; or what nobody reads is not built."""


REASONS = {
    'mmpretrain.MAEViT': 'masks its own tokens for pre-training.*Pro-tune VisionTransformer',
    'mmpretrain.SparseResNet': 'expect the mask of SparK pre-training: Pro-tune ResNet',
    'mmpretrain.SimMIMSwinTransformer': 'masks its own tokens.*Pro-tune SwinTransformer',
}


@pytest.mark.parametrize('base', REASONS)
def test_what_cannot_be_tuned_says_why(base):
    more = dict(depth=50) if 'ResNet' in base else {}
    message = f'cannot be Pro-tuned: .*{REASONS[base]}'
    scope = DefaultScope.overwrite_default_scope('mmpretrain')
    with scope, pytest.raises(ValueError, match=message):
        MODELS.build(dict(type='protune_mm.ProTuned', base=base, **more))


@pytest.mark.parametrize(
    ('base', 'more'),
    [
        ('mmpretrain.ShuffleNetV1', {}),
        ('mmpretrain.MobileOne', dict(arch='s2')),
        ('mmpretrain.LeNet5', dict(num_classes=10)),
    ],
)
def test_prompts_of_small_backbones_are_narrower(base, more, log):
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base=base, **more))
    own = sum(p.numel() for p in protune_mm.tuned_parameters(tuned).values())
    assert own <= 0.08 * (sum(p.numel() for p in tuned.parameters()) - own)
    wide = dict(type='protune_mm.ProTuned', base=base, prompt=dict(ratio=4), **more)
    wide = protune_mm.tuned_parameters(MODELS.build(wide))
    assert sum(p.numel() for p in wide.values()) > own


def test_a_subclass_of_a_users_project_that_goes_around_its_block():
    """Found through its parent's row; the guard names the prompt without a gradient."""

    class Around(ResNet):
        def forward(self, x):
            x = self.maxpool(self.relu(self.norm1(self.conv1(x))))
            for name in self.res_layers:
                layer = getattr(self, name)
                x = layer[1].conv1(layer[0](x)) if name == 'layer2' else layer(x)
            return (x,)

    tuned = protune_mm.protune(Around(18)).train()
    assert [name.split('.')[0] for name in prompts(tuned)] == [f'layer{i}' for i in range(1, 5)]
    guard = FrozenGuardHook()
    runner = SimpleNamespace(model=tuned, logger=logging.getLogger(), hooks=[guard])
    guard.before_train(runner)
    tuned(torch.randn(1, 3, 64, 96))[0].mean().backward()
    with pytest.raises(RuntimeError, match=r"'layer2\.1\.prompt.*' got no gradient in the first"):
        guard.after_train_iter(runner)


def test_a_subclass_with_a_stage_of_its_own():
    class Five(ResNet):
        def __init__(self):
            super().__init__(18)
            self.layer5 = nn.Sequential(nn.Conv2d(512, 24, 1), nn.BatchNorm2d(24))

        def forward(self, x):
            return self.layer5(super().forward(x)[-1])

    tuned = protune_mm.protune(Five(), stages=['layer4', 'layer5'])
    assert list(prompts(tuned)) == ['layer4.1.prompt', 'layer5.1.prompt']
    move_prompts(tuned)
    tuned(torch.randn(1, 3, 64, 96)).mean().backward()
    assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())


def test_a_subclass_without_the_stages_of_its_parent():
    class Bare(ResNet):
        """Its own layers only; what the stock training mode asks for is there."""

        frozen_stages, norm_eval, deep_stem, norm1_name = -1, False, False, 'a'

        def __init__(self):
            BaseModule.__init__(self)
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3)

        def forward(self, x):
            return self.b(self.a(x))

    with pytest.raises(ValueError, match=r'Bare is a ResNet, but not in its stages .*name them'):
        protune_mm.protune(Bare())
    tuned = protune_mm.protune(Bare(), stages=['a', 'b'])
    assert list(prompts(tuned)) == ['a.prompt', 'b.prompt']
    tuned(torch.randn(1, 3, 64, 96)).mean().backward()


def test_two_backbones_that_share_a_stage():
    one, two = ResNet(18), ResNet(18)
    two.layer1 = one.layer1
    protune_mm.protune(one)
    with pytest.raises(ValueError, match=r"'layer1\.1' has a prompt already: ResNet shares it"):
        protune_mm.protune(two)


def test_prompts_of_blocks_without_weights_have_the_dtype_of_the_backbone():
    config = dict(type='mmdet.SSDVGG', depth=11, out_feature_indices=(14, 24))
    tuned = protune_mm.protune(MODELS.build(config).double())
    assert {p.dtype for p in protune_mm.tuned_parameters(tuned).values()} == {torch.float64}


def test_a_backbone_that_a_model_has_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
            self.two = self.one

        def forward(self, x):
            return [a + b for a, b in zip(self.one(x), self.two(x * 2), strict=True)]

    model = Twice().train()
    names = list(protune_mm.tuned_parameters(model))
    assert names
    assert all(name.startswith('one.') for name in names)
    move_prompts(model)
    sum(o.mean() for o in model(torch.randn(1, 3, 64, 96))).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in names), name


@pytest.mark.parametrize('kind', ['CSPDarknet', 'CSPNeXt'])
def test_separable_convolutions_tell_their_channels(kind):
    """As in YOLOX-nano, whose stages begin with one."""
    small = dict(
        deepen_factor=0.1, widen_factor=0.125, use_depthwise=True, out_indices=(1, 2, 3, 4)
    )
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base=f'mmdet.{kind}', stages='blocks', **small)
    )
    with torch.no_grad():
        assert len(tuned(torch.randn(1, 3, 64, 64))) == 4
