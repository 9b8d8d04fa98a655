"""Lean backbones under torch.compile, torch.export, ONNX export, tracing and checkpointing."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import protune_mm
from tests.conftest import EXAMPLES, flat, image
from tests.test_lean import assert_same, small, step, trained_like

ONE_A_FAMILY = [p for p in EXAMPLES if p.id.startswith('mmpretrain')]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize(('library', 'family'), ONE_A_FAMILY)
def test_compile(library, family):
    backbone = trained_like(library, family, True).double()
    x = image(1, 64, 64).double()
    expected = step(backbone, x)
    torch._dynamo.reset()
    backbone.compile(backend='aot_eager')  # Traces as inductor does, without a C++ compiler.
    assert_same(expected, step(backbone, x), 1e-10)  # float64


@pytest.mark.filterwarnings('ignore')
def test_compile_with_the_default_backend():
    backbone = small(True)
    x = image(1, 64, 64)
    expected = step(backbone, x)
    torch._dynamo.reset()
    backbone.compile()
    assert_same(expected, step(backbone, x), 1e-5)  # float32


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('how', ['export', 'trace'])
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_export_and_trace(library, family, how):
    backbone = trained_like(library, family, True).eval()
    x, other = image(1, 64, 64), image(2, 64, 64)[1:]
    with torch.no_grad():
        expected = flat(backbone(other))
        if how == 'export':
            exported = torch.export.export(backbone, (x,)).module()
        else:
            exported = torch.jit.trace(backbone, (x,), check_trace=False)
        for a, b in zip(expected, flat(exported(other)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.filterwarnings('ignore')  # PyTorch's exporter uses what PyTorch deprecates.
def test_onnx(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    backbone, x = small(True).eval(), image(1, 64, 64)
    file = str(tmp_path / 'backbone.onnx')
    torch.onnx.export(backbone, (x,), file, dynamo=True)
    session = onnxruntime.InferenceSession(file)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for a, b in zip(flat(backbone(x)), got, strict=True):
            # float32; other kernels.
            torch.testing.assert_close(a, torch.from_numpy(b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_accumulated_gradients_are_those_of_the_sum(library, family):
    backbone = trained_like(library, family, True).double()
    x = image(2, 64, 64).double()
    backbone.zero_grad()
    for part in x.split(1):
        sum(o.square().sum() for o in flat(backbone(part))).backward()
    parts = {n: p.grad.clone() for n, p in protune_mm.tuned_parameters(backbone).items()}
    backbone.zero_grad()
    sum(o.square().sum() for o in flat(backbone(x))).backward()
    for name, p in protune_mm.tuned_parameters(backbone).items():
        torch.testing.assert_close(parts[name], p.grad, rtol=1e-8, atol=1e-8)


def test_backward_twice_through_one_graph():
    backbone = trained_like('mmpretrain', EXAMPLES[-1].values[1], True)
    loss = sum(o.square().sum() for o in flat(backbone(image(1, 64, 64))))
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in protune_mm.tuned_parameters(backbone).items()}
    loss.backward()
    for name, p in protune_mm.tuned_parameters(backbone).items():
        assert torch.equal(p.grad, 2 * once[name]), name


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_checkpointing_the_whole_backbone(library, family):
    backbone = trained_like(library, family, True)
    x = image(1, 64, 64)
    expected = step(backbone, x)
    inner = copy.deepcopy(backbone)

    class Checkpointed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    outputs, grads = step(Checkpointed(), x)
    assert_same(expected, (outputs, {k.removeprefix('inner.'): v for k, v in grads.items()}), 1e-6)


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint. the use_reentrant')  # The libraries'.
@pytest.mark.parametrize('lean', [False, True])
def test_checkpointed_stock_blocks(lean):
    """``with_cp=True``, the stock option."""
    plain, checkpointed = small(lean), small(lean, with_cp=True)
    x = image()
    assert_same(step(plain, x), step(checkpointed, x), 1e-6)  # float32
