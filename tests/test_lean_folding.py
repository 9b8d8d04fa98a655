"""A batch norm is applied exactly once, whatever stands between it and its convolution."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.module import register_module_full_backward_hook

import protune_mm
from tests.conftest import image


def chain(lean, width=8):
    """Two convolutions with batch norms whose statistics matter."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
    )  # fmt: skip
    for norm in (net[1], net[4]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return protune_mm.protune(net, policy='head-only', lean=lean).train()


class Adapted(nn.Module):
    """A convolution beside a new branch, as LoRA has it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.branch = base, nn.Conv2d(3, 8, 3, padding=1)
        nn.init.constant_(self.branch.weight, 0.1)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x):
        return self.base(x) + self.branch(x)


def hook_after_conv(net):
    net[0].register_forward_hook(lambda m, args, out: out * 2.0)


def look_at_conv(net):
    net[0].register_forward_hook(lambda m, args, out: net.__dict__.update(seen=out.detach()))


def hook_before_norm(net):
    net[1].register_forward_pre_hook(lambda m, args: (args[0].clone(),))


def change_before_norm(net):
    net[1].register_forward_pre_hook(lambda m, args: args[0].add_(1))


def patch_norm(net):
    norm = net[1]
    norm.forward = lambda x: F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )


def backward_hook_on_conv(net):
    net[0].register_full_backward_hook(lambda m, i, o: None)


def backward_hook_on_norm(net):
    net[1].register_full_backward_hook(lambda m, i, o: None)


def wrap_conv(net):
    net[0] = Adapted(net[0])


def new_conv(net):
    torch.manual_seed(5)
    net[0] = nn.Conv2d(3, 8, 3, padding=1).eval().requires_grad_(False)


def compile_conv(net):
    net[0].compile(backend='eager')


def compile_norm(net):
    net[1].compile(backend='eager')


def other_eps(net):
    net[1].eps = 0.5


def new_weight(net):
    net[0].weight = nn.Parameter(torch.full_like(net[0].weight, 0.3), requires_grad=False)


CHANGES = [
    hook_after_conv, look_at_conv, hook_before_norm, patch_norm, backward_hook_on_conv,
    backward_hook_on_norm, wrap_conv, new_conv, compile_conv, compile_norm, other_eps, new_weight,
    change_before_norm,
]  # fmt: skip


def results(net):
    x = image().requires_grad_()
    out = net(x)
    out.square().sum().backward()
    seen = net.__dict__.get('seen')
    return [out.detach(), x.grad, *([] if seen is None else [seen])]


def assert_same(stock, lean):
    assert len(stock) == len(lean)
    for a, b in zip(stock, lean, strict=True):
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()  # float32


@pytest.mark.filterwarnings('ignore')  # PyTorch's compiler.
@pytest.mark.parametrize('change', CHANGES)
def test_what_a_user_puts_in_between(change):
    found = []
    for lean in (False, True):
        net = chain(lean)
        net(image())
        change(net)
        found.append(results(net))
    assert_same(*found)


def test_global_backward_hooks():
    handle = register_module_full_backward_hook(lambda m, i, o: None)
    try:
        assert_same(results(chain(False)), results(chain(True)))
    finally:
        handle.remove()


def test_another_tensor_than_the_convolution_returned_is_an_error():
    net = chain(True)
    net[0](image())
    with pytest.raises(RuntimeError, match='BatchNorm2d was computed along with the convolution'):
        net[1](torch.randn(2, 8, 4, 4))
    assert_same(results(chain(False)), results(net))
    # Alone, it is a batch norm.
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(net[1](x), chain(False)[1](x))


def trace(net, x):
    return torch.jit.trace(net, x)(x)


def export(net, x):
    return torch.export.export(net, (x,)).module()(x)


def compile_(net, x):
    return torch.compile(net, backend='eager')(x)


def vmap(net, x):
    return torch.func.vmap(lambda one: net(one[None])[0])(x)


def dual(net, x):
    with torch.autograd.forward_ad.dual_level():
        out = net(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(out).tangent


@pytest.mark.filterwarnings('ignore')  # PyTorch's compilers.
@pytest.mark.parametrize('how', [trace, export, compile_, vmap, dual])
@pytest.mark.parametrize('change', [None, new_conv, new_weight])
def test_graphs_of_a_changed_network(how, change):
    found = []
    for lean in (False, True):
        net, x = chain(lean, 8 if change else 64), image()
        net(x)
        if change:
            change(net)
        found.append([how(net, x).detach()])
    assert_same(*found)


class Wrap(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def test_a_prompt_between_the_two():
    found = []
    for lean in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(Wrap(nn.Conv2d(3, 8, 3, padding=1)), nn.BatchNorm2d(8), nn.ReLU())
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
        protune_mm.protune(net, stages=['0'], prompt=dict(ratio=2), lean=lean).train()
        nn.init.constant_(net[0].prompt.up.weight, 0.3)
        found.append(results(net))
    assert_same(*found)


def test_weights_that_come_and_go():
    """A new tensor may get the memory of an old one."""
    totals = []
    for lean in (False, True):
        net, x, found = chain(lean, 64).eval(), torch.ones(1, 3, 8, 8), []
        for i in range(6):
            weights = {'0.weight': torch.full_like(net[0].weight, 1.0 + i)}
            with torch.no_grad():
                found.append(functional_call(net, weights, (x,)).sum().item())
        for i in range(6):
            net[0].weight = None
            net[0].weight = nn.Parameter(torch.full((64, 3, 3, 3), 2.0 - i), requires_grad=False)
            found.append(net(x).sum().item())
        totals.append(found)
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float16, torch.float64])
def test_images_of_another_dtype_are_refused_as_by_stock_layers(dtype):
    x = image().mul(50).to(dtype)
    errors = []
    for lean in (False, True):
        with pytest.raises(RuntimeError) as error:
            chain(lean)(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_a_batch_norm_refuses_other_channels():
    with pytest.raises(RuntimeError, match='running_mean'):
        chain(True)[1](torch.randn(2, 1, 4, 4))


@pytest.mark.parametrize('again', [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_changed_structure(again):
    net = chain(True)
    expected = results(net)[0]
    net[3] = nn.Identity()
    net[4] = nn.Identity()
    stock = chain(False)
    stock[3] = nn.Identity()
    stock[4] = nn.Identity()
    assert_same(results(stock), results(again(net)))
    assert expected.shape == results(net)[0].shape


def test_replicas_of_data_parallel():
    net, x = chain(True), image()
    expected = net(x)
    replica = net._replicate_for_data_parallel()
    for name, child in net.named_children():
        copied = child._replicate_for_data_parallel()
        replica._modules[name] = copied
        for key, tensor in child._parameters.items():
            setattr(copied, key, tensor)
        for key, tensor in child._buffers.items():
            copied._buffers[key] = tensor
    torch.testing.assert_close(replica(x), expected, rtol=1e-5, atol=1e-5)  # float32


def test_a_training_that_goes_on_keeps_folded_weights():
    """IterBasedTrainLoop calls ``train()`` before every step."""
    net, x = chain(True), image(3, 8, 8)
    net(x)
    known = dict(net[0].__dict__['_protune_cache'])
    assert known
    assert net.train()[0].__dict__['_protune_cache'] == known
    plain, before = chain(False), net(x)
    # Written as an average is swapped in: past autograd's version counter, and before a validation.
    for mode in (False, False, True):
        for each in (net, plain):
            each[0].weight.data.mul_(2)
        after = net.train(mode)(x)
        assert not torch.allclose(after, before, rtol=1e-2)
        torch.testing.assert_close(after, plain(x), rtol=1e-5, atol=1e-5)  # float32
        before = after
