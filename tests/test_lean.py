"""Lean execution computes what the stock layers compute, and keeps far less for backward."""

import copy
import pickle

import pytest
import torch
from mmcv.cnn.bricks import Conv2dAdaptivePadding, Swish
from mmengine.model import revert_sync_batchnorm
from mmengine.model.utils import _BatchNormXd
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.lean import LeanOptions, lean_form, make_lean, masks
from protune_mm.lean.memory import Storages, kept_bytes
from protune_mm.tuned import prompts
from tests.conftest import EXAMPLES, build_protuned, flat, image, move_prompts

MODES = ('memory', 'time')


def step(backbone, x):
    """Outputs, and the gradient of each prompt parameter of a loss that weighs every number."""
    backbone.zero_grad()
    outputs = flat(backbone(x))
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(o.shape, generator=generator) for o in outputs]
    sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    grads = {n: p.grad.clone() for n, p in protune_mm.tuned_parameters(backbone).items()}
    return [o.detach() for o in outputs], grads


def trained_like(library, family, lean, **more):
    """A Pro-tuned backbone with batch statistics and prompts that matter, the same each time."""
    torch.manual_seed(0)
    backbone = build_protuned(library, family, lean=lean, **more)
    generator = torch.Generator().manual_seed(4)
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        if name.endswith('running_var'):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith('running_mean') or tensor.ndim == 1:
            tensor.data.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    move_prompts(backbone)
    return backbone.train()


def assert_same(one, other, tolerance):
    """Outputs to a part of their size; gradients to a part of the largest gradient's norm."""
    for a, b in zip(one[0], other[0], strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    largest = max(g.norm() for g in one[1].values())
    assert largest > 0
    for name, grad in one[1].items():
        assert (grad - other[1][name]).norm() <= tolerance * largest, name


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(
    # The random prompts of every block amplify float32's rounding.
    ('stages', 'dtype', 'tolerance'),
    [(None, torch.float32, 1e-5), (None, torch.float64, 1e-12), ('blocks', torch.float64, 1e-12)],
)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_outputs_and_gradients_are_those_of_the_stock_layers(
    library, family, stages, dtype, tolerance, mode
):
    x = image().to(dtype)
    stock = step(trained_like(library, family, False, stages=stages).to(dtype), x)
    lean = step(trained_like(library, family, mode, stages=stages).to(dtype), x)
    assert_same(stock, lean, tolerance)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_the_gradient_of_the_image_too(library, family, mode):
    grads = []
    for lean in (False, mode):
        x = image().requires_grad_()
        outputs = flat(trained_like(library, family, lean)(x))
        sum(o.square().sum() for o in outputs).backward()
        grads.append(x.grad)
    # float32; relative to the largest gradient.
    assert (grads[0] - grads[1]).abs().max() <= 1e-4 * grads[0].abs().max()


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_less_is_kept(library, family):
    kept = {
        lean: kept_bytes(trained_like(library, family, lean), image(1, 128, 160))
        for lean in (False, *MODES)
    }
    assert 0 < kept['memory'] < 0.5 * kept[False]
    assert kept['memory'] <= kept['time'] < kept[False]


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_names_state_and_copies_are_stock(library, family):
    stock = trained_like(library, family, False)
    lean = trained_like(library, family, True)
    assert list(lean.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in lean.named_modules()] == [n for n, _ in stock.named_modules()]
    x = image()
    expected = step(lean, x)
    assert any('_protune_cache' in m.__dict__ for m in lean.modules()) or not norms(lean)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        lean(x)
    for module in lean.modules():  # A copy drops what our classes hold, and nothing else.
        assert '_protune_cache' not in module.__dict__ or hasattr(type(module), '_protune_stock')
    for copied in (copy.deepcopy(lean), pickle.loads(pickle.dumps(lean))):
        assert not any('_protune_cache' in m.__dict__ for m in copied.modules())
        got = step(copied, x)
        for a, b in zip(expected[0], got[0], strict=True):
            assert torch.equal(a, b)
        for name, grad in expected[1].items():
            assert torch.equal(grad, got[1][name]), name


def norms(backbone):
    return [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]


def small(lean, **kwargs):
    """A ResNet-18 with narrow stages."""
    torch.manual_seed(0)
    config = dict(depth=18, base_channels=8, stem_channels=8, out_indices=(0, 1, 2, 3), **kwargs)
    config.update(type='protune_mm.ProTuned', base='mmpretrain.ResNet')
    backbone = MODELS.build(dict(**config, lean=lean))
    move_prompts(backbone)
    return backbone.train()


def new_weights(scale):
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.rand(t.shape, generator=generator) * scale if t.is_floating_point() else t
        for name, t in small(False).state_dict().items()
    }


