"""What a user may do to a lean backbone: the right result or a clear error, never a silent one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrize
from torch.utils.checkpoint import checkpoint

import protune_mm
from protune_mm.lean import LeanOptions, make_lean
from protune_mm.lean.functions import FrozenNorm
from protune_mm.lean.memory import kept_bytes
from tests.conftest import EXAMPLES, build_protuned, flat, image
from tests.test_lean import small, trained_like

VIT = next(p.values for p in EXAMPLES if p.id == 'mmpretrain-VisionTransformer')


def with_statistics(lean):
    backbone = small(lean)
    generator = torch.Generator().manual_seed(4)
    for name, buffer in backbone.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5, generator=generator)
    return backbone.eval()


def fuse(backbone):
    backbone.conv1 = fusion.fuse_conv_bn_eval(backbone.conv1, backbone.bn1)
    backbone.bn1 = nn.Identity()


def drop_norm(backbone):
    backbone.bn1 = nn.Identity()


def to_sync(backbone):
    nn.SyncBatchNorm.convert_sync_batchnorm(backbone)


def patch_forward(backbone):
    backbone.conv1.forward = lambda x, conv=backbone.conv1: nn.Conv2d.forward(conv, x)


@pytest.mark.parametrize('change', [fuse, drop_norm, to_sync, patch_forward])
def test_layers_that_are_replaced_after_pro_tuning(change):
    outputs = []
    for lean in (False, True):
        backbone, x = with_statistics(lean), image()
        backbone(x)
        change(backbone)
        backbone.eval()
        with torch.no_grad():
            outputs.append(flat(backbone(x)))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32


def lean_mlp():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval().requires_grad_(False)
    make_lean(mlp, LeanOptions())
    return mlp


def test_a_base_changed_in_place_is_an_error():
    mlp = lean_mlp()
    x = torch.randn(4, 8, requires_grad=True) * 1
    x += mlp(x)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        x.sum().backward()


@pytest.mark.parametrize('layer', ['down', 'spatial', 'up'])
def test_prompt_weights_changed_before_backward_are_an_error(layer):
    backbone = small(True)
    prompt = backbone.layer4[-1].prompt
    loss = flat(backbone(image()))[-1].sum()
    with torch.no_grad():
        # The first layer's weight is only needed where its input needs a gradient.
        getattr(prompt, layer).weight.mul_(3)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def test_a_parametrized_layer_trains():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(1.0))

        def forward(self, weight):
            return weight * self.factor

    grads = []
    for lean in (False, True):
        backbone = small(lean)
        scale = Scale()
        parametrize.register_parametrization(backbone.layer2[0].conv1, 'weight', scale)
        scale.requires_grad_(True)
        flat(backbone(image()))[-1].square().sum().backward()
        grads.append(scale.factor.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)  # float32


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_prompts_stay_in_float32_beside_weights_in_bfloat16(library, family):
    backbone = build_protuned(library, family, lean=dict(dtype='bfloat16'))
    assert {p.dtype for p in protune_mm.tuned_parameters(backbone).values()} == {torch.float32}
    frozen = [m for m in backbone.modules() if type(m).__name__ in ('Conv2d', 'Linear')]
    assert any(m.weight.dtype == torch.bfloat16 for m in frozen)


@pytest.mark.parametrize('layer', [nn.ReLU(), nn.ReLU6(), nn.Hardtanh()])
def test_a_nan_stays_one(layer):
    grads = []
    for lean in (False, True):
        chain = nn.Sequential(layer)
        if lean:
            make_lean(chain, LeanOptions())
        x = torch.tensor([float('nan'), 0.5, -1.0, 0.0], requires_grad=True)
        chain(x).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_backward_within_autocast():
    grads = []
    for lean in (False, True):
        backbone = trained_like(*VIT, lean)
        loss = flat(backbone(image(1, 64, 64)))[-1].square().sum()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss.backward()
        grads.append({n: p.grad for n, p in protune_mm.tuned_parameters(backbone).items()})
    for name, grad in grads[0].items():
        # bfloat16 in the backward formulas that autocast reaches.
        torch.testing.assert_close(grad, grads[1][name], rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize('mode', ['memory', 'time'])
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_checkpointing_keeps_the_input_alone(library, family, mode):
    backbone = trained_like(library, family, mode)
    x = image(1, 64, 64).requires_grad_()
    kept = kept_bytes(lambda: checkpoint(backbone, x, use_reentrant=False))
    assert kept < 0.05 * kept_bytes(lambda: backbone(x))


def test_what_a_backbone_remembers_is_real():
    class Remembers(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.grid = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), None

        def forward(self, x):
            if self.grid is None:
                self.grid = torch.ones(1, 1, 1, 1)
            return self.bn(self.conv(x)) * self.grid

    backbone = protune_mm.protune(Remembers(), stages=['bn'])
    assert type(backbone(image()).detach()) is torch.Tensor


@pytest.mark.parametrize('groups', [0, 2])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_norms_that_widen(groups, dtype):
    """What runs under autocast on a GPU, here on the CPU."""
    torch.manual_seed(0)
    weight, bias = torch.rand(8, dtype=dtype), torch.rand(8, dtype=dtype)
    x = torch.randn(2, 8, 5, 8).bfloat16()
    mine, plain = x.clone().requires_grad_(), x.float().requires_grad_()
    out = FrozenNorm.apply(mine, weight, bias, groups, () if groups else (8,), 1e-5)
    wide = (weight.float(), bias.float(), 1e-5)
    expected = F.group_norm(plain, 2, *wide) if groups else F.layer_norm(plain, (8,), *wide)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)  # float32
    factor = torch.randn_like(out)
    (out * factor).sum().backward()
    (expected * factor).sum().backward()
    torch.testing.assert_close(mine.grad.float(), plain.grad, rtol=1e-2, atol=1e-2)  # bfloat16


SWIN = next(p.values for p in EXAMPLES if p.id == 'mmdet-SwinTransformer')


def scaled(module, args):
    return (args[0] * 3 + 1, *args[1:])


class Scaled(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x, mask=None):
        return self.attention(x * 3 + 1, mask)


def hook_attention(block):
    block.attn.w_msa.register_forward_pre_hook(scaled)


def wrap_attention(block):
    block.attn.w_msa = Scaled(block.attn.w_msa)


@pytest.mark.parametrize('change', [hook_attention, wrap_attention])
def test_windows_that_are_changed_before_attention(change):
    grads = []
    for lean in (False, True):
        backbone = trained_like(*SWIN, lean)
        for stage in backbone.stages:
            for block in stage.blocks:
                change(block)
        x = image().requires_grad_()
        sum(o.square().sum() for o in flat(backbone(x))).backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[0].abs().max()  # float32


@pytest.mark.parametrize('name', ['weight', 'bias'])
@pytest.mark.parametrize('layer', [0, 1])
def test_constants_of_a_recipe_changed_before_backward_are_an_error(layer, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    net.eval().requires_grad_(False)
    make_lean(net, LeanOptions())
    out = net(torch.randn(4, 8, requires_grad=True))
    with torch.no_grad():
        getattr(net[layer], name).add_(3)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


@pytest.mark.parametrize('rows', [4, 400])  # Above and below where oneDNN multiplies.
def test_outputs_changed_in_place(rows):
    results = []
    for lean in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(inplace=True), nn.Linear(96, 64)).eval()
        net.requires_grad_(False)
        if lean:
            make_lean(net, LeanOptions())
        x = torch.randn(2, rows, 64, requires_grad=True)
        out = net(x)
        out += 1
        out[:, 0] += 1
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32


class Remembers(nn.Module):
    """A user's backbone that keeps what it computed in places of every kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.cache, self.seen = {}, []
        self.register_buffer('grid', None)

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.grid is None:
            self.grid = torch.ones_like(x[:1, :1, :1, :1])
            self.register_buffer('late', self.grid * 2)
        scale = self.cache.setdefault('scale', self.grid * self.late)
        self.seen.append(scale)
        return (x * self.seen[0],)


def test_the_probe_leaves_nothing_behind():
    backbone = protune_mm.protune(Remembers(), stages=['norm'])
    assert backbone.grid is None
    assert not backbone.cache
    assert not backbone.seen
    assert not hasattr(backbone, 'late')
    assert type(backbone(image())[0]) is torch.Tensor
