"""Lean execution on a GPU computes what the stock layers compute there."""

import pytest
import torch

import protune_mm
from protune_mm.lean import masks
from protune_mm.lean.memory import kept_bytes
from tests.conftest import EXAMPLES, flat, image
from tests.test_lean import assert_same, step, trained_like

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU'),
]
CHOICES = ['memory', 'time', dict(channels_last=True), dict(prefer='time', dtype='autocast')]
DEVICE = 'cuda'


@pytest.fixture(autouse=True)
def exact():
    """No TF32: its rounding is larger than what is compared."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def run(backbone, x):
    """:func:`step` with weights of the loss that are drawn on the device."""
    backbone.zero_grad()
    outputs = flat(backbone(x))
    sum(o.float().square().sum() for o in outputs).backward()
    grads = {n: p.grad.cpu() for n, p in protune_mm.tuned_parameters(backbone).items()}
    return [o.detach().float().cpu() for o in outputs], grads


@pytest.mark.parametrize('lean', CHOICES[:3], ids=str)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_float32(library, family, lean):
    x = image().to(DEVICE)
    stock = run(trained_like(library, family, False).to(DEVICE), x)
    assert_same(stock, run(trained_like(library, family, lean).to(DEVICE), x), 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('lean', CHOICES, ids=str)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_autocast(library, family, lean, dtype):
    if isinstance(lean, dict) and 'dtype' in lean:
        lean = {**lean, 'dtype': str(dtype).removeprefix('torch.')}
    x = image().to(DEVICE)
    exact = step(trained_like(library, family, False), image())
    errors, kept = [], []
    for choice in (False, lean):
        backbone = trained_like(library, family, choice).to(DEVICE)
        with torch.autocast(DEVICE, dtype=dtype):
            outputs = flat(backbone(x))
            kept.append(kept_bytes(backbone, x))
        assert all(torch.isfinite(o).all() for o in outputs)
        errors.append(
            max(
                (a.float().cpu() - b).norm() / b.norm()
                for a, b in zip(outputs, exact[0], strict=True)
            )
        )
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert errors[1] <= 1.5 * errors[0] + rounding, errors
    assert kept[1] < kept[0]


@pytest.mark.parametrize('shape', [(13,), (2, 3, 5, 7), (2, 16, 8, 8)])
def test_packed_masks(shape):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)) > 0
    packed = masks.pack(mask.to(DEVICE))
    assert torch.equal(packed.cpu(), masks.pack(mask))
    assert torch.equal(masks.unpack(packed, mask.shape).cpu(), mask)
