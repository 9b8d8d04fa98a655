"""The prompt block is 1x1 -> 5x5 -> 1x1, keeps the shape, and starts at zero."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from protune_mm.prompts import ProTuningBlock

# Channels, height, width: primes, one pixel, and a map smaller than the kernel.
SHAPES = [(16, 8, 12), (24, 1, 1), (8, 3, 2), (32, 13, 7)]


@pytest.mark.parametrize(('channels', 'height', 'width'), SHAPES)
@pytest.mark.parametrize('ratio', [1, 4, 8])
def test_keeps_the_shape(channels, height, width, ratio):
    block = ProTuningBlock(channels, ratio=ratio)
    assert block(torch.randn(2, channels, height, width)).shape == (2, channels, height, width)


def test_holds_exactly_three_convolutions_of_figure_2():
    convs = [m for m in ProTuningBlock(32).modules() if isinstance(m, nn.Conv2d)]
    assert [conv.kernel_size for conv in convs] == [(1, 1), (5, 5), (1, 1)]
    assert [conv.out_channels for conv in convs] == [4, 4, 32]
    assert convs[1].groups == 4, 'depth-wise by default'
    dense = ProTuningBlock(32, depthwise=False)
    assert dense.spatial.groups == 1


@pytest.mark.parametrize('depthwise', [True, False])
@pytest.mark.parametrize('act', [True, False])
@pytest.mark.parametrize(('scale', 'learnable'), [(1.0, False), (0.1, False), (0.1, True)])
def test_forward_and_gradient_equal_a_plain_reference(depthwise, act, scale, learnable):
    torch.manual_seed(0)
    act_cfg = dict(type='GELU') if act else None
    block = ProTuningBlock(
        16, ratio=4, depthwise=depthwise, act_cfg=act_cfg, scale=scale, zero_init=False,
        learnable_scale=learnable,
    ).double()  # fmt: skip
    x = torch.randn(2, 16, 7, 11, dtype=torch.float64)
    gelu = F.gelu if act else (lambda t: t)

    def reference(x, *parameters):
        (*factor, wd, bd, ws, bs, wu, bu) = parameters
        hidden = gelu(torch.einsum('oi,bihw->bohw', wd[:, :, 0, 0], x) + bd[:, None, None])
        hidden = gelu(F.conv2d(hidden, ws, bs, padding=2, groups=4 if depthwise else 1))
        out = torch.einsum('oi,bihw->bohw', wu[:, :, 0, 0], hidden) + bu[:, None, None]
        return out * (factor[0] if factor else scale)

    inputs = [x, *(p.detach().clone() for p in block.parameters())]
    assert len(inputs) == (8 if learnable else 7)
    for tensor in inputs:
        tensor.requires_grad_()
    expected = reference(*inputs)
    grads = torch.autograd.grad(expected.square().sum(), inputs)
    y = x.detach().requires_grad_()
    got = block(y)
    got.square().sum().backward()
    found = [y.grad, *(p.grad for p in block.parameters())]
    # float64: sums in another order only.
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for name, g, e in zip(('x', *dict(block.named_parameters())), found, grads, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f'{n}: {m}')


def test_starts_at_exactly_zero_and_still_learns():
    block = ProTuningBlock(16)
    out = block(torch.randn(1, 16, 5, 5))
    assert out.abs().max() == 0
    out.sum().backward()
    assert block.up.weight.grad.abs().max() > 0
    assert ProTuningBlock(16, zero_init=False)(torch.randn(1, 16, 5, 5)).abs().max() > 0


def test_init_weights_restores_the_start():
    block = ProTuningBlock(16, norm_cfg=dict(type='BN'), learnable_scale=True, scale=0.5)
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    block.init_weights()
    assert block.up.weight.abs().max() == 0
    assert block.up.bias.abs().max() == 0
    assert block.scale == 0.5
    assert torch.equal(block.norm1.weight, torch.ones(2))


def test_norm_and_learnable_scale_are_options():
    block = ProTuningBlock(16, norm_cfg=dict(type='GN', num_groups=1), learnable_scale=True)
    assert isinstance(block.norm1, nn.GroupNorm)
    assert block.down.bias is None, 'a bias right before a norm does nothing'
    assert block.scale.requires_grad


def test_spatial_context_is_five_by_five():
    block = ProTuningBlock(8, ratio=1, zero_init=False, act_cfg=None)
    x = torch.zeros(1, 8, 11, 11)
    base = block(x)
    x[0, :, 5, 5] = 1
    touched = (block(x) - base).abs().sum(1)[0] > 0
    assert touched.nonzero().amin(0).tolist() == [3, 3]
    assert touched.nonzero().amax(0).tolist() == [7, 7]


@pytest.mark.parametrize('ratio', [17, 1000, 0, -1])
def test_a_ratio_that_leaves_no_channel_is_an_error(ratio):
    with pytest.raises(ValueError, match=f'ratio={ratio} leaves no channel of 16'):
        ProTuningBlock(16, ratio=ratio)


def test_an_even_kernel_is_an_error():
    with pytest.raises(ValueError, match='kernel_size=4'):
        ProTuningBlock(16, kernel_size=4)


@pytest.mark.parametrize('learnable', [True, False])
def test_the_scale_of_the_width(learnable):
    options = dict(hidden=4, learnable_scale=learnable, zero_init=False)
    torch.manual_seed(0)
    root = ProTuningBlock(8, scale='root', **options)
    one = ProTuningBlock(8, **options)
    one.load_state_dict(
        {**root.state_dict(), **({'scale': torch.tensor(1.0)} if learnable else {})}
    )
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(root(x), one(x) / 2)  # float32
    with pytest.raises(TypeError, match="scale='rot' is no number and not 'root'"):
        ProTuningBlock(8, scale='rot')


@pytest.mark.parametrize('options', [dict(), dict(norm_cfg=dict(type='GN', num_groups=1))])
def test_hidden_channels_are_left_out_of_an_image_in_training(options):
    torch.manual_seed(0)
    block = ProTuningBlock(8, hidden=4, zero_init=False, drop_rate=0.5, **options).double()
    plain = ProTuningBlock(8, hidden=4, zero_init=False, **options).double()
    plain.load_state_dict(block.state_dict())
    x = torch.randn(64, 8, 3, 3, dtype=torch.float64)
    assert torch.equal(block.eval()(x), plain(x))
    # What the last convolution reads is zero or twice what it is without, a channel at a time.
    read = {}
    for name, module in (('dropped', block.train()), ('whole', plain)):
        module.up.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0]}))
        module(x)
    factor = (read['dropped'] / read['whole']).flatten(2)
    torch.testing.assert_close(factor, factor[..., :1].expand_as(factor))
    found = set(factor[..., 0].flatten().round(decimals=6).tolist())
    assert found == {0.0, 2.0}
    assert 0.35 < (factor[..., 0] == 0).double().mean() < 0.65
    assert len({tuple(row) for row in (factor[..., 0] == 0).tolist()}) > 8, 'an image at a time'


@pytest.mark.parametrize('lean', [True, False])
def test_dropped_channels_get_the_gradient_of_a_plain_reference(lean):
    torch.manual_seed(0)
    block = ProTuningBlock(8, hidden=4, zero_init=False, drop_rate=0.5).double().train()
    block.lean = lean
    x = torch.randn(6, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = block(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    torch.manual_seed(1)
    hidden = block.act2(block.spatial(block.act1(block.down(x))))
    expected = block.up(nn.functional.dropout2d(hidden, 0.5))
    wanted = torch.autograd.grad(expected.square().sum(), [x, *block.parameters()])
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('rate', 'error', 'words'),
    [
        (1.0, ValueError, 'drop_rate=1.0: use a probability from 0 to below 1'),
        (-0.1, ValueError, 'drop_rate=-0.1: use'),
        ('some', TypeError, "drop_rate='some' is no number"),
        (True, TypeError, 'drop_rate=True is no number'),
    ],
)
def test_a_rate_that_is_no_probability_is_an_error(rate, error, words):
    with pytest.raises(error, match=words):
        ProTuningBlock(16, drop_rate=rate)
