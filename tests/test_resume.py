"""A training that was stopped and resumed is bit-identical to one that was not."""

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.utils import ManagerMixin

import protune_mm
from protune_mm import cli
from protune_mm.files import SafeCheckpointHook, last_good_checkpoint, safe_hook
from protune_mm.resume import SIGNALS, PreemptionHook
from protune_mm.tuned import frozen_keys, frozen_tensors
from tests.conftest import CLS

RANDOM = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=32),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackInputs'),
]
EPOCHS = dict(type='EpochBasedTrainLoop', max_epochs=3, val_interval=1)
ITERS = dict(type='IterBasedTrainLoop', max_iters=9, val_interval=2)
EMA = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)
DRIFTING = dict(type='EMAHook', ema_type='mmdet.ExpMomentumEMA', momentum=0.1, update_buffers=True)


class StopHook(Hook):
    """Die, or send a signal to this process, after some steps."""

    priority = 'LOWEST'

    def __init__(self, after, number=None):
        self.after, self.number = after, number

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.after:
            if self.number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    torch.manual_seed(0)
    stock = protune_mm.load_config('mmpretrain::resnet/resnet18_8xb32_in1k.py').model.backbone
    from mmengine.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        backbone = MODELS.build(stock)
    path = tmp_path_factory.mktemp('base') / 'resnet18.pth'
    torch.save(backbone.state_dict(), path)
    return path


def config(pictures, base, work, loop, hooks=(), workers=0, **more):
    path = Path(work) / 'config.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(CLS.format(root=str(pictures / 'classes')))
    by_epoch = 'max_epochs' in loop
    options = {
        'train_dataloader.dataset.pipeline': RANDOM,
        'train_dataloader.num_workers': workers,
        'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(base)),
        'model.head.type': 'LinearClsHead',
        'optim_wrapper.optimizer': dict(type='AdamW', lr=1e-2, weight_decay=0.05, _delete_=True),
        'default_hooks.checkpoint': dict(interval=1 if by_epoch else 2, by_epoch=by_epoch),
        'randomness': dict(seed=1),
        'work_dir': str(work),
        **more,
    }
    cfg = protune_mm.load_config(str(path), cfg_options=options)
    cfg.train_cfg = dict(loop)
    if not by_epoch:
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    # Schedules that a resumed training has to find again.
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=9)]
    cfg.custom_hooks = [dict(hook) for hook in hooks]
    cfg.model.neck = [dict(type='GlobalAveragePooling')]
    cfg.model.head.init_cfg = dict(type='Normal', layer='Linear', std=0.01)

    cli.set_dataloader_defaults(
        cfg, argparse.Namespace(no_pin_memory=True, no_persistent_workers=True)
    )
    return cfg


@pytest.fixture(autouse=True)
def forget_afterwards():
    yield
    forget_runs()


