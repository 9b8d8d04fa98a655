"""The depth-wise kernel computes what PyTorch computes: outputs and all three gradients."""

import pytest
import torch

from protune_mm.ops import depthwise as module
from protune_mm.ops.depthwise import depthwise, reference
from tests.conftest import run_tool

CASES = [
    ((2, 3, 4, 7), torch.contiguous_format),
    ((2, 3, 4, 7), torch.channels_last),
    ((1, 70, 1, 2), torch.channels_last),
]
# Largest difference, as a part of the largest number: sums of 25 products are rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def compare(device):
    """Run every shape, layout and dtype on a device and compare with float32."""
    from protune_mm.ops.depthwise import Depthwise

    generator = torch.Generator().manual_seed(0)
    for dtype, tolerance in TOLERANCE.items():
        for shape, layout in CASES:
            sizes = (shape, (shape[1], 1, 5, 5), (shape[1],), shape)
            made = [torch.randn(s, generator=generator).to(device, dtype) for s in sizes]
            made[0] = made[0].contiguous(memory_format=layout)
            *leaves, grad = made
            mine = [t.clone().requires_grad_() for t in leaves]
            plain = [t.float().detach().requires_grad_() for t in leaves]
            out, expected = Depthwise.apply(*mine), reference(*plain)
            out.backward(grad)
            expected.backward(grad.float())
            assert out.stride() == leaves[0].stride()
            grads = [(a.grad, b.grad) for a, b in zip(mine, plain, strict=True)]
            for a, b in [(out, expected), *grads]:
                error = (a.float() - b).abs().max() / b.abs().max()
                assert error < tolerance, (dtype, shape, layout, float(error))
    print('all equal')


@pytest.mark.skipif(module.triton is None, reason='this PyTorch comes without Triton')
def test_the_kernel_in_the_interpreter():
    done = run_tool(
        '-c', "from tests.test_depthwise import compare; compare('cpu')",
        env={'TRITON_INTERPRET': '1'}, check=False,
    )  # fmt: skip
    if 'only 0-dimensional arrays can be converted' in done.stderr:
        pytest.skip("Triton's interpreter does not work with this NumPy; 2.2 is pinned")
    assert 'all equal' in done.stdout, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_the_kernel_on_a_gpu():
    compare('cuda')


@pytest.mark.parametrize('side', [3, 5, 7])
def test_elsewhere_it_is_pytorchs_own(side):
    x = torch.randn(2, 6, 9, 4, requires_grad=True)
    weight, bias = torch.randn(6, 1, side, side), torch.randn(6)
    assert torch.equal(depthwise(x, weight, bias), reference(x, weight, bias))


def test_a_gpu_that_was_not_measured_uses_pytorchs_own():
    assert module.choose('no such GPU', torch.bfloat16, True) == 'torch'
