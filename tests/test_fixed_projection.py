"""fixed_down=True: the first convolution is set once, never trained, and costs no kept map."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from mmdet.engine.hooks import MeanTeacherHook
from mmengine.registry import MODELS

import protune_mm
from protune_mm.checkpoints import tuned_state_dict
from protune_mm.hooks import FrozenGuardHook
from protune_mm.lean.memory import kept_bytes
from protune_mm.prompts import ProTuningBlock, pro_tuning
from protune_mm.tuned import frozen_tensors, prompts

GROUP = dict(norm_cfg=dict(type='GN', num_groups=1))
forms = pytest.mark.parametrize('options', [{}, GROUP, dict(act_cfg=None), dict(depthwise=False)])


def both(channels=8, **options):
    """A block with a fixed first convolution, and one of the same weights that trains it."""
    torch.manual_seed(0)
    trained = ProTuningBlock(channels, hidden=4, zero_init=False, **options)
    fixed = ProTuningBlock(channels, hidden=4, zero_init=False, fixed_down=True, **options)
    assert not fixed.load_state_dict(trained.state_dict()).missing_keys
    return fixed.train(), trained.train()


@forms
@pytest.mark.parametrize('lean', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_forward_and_gradient_are_those_of_the_trained_one(options, lean, layout):
    fixed, trained = (block.double() for block in both(**options))
    fixed.lean = lean
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64).to(memory_format=layout)
    grads = []
    for block in (fixed, trained):
        y = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = block(y)
        out.square().sum().backward()
        found = {
            name: p.grad for name, p in block.named_parameters() if not name.startswith('down')
        }
        grads.append({'out': out, 'x': y.grad, **found})
    assert grads[0].keys() == grads[1].keys()
    for name, got in grads[0].items():
        # float64: sums in another order only.
        torch.testing.assert_close(got, grads[1][name], rtol=1e-9, atol=1e-9)


def test_its_weights_are_no_parameters_and_keep_their_names():
    fixed, trained = both()
    assert not any(name.startswith('down') for name, _ in fixed.named_parameters())
    assert list(fixed.state_dict()) == list(trained.state_dict())
    back = ProTuningBlock(8, hidden=4)
    back.load_state_dict(fixed.state_dict())
    assert torch.equal(back.down.weight, fixed.down.weight)


@pytest.mark.parametrize('options', [dict(act_cfg=None), {}])
def test_the_map_it_reads_is_not_kept(options):
    fixed, trained = both(channels=64, **options)
    x = torch.randn(2, 64, 16, 16, requires_grad=True)
    size = x.numel() * x.element_size()
    assert kept_bytes(lambda: trained(x + 0)) > size
    # Maps of four channels in place of 64, and weights. (A leaf would not count as kept.)
    assert kept_bytes(lambda: fixed(x + 0)) < size / 4
    fixed.lean = False
    assert kept_bytes(lambda: fixed(x + 0)) > size


@pytest.mark.parametrize('fixed_down', [True, False])
def test_a_scale_keeps_nothing(fixed_down):
    kept = []
    for scale in (1.0, 0.7):
        block = ProTuningBlock(64, hidden=4, act_cfg=None, fixed_down=fixed_down, scale=scale)
        x = torch.randn(2, 64, 16, 16, requires_grad=True)
        kept.append(kept_bytes(lambda block=block, x=x: block.train()(x + 0)))
    assert kept[1] <= kept[0] + 4 * 64  # The scaled bias.


def test_a_half_precision_map_and_float32_buffers():
    # As of FSDP's mixed precision.
    fixed, trained = (block.bfloat16() for block in both())
    fixed.down.float()
    for fixed.lean in (True, False):
        x = torch.randn(2, 8, 5, 7, dtype=torch.bfloat16, requires_grad=True)
        out = fixed(x)
        out.sum().backward()
        assert x.grad.dtype == torch.bfloat16
        torch.testing.assert_close(out, trained(x))  # bfloat16


@pytest.mark.parametrize('scale', [1.0, 0.7])
def test_in_half_precision(scale):
    fixed, trained = both(scale=scale)
    x = torch.randn(2, 8, 5, 7)
    for dtype in (torch.bfloat16, torch.float32):
        outs = []
        for block in (fixed, trained):
            y = x.clone().requires_grad_()
            with torch.autocast('cpu', dtype=dtype, enabled=dtype != torch.float32):
                out = block(y)
            out.float().square().sum().backward()
            assert y.grad.dtype == torch.float32
            outs.append((out, y.grad))
        assert outs[0][0].dtype == outs[1][0].dtype == dtype
        for a, b in zip(*outs, strict=True):
            torch.testing.assert_close(a, b)  # bfloat16 or float32


def test_starts_from_the_first_batch_like_the_trained_one():
    starts = []
    for fixed_down in (False, True):
        torch.manual_seed(0)
        block = ProTuningBlock(8, hidden=4, init_mode='principal', fixed_down=fixed_down).train()
        torch.manual_seed(1)
        assert not block(torch.randn(4, 8, 5, 5) * torch.arange(1, 9).view(8, 1, 1)).any()
        starts.append(block.state_dict())
    for name, tensor in starts[0].items():
        assert torch.equal(tensor, starts[1][name]), name
    assert starts[1]['down.bias'].any()


@pytest.mark.parametrize('stages', [None, 'inside'])
def test_a_backbone_trains_the_rest_and_its_file_holds_it(stages, tmp_path):
    options = dict(stages=stages, prompt=dict(init_mode='principal', act_cfg=None, fixed_down=True))

    def build():
        torch.manual_seed(0)
        return protune_mm.protune(MODELS.build(dict(type='mmpretrain.MobileNetV2')), **options)

    tuned = build()
    tuned.train()
    x = torch.randn(2, 3, 64, 64)
    tuned(x)
    start = {name: block.down.weight.clone() for name, block in prompts(tuned).items()}
    frozen = {name: tensor.clone() for name, tensor in frozen_tensors(tuned)}
    optimizer = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(x)[-1].square().mean().backward()
        optimizer.step()
    for name, block in prompts(tuned).items():
        assert torch.equal(block.down.weight, start[name])
        assert block.up.weight.any()
        assert block.spatial.weight.grad.any()
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in frozen_tensors(tuned))
    assert not any('.down.' in name for name in protune_mm.tuned_parameters(tuned))
    state = tuned_state_dict(tuned)
    assert all(f'{name}.down.weight' in state for name in start)
    torch.save(dict(state_dict=state), tmp_path / 'tuned.pth')
    again = build()
    again.load_state_dict(torch.load(tmp_path / 'tuned.pth', weights_only=True)['state_dict'])
    copied = copy.deepcopy(tuned)
    with torch.no_grad():
        expected = tuned.eval()(x)[-1]
        assert torch.equal(again.eval()(x)[-1], expected)
        assert torch.equal(copied.eval()(x)[-1], expected)


def test_prompts_inside_blocks_keep_a_fraction():
    kept = {}
    for fixed_down in (False, True):
        torch.manual_seed(0)
        prompt = dict(hidden=8, init_mode='principal', act_cfg=None, fixed_down=fixed_down)
        tuned = protune_mm.protune(
            MODELS.build(dict(type='mmpretrain.MobileNetV2')), stages='inside', prompt=prompt
        )
        tuned.train()
        x = torch.randn(2, 3, 64, 64)
        tuned(x)
        kept[fixed_down] = kept_bytes(lambda tuned=tuned, x=x: tuned(x))
    assert kept[True] < kept[False] / 2


def test_where_the_automatic_width_counts_what_trains():
    counts = {}
    for fixed_down in (False, True):
        prompt = dict(init_mode='principal', act_cfg=None, fixed_down=fixed_down)
        stock = MODELS.build(dict(type='mmpretrain.MobileNetV2'))
        size = sum(p.numel() for p in stock.parameters())
        tuned = protune_mm.protune(stock, stages='inside', prompt=prompt)
        trains = sum(p.numel() for p in protune_mm.tuned_parameters(tuned).values())
        assert trains <= 0.08 * size
        counts[fixed_down] = sum(block.down.out_channels for block in prompts(tuned).values())
    assert counts[True] > 1.5 * counts[False]


@pytest.mark.parametrize('norm_cfg', [None, dict(type='BN')])
def test_stock_weights_still_load_strictly(norm_cfg):
    stock = MODELS.build(dict(type='mmpretrain.ResNet', depth=18))
    tuned = protune_mm.protune(
        MODELS.build(dict(type='mmpretrain.ResNet', depth=18)),
        prompt=dict(hidden=4, fixed_down=True, norm_cfg=norm_cfg),
    )
    tuned.load_state_dict(stock.state_dict())


def test_a_batch_that_shows_too_little_is_told(monkeypatch):
    told = []
    monkeypatch.setattr(pro_tuning, 'print_log', lambda message, **_: told.append(message))
    options = dict(hidden=4, init_mode='principal', fixed_down=True)
    ProTuningBlock(8, **options).train()(torch.randn(4, 8, 3, 3))
    assert not told
    block = ProTuningBlock(8, **options).train()
    block(torch.randn(1, 8, 1, 3))
    assert 'shows 2 directions for the 4 hidden channels' in told[0]
    assert torch.isfinite(block.down.weight).all()


@pytest.mark.parametrize('skip_buffer', [True, False])
def test_a_mean_teacher_gets_the_start_of_its_student(skip_buffer):
    options = dict(prompt=dict(hidden=4, init_mode='principal', fixed_down=True))
    model = torch.nn.Module()
    for seed, name in enumerate(('student', 'teacher')):
        torch.manual_seed(seed)
        backbone = MODELS.build(dict(type='mmpretrain.ResNet', depth=18))
        setattr(model, name, protune_mm.protune(backbone, **options))
    model.teacher.requires_grad_(False).eval()
    model.student.train()
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 1.0)
    runner = SimpleNamespace(model=model, logger=logging.getLogger(), iter=0)
    hooks = [MeanTeacherHook(skip_buffer=skip_buffer), FrozenGuardHook()]
    runner.hooks = hooks
    for hook in hooks:
        hook.before_train(runner)
    for runner.iter in range(2):
        model.student(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        optimizer.step()
        for hook in hooks:
            hook.after_train_iter(runner, 0)
    followers = prompts(model.teacher)
    for name, block in prompts(model.student).items():
        for key in ('weight', 'bias'):
            # float32: averages of a tensor with itself, at most.
            torch.testing.assert_close(getattr(followers[name].down, key), getattr(block.down, key))
        assert block.down.bias.any()
        assert followers[name].up.weight.any()


def test_large_maps_in_float32():
    # oneDNN multiplies these.
    fixed, trained = both(channels=64)
    x = torch.randn(4, 64, 128, 128).to(memory_format=torch.channels_last)
    outs = []
    for block in (fixed, trained):
        y = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = block(y)
        out.square().mean().backward()
        outs.append((out, y.grad, block.up.weight.grad))
    for a, b in zip(*outs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()  # float32


def test_gradients_of_gradients():
    fixed = both()[0].double()
    x = torch.randn(1, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(fixed, x)


@pytest.mark.parametrize('value', [None, 0, 'no'])
def test_what_is_neither_true_nor_false_is_an_error(value):
    with pytest.raises(TypeError, match=f'fixed_down={value!r} is neither True nor False'):
        ProTuningBlock(16, fixed_down=value)