def forget_runs():
    """mmengine keeps what belongs to every experiment of a process."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    managers = [ManagerMixin]
    for manager in managers:
        managers += manager.__subclasses__()
        manager._instance_dict.clear()


def train(cfg, stop=None, resume=False):
    """Train in this process, as a new one would; the exit status, or None."""
    forget_runs()
    cfg.resume = resume
    torch.manual_seed(hash(resume))  # What a new process starts with is of no matter.
    # The runner formats its config for its log five times, which takes seconds.
    with mock.patch('mmengine.config.config.FormatCode', lambda text, **_: (text, True)):
        return run(cfg, stop)


def run(cfg, stop):
    runner = cli.build_runner(cfg)
    if stop is not None:
        runner.register_hook(stop)
    try:
        runner.train()
    except KeyboardInterrupt:
        return 'killed'
    except SystemExit as end:
        return end.code
    return None


def newest(work):
    files = [p for p in Path(work).glob('*.pth') if not p.name.startswith('best')]
    return torch.load(max(files, key=lambda p: p.stat().st_mtime_ns), weights_only=True)


def differing(a, b, at=''):
    """Names of all places where two nested values differ, log history and times aside."""
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f'{at}: {sorted(map(str, a.keys() ^ b.keys()))}']
        return [d for key in a for d in differing(a[key], b[key], f'{at}.{key}')]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [at]
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differing(x, y, f'{at}[{i}]')
        ]
    equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if equal else [at]


PARTS = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'protune_mm')
CASES = {
    'between epochs': (EPOCHS, StopHook(4), 'killed'),
    'signal in an epoch': (EPOCHS, StopHook(5, signal.SIGTERM), 143),
    'signal at the end of an epoch': (EPOCHS, StopHook(6, signal.SIGUSR1), 138),
    'iterations': (ITERS, StopHook(5), 'killed'),
    'signal between iterations': (ITERS, StopHook(5, signal.SIGTERM), 143),
}


@pytest.mark.parametrize('hooks', [(), (EMA,), (DRIFTING,)], ids=['plain', 'ema', 'drifting-ema'])
@pytest.mark.parametrize('case', CASES)
def test_resumed_is_bit_identical(case, hooks, pictures, base, tmp_path):
    loop, stop, code = CASES[case]
    assert train(config(pictures, base, tmp_path / 'whole', loop, hooks)) is None
    assert train(config(pictures, base, tmp_path / 'parts', loop, hooks), stop) == code
    assert train(config(pictures, base, tmp_path / 'parts', loop, hooks), resume=True) is None
    whole, parts = newest(tmp_path / 'whole'), newest(tmp_path / 'parts')
    assert whole['meta']['iter'] == parts['meta']['iter'] > 5
    for part in PARTS:
        assert (part in whole) == (part in parts)
        assert differing(whole.get(part), parts.get(part), part) == []
    # The steps after the stop did something.
    assert ('ema_state_dict' in whole) == bool(hooks)


@pytest.mark.parametrize('loop', [EPOCHS, ITERS], ids=['epochs', 'iterations'])
def test_with_data_workers(loop, pictures, base, tmp_path):
    assert train(config(pictures, base, tmp_path / 'whole', loop, workers=1)) is None
    stop = StopHook(5, signal.SIGTERM)
    assert train(config(pictures, base, tmp_path / 'parts', loop, workers=1), stop) == 143
    assert train(config(pictures, base, tmp_path / 'parts', loop, workers=1), resume=True) is None
    whole, parts = newest(tmp_path / 'whole'), newest(tmp_path / 'parts')
    for part in ('state_dict', 'optimizer'):
        assert differing(whole[part], parts[part], part) == []


def tensors(value):
    """All tensors somewhere inside nested values."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from tensors(child)


@pytest.mark.parametrize('hooks', [(), (EMA,)], ids=['plain', 'ema'])
def test_no_frozen_weight_is_in_the_file(hooks, pictures, base, tmp_path):
    cfg = config(pictures, base, tmp_path, EPOCHS, hooks)
    train(cfg)
    forget_runs()
    model = cli.build_runner(cfg).model
    model.init_weights()
    frozen = {n: t for n, t in frozen_tensors(model) if t.is_floating_point()}
    saved = newest(tmp_path)
    assert not [k for k in saved['state_dict'] if k in frozen_keys(model)]
    assert not [k for k in saved.get('ema_state_dict', {}) if k[7:] in frozen_keys(model)]
    # Nor anywhere else, under another name.
    assert not {t.numpy().tobytes() for t in tensors(saved)} & {
        t.numpy().tobytes() for t in frozen.values() if t.numel() > 1
    }
    whole = sum(t.numel() * 4 for t in frozen.values())
    assert max(p.stat().st_size for p in tmp_path.glob('*.pth')) < whole / 2


def test_the_switch_keeps_the_whole_model(pictures, base, tmp_path):
    hook = dict(type='protune_mm.TunedCheckpointHook', tuned_only=False)
    train(config(pictures, base, tmp_path, EPOCHS, [hook]))
    assert 'backbone.layer1.0.conv1.weight' in newest(tmp_path)['state_dict']


def test_a_base_that_came_from_no_file_stays_in_the_file(pictures, base, tmp_path):
    cfg = config(pictures, base, tmp_path, EPOCHS)
    cfg.model.backbone.init_cfg = None
    train(cfg)
    assert 'backbone.layer1.0.conv1.weight' in newest(tmp_path)['state_dict']
    assert train(cfg, resume=True) is None


def test_a_changed_trainable_set_is_one_error(pictures, base, tmp_path):
    train(config(pictures, base, tmp_path, EPOCHS), StopHook(4))
    cfg = config(pictures, base, tmp_path, EPOCHS)
    cfg.model.neck = [dict(type='GeneralizedMeanPooling')]
    with pytest.raises(ValueError, match=r'1 train now, first neck.*p: resume with the config'):
        train(cfg, resume=True)


def test_no_checkpoint_starts_anew(pictures, base, tmp_path):
    assert train(config(pictures, base, tmp_path, EPOCHS), resume=True) is None
    assert newest(tmp_path)['meta']['epoch'] == 3


