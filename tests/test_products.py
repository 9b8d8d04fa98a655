"""Which kernel multiplies changes the time, not the numbers, nor who may count or differentiate."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from protune_mm.lean import LeanOptions, make_lean, products
from protune_mm.lean.functions import FrozenConv2d

LARGE = products.LARGE, products.LARGE_CONVOLUTION
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)
needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason='this PyTorch has no oneDNN'
)


def rows(layout):
    generator = torch.Generator().manual_seed(0)
    if layout == 'transposed':
        return torch.randn(2, 128, 150, generator=generator).transpose(1, 2)
    if layout == 'strided':
        return torch.randn(2, 150, 256, generator=generator)[..., ::2]
    return torch.randn(2, 150, 128, generator=generator)


def weights(out, into):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(out, into, generator=generator), torch.randn(out, generator=generator)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('layout', ['dense', 'transposed', 'strided'])
def test_linear(layout, dtype):
    weight, bias = (t.to(dtype) for t in weights(192, 128))
    results = []
    for run in (F.linear, products.frozen_linear):
        x = rows(layout).to(dtype).requires_grad_()
        out = run(x, weight, bias)
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        results.append((out, grad, second))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        # float32 and bfloat16: the order of sums of 128 to 192 products differs.
        rounding = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        assert (a - b).abs().max() <= rounding * a.abs().max()


@pytest.mark.parametrize('format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('batch', [1, 3])
def test_pointwise_convolution(batch, format):
    weight, bias = weights(96, 64)
    weight = weight[:, :, None, None]
    results = []
    for run in (lambda x: F.conv2d(x, weight, bias), lambda x: conv(x, weight, bias)):
        x = torch.randn(batch, 64, 30, 25, generator=torch.Generator().manual_seed(0))
        x = x.contiguous(memory_format=format).requires_grad_()
        # A lean activation may change the output in place.
        out = torch.relu_(run(x * 1))
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        assert out.is_contiguous(memory_format=format)
        results.append((out, grad, second))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() <= 1e-6 * a.abs().max()  # float32


def conv(x, weight, bias):
    return FrozenConv2d.apply(x, weight, bias, GEOMETRY)


def used(run, x):
    """Names of the operations that a forward and backward pass run, with their counts."""
    with FlopCounterMode(display=False) as counter:
        run(x.requires_grad_()).sum().backward()
    counts = counter.get_flop_counts()['Global']
    return {str(name) for name in counts}, counter.get_total_flops()


@needs_onednn
def test_large_products_run_in_onednn_and_are_counted():
    weight, bias = weights(192, 128)
    x = rows('dense')
    stock, operations = used(lambda x: F.linear(x, weight, bias), x.clone())
    ours, counted = used(lambda x: products.frozen_linear(x, weight, bias), x.clone())
    assert ours == {'mkldnn._linear_pointwise'}
    assert 'mkldnn._linear_pointwise' not in stock
    assert counted == operations > 0
    pixels = torch.randn(1, 128, 20, 25)
    kernel = weight[:, :, None, None]
    for format in (torch.contiguous_format, torch.channels_last):
        image = pixels.contiguous(memory_format=format)
        _, operations = used(lambda x: F.conv2d(x, kernel, bias), image.clone())
        ours, counted = used(lambda x: conv(x, kernel, bias), image.clone())
        last = format is torch.channels_last
        assert ours == {'mkldnn._linear_pointwise' if last else 'aten.mkldnn_convolution'}
        assert counted == operations > 0


def test_onednn_can_be_switched_off():
    weight, bias = weights(192, 128)
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of Intel's GPUs.
    try:
        ours, _ = used(lambda x: products.frozen_linear(x, weight, bias), rows('dense'))
    finally:
        torch._C._set_mkldnn_enabled(enabled)
    assert ours == {'aten.addmm', 'aten.mm'}


def test_small_products_stay_with_pytorch():
    weight, bias = weights(8, 8)
    ours, _ = used(lambda x: products.frozen_linear(x, weight, bias), torch.randn(4, 8))
    assert ours == {'aten.addmm', 'aten.mm'}


@needs_onednn
def test_torch_func():
    """Transforms of ``torch.func`` see plain layers."""
    torch.manual_seed(0)
    # Large enough for oneDNN, without the transform.
    net = nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 256, 1),
        nn.Flatten(2), nn.Linear(256, 32), nn.GELU(), nn.LayerNorm(32),
    )  # fmt: skip
    net.eval().requires_grad_(False)
    x = torch.randn(4, 3, 16, 16)

    def loss(image):
        return net(image[None]).square().sum()

    expected = torch.func.vmap(torch.func.grad(loss))(x)
    make_lean(net, LeanOptions())
    found, _ = used(net, x.clone())
    assert {'mkldnn._linear_pointwise', 'aten.mkldnn_convolution'} <= found
    got = torch.func.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # float32
