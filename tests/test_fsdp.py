"""A training whose weights FSDP splits between processes is the same training."""

import copy
import logging
import os
import shutil
import signal
import time

import pytest
import torch
from mmengine.registry import MODELS

import protune_mm
from protune_mm.registry import RUNNERS
from protune_mm.sharded import ProTuneFSDPStrategy, frozen_units, twin_of
from protune_mm.tuned import backbones, frozen_keys, prompts, whole_name
from tests.conftest import run_tool
from tests.processes import PLAIN, assert_same, dist, finish, weights


@pytest.fixture(scope='module')
def config(distributed):
    path = distributed(1)
    child = path.parent / 'fsdp.py'
    child.write_text(
        f"_base_ = ['{path.name}']\n"
        "runner_type = 'protune_mm.ProTuneFlexibleRunner'\n"
        "strategy = dict(type='protune_mm.ProTuneFSDPStrategy', min_size=10000)\n"
    )
    return child


@pytest.fixture(scope='module')
def split(config, tmp_path_factory):
    """Work folder and output of a training of two processes."""
    work = tmp_path_factory.mktemp('split')
    return work, finish(dist('dist_train', config, 2, '--work-dir', work, *PLAIN))


def test_it_is_the_same_training(split, two):
    work, text = split
    assert 'Pro-tuning: backbone frozen 11,176,512, prompts' in text
    assert 'the frozen tensors are bit-identical to the start' in text
    assert_same(weights(work), weights(two), rtol=1e-5, atol=1e-6)


def test_the_file_is_that_of_a_training_without_fsdp(split, two, distributed, tmp_path):
    """No frozen weight; any tool loads it."""
    files = [sorted(folder.glob('epoch_2.pth'))[0] for folder in (split[0], two)]
    sizes = [path.stat().st_size for path in files]
    assert sizes[0] < 1.1 * sizes[1]
    out = tmp_path / 'metrics.json'
    run_tool(
        'tools/test.py', distributed(1), files[0], '--work-dir', tmp_path, *PLAIN, '--out', out
    )
    assert 'accuracy/top1' in out.read_text()


def test_resumed_is_as_never_stopped(split, config, tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    shutil.copy(split[0] / 'epoch_1.pth', work)
    finish(dist('dist_train', config, 2, '--work-dir', work, *PLAIN, '--resume'))
    assert_same(weights(work), weights(split[0]), rtol=0, atol=0)
    for name in ('epoch_1.pth', 'epoch_2.pth'):
        assert (work / name).exists()


def test_a_signal_stops_and_saves(config, tmp_path):
    more = ['--cfg-options', 'train_cfg.max_epochs=200']
    program = dist('dist_train', config, 2, '--work-dir', tmp_path, *PLAIN, *more)
    end = time.monotonic() + 200
    while not list(tmp_path.glob('epoch_*.pth')) and program.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    os.kill(program.pid, signal.SIGTERM)
    text = finish(program, status=None)
    (saved,) = tmp_path.glob('preempted_*.pth')
    meta = torch.load(saved, weights_only=True)['meta']
    assert f'stopped after step {meta["iter"]};' in text
    assert meta['epoch'] == meta['iter'] // 3


def test_the_best_checkpoint_and_pictures(config, tmp_path):
    """A second save of an epoch is of the same epoch; prompts are drawn."""
    child = config.with_name('best.py')
    child.write_text(
        f"_base_ = ['{config.name}']\n"
        'train_cfg = dict(max_epochs=1, val_interval=1)\n'
        "default_hooks = dict(checkpoint=dict(save_best='accuracy/top1'))\n"
        "custom_hooks = [dict(type='protune_mm.PromptVisualizationHook', images=1)]\n"
    )
    text = finish(dist('dist_train', child, 2, '--work-dir', tmp_path, *PLAIN))
    meta = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['meta']
    assert (meta['epoch'], meta['iter']) == (1, 3)
    assert list(tmp_path.glob('best_*.pth'))
    assert len(list(tmp_path.glob('*/vis_data/vis_image/prompts_0*.png'))) == 1
    assert 'nothing is drawn' not in text


def test_another_number_of_classes_is_a_start(two, config, tmp_path):
    """What does not fit is logged and left out, as mmengine does."""
    start = torch.load(two / 'epoch_2.pth', weights_only=True)
    state = {f'module.{k}': v for k, v in start['state_dict'].items()}
    state['module.head.fc.weight'] = torch.zeros(7, 512)
    torch.save(dict(start, state_dict=state), tmp_path / 'start.pth')
    more = ['--cfg-options', f'load_from={tmp_path / "start.pth"}', 'optim_wrapper.optimizer.lr=0']
    work = tmp_path / 'work'
    text = finish(
        dist('dist_train', config, 2, '--work-dir', work, *PLAIN, *more, 'train_cfg.max_epochs=1')
    )
    assert 'size mismatch for head.fc.weight: (7, 512), here (2, 512)' in text
    found, expected = weights(work), dict(weights(two))
    found.pop('head.fc.weight')
    expected.pop('head.fc.weight')
    assert_same(found, expected, rtol=0, atol=0)


def test_weights_of_another_training_are_a_start(two, config, tmp_path):
    start = f'load_from={two / "epoch_2.pth"}'
    more = ['--cfg-options', start, 'optim_wrapper.optimizer.lr=0', 'train_cfg.max_epochs=1']
    finish(dist('dist_train', config, 2, '--work-dir', tmp_path, *PLAIN, *more))
    assert_same(weights(tmp_path), weights(two), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['model.backbone.prompt.ratio=2'], 'prompt.ratio'),
        (['model.backbone.init_cfg=None'], "'backbone' has no pre-trained weights when FSDP"),
    ],
)
def test_what_does_not_fit_is_an_error(two, config, tmp_path, options, message):
    more = ['--cfg-options', f'load_from={two / "epoch_2.pth"}', *options]
    text = finish(dist('dist_train', config, 2, '--work-dir', tmp_path, *PLAIN, *more), status=1)
    assert 'error: ' in text
    assert message in text