def test_the_last_good_checkpoint_is_found(pictures, base, tmp_path):
    """Killed in the middle of everything: the newest file is cut, the pointer is empty."""
    train(config(pictures, base, tmp_path, EPOCHS), StopHook(7))
    last = tmp_path / 'epoch_2.pth'
    last.write_bytes(last.read_bytes()[:1000])
    (tmp_path / 'last_checkpoint').write_text('')
    (tmp_path / '.epoch_3.pth.partial').write_bytes(b'PK')
    assert train(config(pictures, base, tmp_path, EPOCHS), resume=True) is None
    train(config(pictures, base, tmp_path / 'whole', EPOCHS))
    for part in ('state_dict', 'optimizer'):
        assert differing(newest(tmp_path)[part], newest(tmp_path / 'whole')[part], part) == []


def test_a_base_that_is_of_a_file_in_part_stays_in_the_file(pictures, base, tmp_path):
    cfg = config(pictures, base, tmp_path, EPOCHS)
    state = torch.load(base, weights_only=True)
    torch.save({k: v for k, v in state.items() if 'layer4' not in k}, tmp_path / 'part.pth')
    cfg.model.backbone.init_cfg.checkpoint = str(tmp_path / 'part.pth')
    cfg.model.backbone.require_weights = False
    train(cfg, StopHook(7))
    assert train(cfg, resume=True) is None
    assert 'backbone.layer4.0.conv1.weight' in newest(tmp_path)['state_dict']