def swap_by_load(backbone, weights):
    backbone.load_state_dict(weights)
    return backbone


def swap_in_place(backbone, weights):
    with torch.no_grad():
        for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
            tensor.copy_(weights[name])
    return backbone


def swap_data_as_an_ema_hook_does(backbone, weights):
    for name, tensor in [*backbone.named_parameters(), *backbone.named_buffers()]:
        tensor.data.copy_(weights[name])  # Past autograd's version counter.
    backbone.eval()  # mmengine's loops set the mode right after the swap.
    return backbone.train()


def swap_by_assignment(backbone, weights):
    backbone.load_state_dict(weights, assign=True)
    for name in protune_mm.tuned_parameters(backbone):
        backbone.get_parameter(name).requires_grad_(True)
    return backbone


@pytest.mark.parametrize(
    'swap',
    [swap_by_load, swap_in_place, swap_data_as_an_ema_hook_does, swap_by_assignment],
    ids=lambda f: f.__name__,
)
def test_no_fold_is_stale_after_weights_are_swapped(swap):
    x = image()
    lean, stock = small(True), small(False)
    step(lean, x)
    weights = new_weights(0.2)
    lean, stock = swap(lean, weights), swap(stock, weights)
    assert_same(step(stock, x), step(lean, x), 1e-5)  # float32


def test_no_fold_is_stale_after_a_change_of_dtype():
    x = image()
    lean, stock = small(True), small(False)
    step(lean, x)
    # bfloat16 has 8 bits: 2 ** -8 a rounding, some dozens in a row.
    assert_same(step(stock.bfloat16(), x.bfloat16()), step(lean.bfloat16(), x.bfloat16()), 0.06)
    assert_same(step(stock.double(), x.double()), step(lean.double(), x.double()), 1e-10)


@pytest.mark.parametrize('which', ['conv1.weight', 'bn1.bias', 'layer2.0.bn1.weight'])
def test_a_layer_that_is_not_frozen_any_more_runs_as_stock(which):
    x = image()
    results = []
    for lean in (False, True):
        backbone = small(lean)
        step(backbone, x)
        parameter = backbone.get_parameter(which)
        parameter.requires_grad_(True)
        outputs, grads = step(backbone, x)
        grads[which] = parameter.grad
        results.append((outputs, grads))
    assert_same(*results, 1e-5)  # float32


def test_a_norm_in_training_mode_runs_as_stock():
    x = image()
    results = []
    for lean in (False, True):
        backbone = small(lean)
        backbone.bn1.train()
        results.append((*step(backbone, x), backbone.bn1.running_mean))
    torch.testing.assert_close(results[0][2], results[1][2])
    assert_same(results[0][:2], results[1][:2], 1e-5)  # float32