def classifier():
    cfg = protune_mm.load_config('mmpretrain::resnet/resnet18_8xb32_in1k.py', protune=True)
    return MODELS.build(cfg.model)


def test_no_unit_has_frozen_and_trained_weights():
    model = classifier()
    units = list(frozen_units(model, 10_000))
    inside = {id(unit): unit for unit in units}
    for unit in units:
        own, todo = [], [unit]
        while todo:
            module = todo.pop()
            own += module.parameters(recurse=False)
            todo += [child for child in module.children() if id(child) not in inside]
        assert len({p.requires_grad for p in own}) <= 1, type(unit)
    for prompt in prompts(model).values():
        assert id(prompt) in inside


def test_the_twin_knows_all_but_the_data():
    model = classifier()
    backbones(model)['backbone']._protune.loads.given = True
    state = copy.deepcopy(model.state_dict())
    twin = twin_of(model)
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    assert frozen_keys(twin) == frozen_keys(model)
    assert twin.backbone.protune_fingerprint() == model.backbone.protune_fingerprint()
    assert_same(model.state_dict(), state, rtol=0, atol=0)


def test_names():
    assert whole_name('_fsdp_wrapped_module.a._fsdp_wrapped_module.b') == 'a.b'
    assert whole_name('a._fsdp_wrapped_module') == 'a'


def test_bad_configs():
    cfg = protune_mm.load_config('mmpretrain::resnet/resnet18_8xb32_in1k.py', protune=True)
    cfg.runner_type = 'protune_mm.ProTuneFlexibleRunner'
    with pytest.raises(ValueError, match=r'start it with tools/dist_train\.sh'):
        RUNNERS.build(cfg)
    cfg.launcher = 'pytorch'
    cfg.model.backbone.policy = 'bias'
    with pytest.raises(ValueError, match="policy='bias' trains single parameters"):
        RUNNERS.build(cfg)
    cfg.model.backbone.policy = 'prompts'
    for strategy in (dict(type='DDPStrategy'), 'DeepSpeedStrategy'):
        cfg.strategy = strategy
        with pytest.raises(ValueError, match=r"under 'protune_mm\.ProTuneFSDPStrategy' alone"):
            RUNNERS.build(cfg)
    cfg.activation_checkpointing = ['backbone']
    with pytest.raises(ValueError, match='use with_cp=True'):
        RUNNERS.build(cfg)
    cfg.custom_hooks = [dict(type='EMAHook')]
    with pytest.raises(ValueError, match='an EMAHook cannot average'):
        RUNNERS.build(cfg)
    with pytest.raises(ValueError, match="one file, state_dict_cfg='full'"):
        ProTuneFSDPStrategy(state_dict_cfg='local')


def test_prompts_that_wait_for_data_start_at_random(caplog):
    model = MODELS.build(dict(type='mmpretrain.ResNet', depth=18))
    protune_mm.protune(model, prompt=dict(hidden=4, init_mode='principal'))
    strategy = object.__new__(ProTuneFSDPStrategy)
    strategy.logger = logging.getLogger('fsdp')
    strategy._start_without_data(model)
    assert not any(prompt.waits for prompt in prompts(model).values())
    assert 'needs whole weights in the first step' in caplog.text
    for prompt in prompts(model).values():
        center = prompt.spatial.weight[:, :, 2, 2]
        assert torch.equal(center, torch.ones_like(center))
    caplog.clear()
    strategy._start_without_data(model)
    assert not caplog.text


def test_a_first_convolution_that_stays_starts_from_the_first_batch(config, distributed, tmp_path):
    works = []
    for base in (config, distributed(1)):
        child = base.with_name(f'fixed_{base.name}')
        prompt = "dict(init_mode='principal', act_cfg=None, fixed_down=True, scale=0.7, hidden=8)"
        child.write_text(
            f"_base_ = ['{base.name}']\nmodel = dict(backbone=dict(prompt={prompt}))\n"
        )
        works.append(tmp_path / base.stem)
        text = finish(dist('dist_train', child, 2, '--work-dir', works[-1], *PLAIN))
        assert 'needs whole weights in the first step' not in text
    found, expected = (weights(work) for work in works)
    biases = [tensor for name, tensor in expected.items() if name.endswith('prompt.down.bias')]
    # At random it is zero.
    assert len(biases) == 4
    assert all(bias.any() for bias in biases)
    # float32 sums in another order, enlarged by where directions are nearly alike.
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