def test_which_checkpoint_is_the_last(tmp_path):
    def write(*names):
        for i, name in enumerate(names):
            torch.save(dict(state_dict={}), tmp_path / name)
            os.utime(tmp_path / name, (1000 + i, 1000 + i))

    def last():
        return Path(last_good_checkpoint(str(tmp_path))).name

    # A copied folder: the times tell nothing.
    write('epoch_12.pth', 'epoch_2.pth', 'epoch_10.pth')
    for noted in (tmp_path, tmp_path.parent / 'elsewhere'):
        (tmp_path / 'last_checkpoint').write_text(str(noted / 'epoch_12.pth'))
        assert last() == 'epoch_12.pth'
    # A crash came before the note; a training that began anew in the folder of another.
    write('epoch_12.pth', 'epoch_13.pth')
    assert last() == 'epoch_13.pth'
    write('epoch_12.pth', 'epoch_13.pth', 'epoch_1.pth', 'epoch_2.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert last() == 'epoch_2.pth'
    # What a signal had written is later, also than one that lies elsewhere.
    write('preempted_iter_7.pth')
    assert last() == 'preempted_iter_7.pth'
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_2.pth')
    assert last() == 'preempted_iter_7.pth'
    (tmp_path / 'preempted_iter_7.pth').unlink()
    assert last_good_checkpoint(str(tmp_path)) == 's3://bucket/epoch_2.pth'
    # Without a note, or with one of a file that is gone, the newest by time.
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_20.pth'))
    assert last() == 'epoch_2.pth'


def test_names_and_folders_of_ones_own(tmp_path, caplog):
    folder = tmp_path / 'elsewhere'
    folder.mkdir()
    names = ('model_1.pth', 'model_2.pth', 'best_1.pth', 'model_2_ema.pth')
    for name in names:
        torch.save(dict(state_dict={}), folder / name)
    (tmp_path / 'last_checkpoint').write_text(str(folder / 'model_3.pth'))
    (folder / 'model_3.pth').write_bytes((folder / 'model_2.pth').read_bytes()[:-9])
    os.utime(folder / 'model_1.pth', (1000, 1000))
    assert last_good_checkpoint(str(tmp_path)) == str(folder / 'model_2.pth')


def test_a_checkpoint_hook_under_any_name_is_the_safe_one():
    from mmengine.hooks import CheckpointHook

    class Mine(CheckpointHook):
        def _save_checkpoint(self, runner):
            return 'mine'

    for name in ('CheckpointHook', 'mmengine.CheckpointHook', 'mmengine.hooks.CheckpointHook',
                 CheckpointHook):  # fmt: skip
        assert safe_hook(name) is SafeCheckpointHook
    made = safe_hook(Mine)(interval=1)
    assert isinstance(made, SafeCheckpointHook)
    assert isinstance(made, Mine)
    assert made._save_checkpoint(None) == 'mine'
    assert safe_hook(type(made)) is type(made)
    assert safe_hook('EMAHook') == 'EMAHook'


def test_other_files_in_the_folder_are_not_resumed(pictures, base, tmp_path):
    train(config(pictures, base, tmp_path, EPOCHS), StopHook(4))
    torch.save(dict(state_dict={}), tmp_path / 'exported.pth')
    assert train(config(pictures, base, tmp_path, EPOCHS), resume=True) is None


def test_one_name_for_all_checkpoints(pictures, base, tmp_path):
    cfg = config(pictures, base, tmp_path, EPOCHS)
    cfg.default_hooks.checkpoint.update(filename_tmpl='latest.pth', max_keep_ckpts=1)
    train(cfg)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['latest.pth']


def test_a_signal_to_the_whole_group_ends_no_worker(pictures, base, tmp_path):
    class Signal(StopHook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == self.after:
                group = [os.getpid(), *(c.pid for c in multiprocessing.active_children())]
                subprocess.run(['kill', *map(str, group)], check=True)

    cfg = config(pictures, base, tmp_path, EPOCHS, workers=1)
    assert train(cfg, Signal(4)) == 143
    # The hook that listens had run in that step already.
    assert newest(tmp_path)['meta']['iter'] == 5


def test_the_training_ends_its_workers(pictures, base, tmp_path):
    """An interpreter that exits waits for them."""
    ended = []

    class Fail(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            for worker in multiprocessing.active_children():
                worker.terminate()
                worker.join(30)
                ended.append(worker.exitcode)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(config(pictures, base, tmp_path, EPOCHS, workers=2), Fail())
    assert ended == [0, 0]


def test_an_error_gives_the_signals_back(pictures, base, tmp_path):
    class Fail(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            assert signal.getsignal(signal.SIGTERM) != before[0]
            raise ZeroDivisionError

    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(ZeroDivisionError):
        train(config(pictures, base, tmp_path, EPOCHS), Fail())
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_validation_workers_go_on_too(pictures, base, tmp_path):
    """Persistent ones are there while the training goes on."""
    cfg = config(pictures, base, tmp_path, EPOCHS, workers=1)
    cfg.val_dataloader.update(num_workers=1, persistent_workers=True)

    class Signal(StopHook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter + 1 == self.after:
                group = [os.getpid(), *(c.pid for c in multiprocessing.active_children())]
                assert len(group) == 3
                subprocess.run(['kill', *map(str, group)], check=True)

    assert train(cfg, Signal(4)) == 143
    assert newest(tmp_path)['meta']['iter'] == 5


def test_a_second_signal_ends_the_process(monkeypatch):
    """A cluster and torchrun send the first one twice."""
    hook, killed = PreemptionHook(), []
    monkeypatch.setattr(signal, 'signal', lambda number, handler: killed.append(handler))
    monkeypatch.setattr(os, 'kill', lambda pid, number: killed.append(number))
    hook._note(signal.SIGTERM, None)
    hook._note(signal.SIGTERM, None)
    assert killed == []
    hook._since -= 6
    hook._note(signal.SIGTERM, None)
    assert killed == [signal.SIG_DFL, signal.SIGTERM]


def test_a_full_disk_leaves_the_old_checkpoint(pictures, base, tmp_path, monkeypatch):
    from mmengine.fileio.backends import LocalBackend

    put = LocalBackend.put

    def full(self, obj, filepath):
        if 'epoch_2' in str(filepath):
            put(self, obj[: len(obj) // 2], filepath)
            raise OSError(28, 'No space left on device')
        put(self, obj, filepath)

    monkeypatch.setattr(LocalBackend, 'put', full)
    cfg = config(pictures, base, tmp_path, EPOCHS)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    with pytest.raises(RuntimeError, match=r'epoch_2.pth could not be written \(No space left'):
        train(cfg)
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert not list(tmp_path.glob('.*.partial'))


def test_two_trainings_in_one_folder(pictures, base, tmp_path):
    hold = (
        'import sys\nfrom protune_mm.runner import locked\n'
        'with locked(sys.argv[1]):\n    print("held", flush=True)\n    sys.stdin.read()'
    )
    command = [sys.executable, '-W', 'ignore', '-c', hold, str(tmp_path)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == 'held\n'
        with pytest.raises(RuntimeError, match=f'another training .process {other.pid} on'):
            train(config(pictures, base, tmp_path, EPOCHS))
        other.kill()
    assert train(config(pictures, base, tmp_path, EPOCHS)) is None


def test_diverged_weights_are_not_saved(pictures, base, tmp_path):
    class Break(Hook):
        priority = 'LOW'

        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 3:
                runner.model.backbone.layer1[1].prompt.up.bias.data[0] = float('nan')

    with pytest.raises(RuntimeError, match='the training has diverged'):
        train(config(pictures, base, tmp_path, EPOCHS), Break())
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