def test_weights_changed_between_forward_and_backward_are_an_error():
    backbone = small(True)
    loss = flat(backbone(image()))[-1].sum()
    with torch.no_grad():
        backbone.layer4[0].conv1.weight.mul_(2)  # Folded: backward uses what forward used.
    loss.backward()
    plain = protune_mm.protune(
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)), stages=['0', '1']
    ).train()
    loss = plain(image()).sum()
    with torch.no_grad():
        plain[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        loss.backward()


def nodes(tensor):
    """Names of all nodes of a graph."""
    seen, todo = {}, [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen[node] = node.name()
            todo += [child for child, _ in node.next_functions]
    return seen.values()


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_double_backward(library, family):
    """A penalty on the gradient of the image."""
    results = []
    for lean in (False, True):
        backbone = trained_like(library, family, lean).double()
        x = image(1, 64, 64).double().requires_grad_()
        outputs = flat(backbone(x))
        (grad,) = torch.autograd.grad(sum(o.square().sum() for o in outputs), x, create_graph=True)
        if 'ScaledDotProduct' in ' '.join(nodes(grad)):
            with pytest.raises(RuntimeError, match='not implemented'):
                grad.square().sum().backward()
            return  # PyTorch's fused attention has no second derivative.
        grad.square().sum().backward()
        results.append({n: p.grad for n, p in protune_mm.tuned_parameters(backbone).items()})
    for name, grad in results[0].items():
        torch.testing.assert_close(grad, results[1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_everything_before_the_first_prompt_runs_without_a_graph():
    x = image(1, 128, 160)
    late = small(True, stages=['layer4'])
    assert [o.requires_grad for o in flat(late(x))] == [False, False, False, True]
    assert kept_bytes(late, x) < 0.5 * kept_bytes(small(True), x)
    # A loss on an unprompted feature adds nothing and breaks nothing.
    sum(o.sum() for o in flat(late(x))).backward()


CONVS = [
    nn.Conv2d(8, 12, 3, padding=1, stride=2),
    nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
    nn.Conv2d(8, 16, (1, 3), padding=(0, 1), groups=4, bias=False),
    nn.Conv2d(8, 8, 3, padding='same', padding_mode='reflect'),
    nn.Conv2d(8, 8, (3, 5), padding='same'),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode='circular'),
    nn.Conv2d(8, 8, 3, padding='valid'),
    nn.Conv2d(8, 8, 3, padding=1, padding_mode='replicate'),
    Conv2dAdaptivePadding(8, 12, 3, stride=2),
    Conv2dAdaptivePadding(8, 8, (3, 5), stride=(3, 2), dilation=2, groups=8),
]
LAYERS = [
    *CONVS,
    nn.BatchNorm2d(8),
    nn.BatchNorm2d(8, affine=False),
    _BatchNormXd(8),
    nn.GroupNorm(2, 8),
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.LeakyReLU(0.2),
    nn.Hardtanh(-0.5, 0.7),
    nn.Hardsigmoid(),
    nn.SiLU(),
    Swish(),
    nn.GELU(),
    nn.GELU(approximate='tanh'),
]


@pytest.mark.parametrize('bits', MODES)
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('layer', LAYERS, ids=str)
def test_each_layer(layer, layout, bits):
    assert lean_form(type(layer)) is not None
    torch.manual_seed(0)
    stock = copy.deepcopy(layer).double().eval().requires_grad_(False)
    for tensor in stock.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    lean = nn.Sequential(copy.deepcopy(stock))
    make_lean(lean, LeanOptions(bits))
    results = []
    for module in (stock, lean):
        torch.manual_seed(1)
        x = (torch.randn(2, 8, 7, 9) * 3).double().to(memory_format=layout).requires_grad_()
        out = module(x * 1)
        out.square().sum().backward()
        with torch.no_grad():
            again = module(x.detach() * 1)
        results.append((out.detach(), x.grad, again))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_layers_keep_what_they_promise():
    x = torch.randn(1, 8, 16, 16)
    size = x.numel()

    def kept(layer, mode):
        chain = nn.Sequential(layer).eval().requires_grad_(False)
        make_lean(chain, LeanOptions(mode))
        return kept_bytes(chain, x.clone().requires_grad_())

    assert kept(nn.Conv2d(8, 8, 3, padding=1), 'memory') == 0
    assert kept(nn.BatchNorm2d(8), 'memory') == 0
    assert kept(nn.ReLU(), 'memory') == size / 8
    assert kept(nn.ReLU6(), 'time') == size
    assert kept(nn.GELU(), 'memory') == 0  # The input, made before.
    assert kept(nn.Linear(16, 16), 'memory') == 0
    assert kept(Conv2dAdaptivePadding(8, 8, 3), 'memory') == 0
    assert kept(Swish(), 'memory') == 0


def test_synchronized_batch_norms_are_folded():
    """As the stock configs of MMSegmentation have them."""
    x = image()
    plain, synced = (small(True, norm_cfg=dict(type=kind)) for kind in ('BN', 'SyncBN'))
    assert kept_bytes(synced, x) == kept_bytes(plain, x)
    stock = small(False, norm_cfg=dict(type='SyncBN'))
    assert_same(step(stock, x), step(synced, x), 1e-5)  # float32
    # As mmengine's Runner has it in one process.
    reverted = revert_sync_batchnorm(small(True, norm_cfg=dict(type='SyncBN')))
    assert kept_bytes(reverted, x) == kept_bytes(plain, x)


@pytest.mark.parametrize(
    'more', [dict(stages='inside', prompt='principal'), dict(prompt=dict(type='ScaleShift'))]
)
def test_prompts_on_synchronized_batch_norms_stay(more):
    tuned = small(True, norm_cfg=dict(type='SyncBN'), **more)
    count = len(prompts(tuned))
    x = image()
    tuned(x)  # The first batch sets what `principal` starts from.
    before = step(tuned, x)
    tuned.zero_grad()
    reverted = revert_sync_batchnorm(tuned)
    assert len(prompts(reverted)) == count
    assert_same(before, step(reverted, x), 1e-5)  # float32


@pytest.mark.parametrize('shape', [(1,), (8,), (13,), (2, 3, 5, 7), (1, 16, 4, 4)])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_masks_pack_and_unpack(shape, layout):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)) > 0
    if len(shape) == 4:
        mask = mask.contiguous(memory_format=layout)
    packed = masks.pack(mask)
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(masks.unpack(packed, mask.shape, masks.is_channels_last(mask)), mask)
    # The form for devices without NumPy is the same, bit for bit.
    dense = mask.permute(0, 2, 3, 1) if masks.is_channels_last(mask) else mask
    flat_mask = dense.reshape(-1)
    assert torch.equal(masks._pack_words(flat_mask.view(torch.uint8)), packed)
    assert torch.equal(masks._unpack_words(packed)[: mask.numel()], flat_mask)


def test_masked_gradients_are_exact_for_infinities():
    grad = torch.tensor([float('inf'), float('nan'), -0.0, 2.0])
    mask = torch.tensor([False, False, True, True])
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        got = masks.apply_mask(grad.to(dtype), masks.pack(mask), (1.0, 0.0))
        assert torch.equal(got, torch.tensor([0.0, 0.0, -0.0, 2.0], dtype=dtype))


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_autocast(library, family, mode):
    """bfloat16 on the CPU, as AmpOptimWrapper's context is on a GPU."""
    x = image()
    exact = step(trained_like(library, family, False), x)
    errors, kept = {}, {}
    for lean in (False, mode):
        backbone = trained_like(library, family, lean)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            outputs, grads = step(backbone, x)
            kept[lean] = kept_bytes(backbone, x)
        largest = max(g.norm() for g in exact[1].values())
        errors[lean] = max((g - grads[n]).norm() / largest for n, g in exact[1].items())
        assert [o.dtype for o in outputs] == [o.dtype for o in autocast_outputs(library, family, x)]
    assert errors[mode] <= 1.5 * errors[False] + 2**-8, errors  # bfloat16's rounding
    assert kept[mode] < kept[False]


def autocast_outputs(library, family, x):
    with torch.autocast('cpu', dtype=torch.bfloat16):
        return flat(trained_like(library, family, False)(x))


def test_weights_in_the_autocast_dtype():
    x = image()
    config = dict(dtype='bfloat16')
    backbone = small(config)
    assert backbone.layer1[0].conv1.weight.dtype == torch.bfloat16
    assert backbone.layer1[0].bn1.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in protune_mm.tuned_parameters(backbone).values())
    exact = step(small(False), x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs, grads = step(backbone, x)
    # bfloat16: 8 bits, some dozens of roundings in a row.
    assert_same(exact, ([o.float() for o in outputs], grads), 0.06)


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_inference_is_the_same_and_leaves_nothing_unusable(library, family):
    x = image()
    lean = trained_like(library, family, True)
    with torch.inference_mode():
        fast = flat(lean(x))
    outputs, _ = step(lean, x)
    for a, b in zip(outputs, fast, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32


def test_shared_and_branching_convolutions_are_not_folded():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Conv2d(3, 8, 1)
            self.bn_branch = nn.BatchNorm2d(8)
            self.twice = nn.Conv2d(8, 8, 1)
            self.bn_a, self.bn_b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.fine = nn.Conv2d(8, 8, 1)
            self.bn_fine = nn.BatchNorm2d(8)

        def forward(self, x):
            y = self.branch(x)
            z = self.bn_branch(y) + y
            z = self.bn_b(self.twice(self.bn_a(self.twice(z))))
            return self.bn_fine(self.fine(z))

    torch.manual_seed(0)
    module = Branching().eval()
    for norm in norms(module):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = image()
    expected = module(x)
    protune_mm.protune(module, stages=['bn_fine'])
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)  # float32
    folded = [n for n, m in module.named_modules() if '_protune_norm' in m.__dict__]
    assert folded == ['fine']


@pytest.mark.parametrize(
    ('lean', 'message'),
    [
        ('fast', "lean.prefer='fast' is unknown: use one of memory, time"),
        (dict(bits=8), 'lean=.* is unknown: use True, False'),
        (dict(dtype='int8'), "lean.dtype='int8' is unknown"),
        (3, 'lean=3 is unknown'),
    ],
)
def test_bad_options(lean, message):
    with pytest.raises(ValueError, match=message):
        protune_mm.protune(nn.Conv2d(3, 3, 1), stages=['x'], lean=lean)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_all_memory_is_free_after_a_step_without_the_garbage_collector(library, family, mode):
    import gc

    backbone, x = trained_like(library, family, mode), image(1, 64, 64)
    flat(backbone(x))  # Values that are made once are made here.
    gc.collect()
    gc.disable()
    try:
        with Storages() as storages:
            sum(o.square().sum() for o in flat(backbone(x))).backward()
            flat(backbone(x))  # A graph that is dropped without a backward pass.
        backbone.zero_grad()
        assert storages.alive() == 0
    finally:
        gc.enable()
