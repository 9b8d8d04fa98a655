"""init_mode='principal': the prompt starts from the principal directions of what it reads."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.prompts import ProTuningBlock
from protune_mm.prompts.convs import fixed_layers
from protune_mm.tuned import prompts
from tests.processes import ROOT, environment


def block(channels=12, **options):
    torch.manual_seed(0)
    return ProTuningBlock(channels, hidden=4, init_mode='principal', **options).train()


def batch(channels=12, count=4):
    """Pixels that differ most in a few directions, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(channels, channels, generator=generator)
    x = torch.randn(count, channels, 5, 7, generator=generator)
    return torch.einsum('oi,bihw->bohw', mixed, x) + 3


@pytest.mark.parametrize('depthwise', [True, False])
def test_projects_on_what_an_eigendecomposition_gives(depthwise):
    prompt, x = block(depthwise=depthwise), batch()
    assert prompt(x).abs().max() == 0, 'the prompt starts at zero'
    pixels = x.movedim(1, -1).reshape(-1, 12).double().numpy()
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    values, vectors = values[::-1][:4], vectors.T[::-1][:4]
    found = prompt.down.weight.detach()[:, :, 0, 0].double().numpy()
    along = np.abs((found * vectors).sum(1)) / np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(along, 1, atol=1e-4)  # Signs are free; float32.
    hidden = prompt.spatial(prompt.down(x))
    torch.testing.assert_close(hidden, prompt.down(x), msg='the second one is the identity')
    torch.testing.assert_close(hidden.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    assert float(hidden.detach().square().mean()) == pytest.approx(1, abs=1e-3)
    sizes = hidden.square().mean((0, 2, 3)).detach().numpy()
    np.testing.assert_allclose(sizes / sizes.sum(), values / values.sum(), atol=1e-4)


def test_only_the_first_training_batch_counts():
    prompt = block()
    before = prompt.down.weight.clone()
    prompt.eval()(batch())
    assert torch.equal(prompt.down.weight, before)
    prompt.train()(batch())
    first = prompt.down.weight.clone()
    assert not torch.equal(first, before)
    prompt(batch() * torch.randn(12, 1, 1))
    assert torch.equal(prompt.down.weight, first)
    prompt.init_weights()
    assert prompt.waits


def test_prompts_that_were_trained_stay():
    trained = block()
    trained(batch())
    nn.init.normal_(trained.up.weight)
    resumed = block()
    resumed.load_state_dict(trained.state_dict())
    kept = copy.deepcopy(resumed.state_dict())
    resumed(batch() * torch.randn(12, 1, 1))
    for name, tensor in resumed.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_draws_no_random_numbers():
    prompt, state = block(), torch.get_rng_state()
    prompt(batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_that_shows_too_little_still_starts():
    prompt = block()
    prompt(batch()[:1, :, :1, :2]).sum().backward()
    assert torch.isfinite(prompt.down.weight).all()
    assert prompt.down.weight.flatten(1).abs().sum(1).min() > 0, 'no hidden channel is dead'
    assert prompt.up.bias.grad.abs().min() > 0


@pytest.mark.parametrize(
    'x',
    [
        torch.zeros(2, 12, 3, 3),
        torch.full((2, 12, 3, 3), torch.inf),
        batch()[:1, :, :1, :1],
        # What differs is rounding alone.
        3.3 + 1e-6 * batch(),
    ],
)
def test_a_batch_that_shows_nothing_is_not_the_first(x, log):
    """A look at shapes before the training, or an overflow in half precision."""
    torch.manual_seed(0)
    once, later = block(), block()
    later.load_state_dict(once.state_dict())
    out = later(x)
    assert 'it waits for the next one' in log.text
    if not x.any():  # Nothing but the bias at the end has learned from it.
        out.sum().backward()
        torch.optim.SGD(later.parameters(), 0.1).step()
        assert later.up.bias.any()
    for prompt in (once, later):
        prompt(batch())
        assert not prompt.waits
    assert torch.equal(once.down.weight, later.down.weight)


def test_half_precision():
    prompt = block()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert prompt(batch().bfloat16()).abs().max() == 0
    assert prompt.down.weight.dtype == torch.float32
    low = block().bfloat16()
    low(batch().bfloat16())
    assert low.down.weight.dtype == torch.bfloat16
    assert not low.waits


def test_a_start_that_is_not_zero_is_an_error():
    with pytest.raises(ValueError, match="init_mode='principal' needs a start at zero"):
        ProTuningBlock(8, init_mode='principal', zero_init=False)


@pytest.mark.parametrize(
    'prompt', [dict(hidden=4, init_mode='principal'), 'principal', 'principal-trained']
)
@pytest.mark.parametrize('stages', [None, 'blocks', 'inside'])
def test_a_backbone_starts_exactly_as_stock(stages, prompt):
    torch.manual_seed(0)
    stock = MODELS.build(dict(type='mmpretrain.MobileNetV2', out_indices=(2, 7)))
    stock.eval()
    tuned = protune_mm.protune(
        copy.deepcopy(stock),
        stages=stages,
        prompt=prompt,
        lean=False,
    )
    assert all(block.waits for block in prompts(tuned).values())
    tuned.train()
    x = torch.randn(2, 3, 64, 64)
    for out, same in zip(tuned(x), stock(x), strict=True):
        torch.testing.assert_close(out, same, rtol=0, atol=0)
    assert not any(prompt.waits for prompt in prompts(tuned).values())


@pytest.mark.parametrize(
    'base',
    [
        dict(type='mmpretrain.MobileNetV2'),
        dict(type='mmpretrain.ConvNeXt'),
        dict(type='mmpretrain.VisionTransformer', arch='deit-s', img_size=32, patch_size=8),
    ],
)
@pytest.mark.parametrize('fixed', [True, False])
def test_the_form_with_a_name_is_small_inside_blocks(base, fixed):
    name = 'principal' if fixed else 'principal-trained'
    tuned = protune_mm.protune(MODELS.build(base), stages='inside', prompt=name)
    blocks = prompts(tuned).values()
    assert all(isinstance(block.act1, torch.nn.Identity) for block in blocks)
    assert all(bool(fixed_layers(block)) == fixed for block in blocks)
    own = sum(p.numel() for block in blocks for p in block.parameters())
    frozen = sum(p.numel() for p in tuned.parameters()) - own
    assert 0.03 * frozen < own <= 0.08 * frozen
    # Who spells it out, with the default type, gets as much.
    for kind in ('ProTuningBlock', 'protune_mm.ProTuningBlock', ProTuningBlock):
        spelled = dict(type=kind, init_mode='principal', act_cfg=None, fixed_down=fixed)
        again = prompts(protune_mm.protune(MODELS.build(base), stages='inside', prompt=spelled))
        assert own == sum(p.numel() for block in again.values() for p in block.parameters())


TWO = """
import torch, torch.distributed as dist
from protune_mm.prompts import ProTuningBlock
from protune_mm.prompts.pro_tuning import some_pixels
dist.init_process_group('gloo')
rank = dist.get_rank()
torch.manual_seed(rank)
prompt = ProTuningBlock(6, hidden=2, init_mode='principal', fixed_down=FIXED).train()
prompt.to(memory_format=torch.channels_last)  # The weights are not contiguous then.
x = torch.randn(2, 6, 4, 4)
alone = ProTuningBlock(6, hidden=2, init_mode='principal')
with torch.no_grad():
    alone._project_on_principal(some_pixels(x))
prompt(x)
all_ = [torch.empty_like(prompt.down.weight) for _ in range(2)]
dist.all_gather(all_, prompt.down.weight.detach())
assert torch.equal(*all_)
assert torch.equal(prompt.down.weight, alone.down.weight) == (rank == 0)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize('fixed', [False, True])
def test_all_processes_start_as_the_first(tmp_path, fixed):
    script = tmp_path / 'two.py'
    script.write_text(TWO.replace('FIXED', str(fixed)))
    env = environment(PYTHONPATH=str(ROOT))
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
               f'--master_port={env["PORT"]}', str(script)]  # fmt: skip
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
