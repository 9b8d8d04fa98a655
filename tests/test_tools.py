"""The tools, ours and the stock ones of the three libraries, run as a user runs them."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from protune_mm import cli, load_config, tta
from protune_mm.checkpoints import StockModelHook, tuned_state_dict
from tests.conftest import ROOT, STOCK_TOOLS, run_tool
from tests.small_runs import QUICK, SHAPES, data


def state(path):
    return torch.load(path, weights_only=True)['state_dict']


def test_train_prints_the_line_and_proves_the_freeze(trained):
    work, done = trained
    text = done.stdout + done.stderr
    assert 'Pro-tuning: backbone frozen 2,223,872, prompts' in text
    assert '% of backbone), neck+head' in text
    assert 'frozen tensors are bit-identical to the start' in text
    assert 'is frozen, but no weights were loaded into it' in text
    assert (work / 'epoch_1.pth').exists()


def test_resume_goes_on(trained, shapes, tmp_path):
    # A copy: only the newest checkpoint of a folder is kept, and other tests want the first.
    work = Path(shutil.copytree(trained[0], tmp_path / 'work'))
    before = state(work / 'epoch_1.pth')
    more = ['--cfg-options', 'train_cfg.max_epochs=2', *QUICK[1:], *data(shapes)]
    done = run_tool('tools/train.py', SHAPES, '--work-dir', work, '--resume', *more)
    assert 'resumed epoch: 1' in done.stdout + done.stderr
    after = state(work / 'epoch_2.pth')
    for name, tensor in before.items():
        frozen = name.startswith('backbone.') and '.prompt.' not in name
        assert torch.equal(tensor, after[name]) == frozen or not tensor.is_floating_point(), name


def test_resume_without_a_checkpoint_starts_from_load_from(trained, shapes, tmp_path):
    """A job that is put back into a queue says --resume at its first start, too."""
    start = trained[0] / 'epoch_1.pth'
    options = [
        '--cfg-options',
        f'load_from={start}',
        'optim_wrapper.optimizer.lr=0',
        *QUICK,
        *data(shapes),
    ]
    done = run_tool('tools/train.py', SHAPES, '--work-dir', tmp_path, '--resume', *options)
    assert f'no checkpoint in {tmp_path}: starting anew' in done.stdout
    before, after = state(start), state(tmp_path / 'epoch_1.pth')
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) or 'running' in name or 'num_batches' in name, name


def test_resume_of_a_stock_config_starts_from_load_from_too(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import train

    asked = []
    monkeypatch.setattr(cli, 'build_runner', lambda cfg: asked.append(cfg) or Mock())
    stock = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
    first = ['--work-dir', str(tmp_path), '--cfg-options', 'load_from=start.pth']

    def given(*more):
        monkeypatch.setattr('sys.argv', ['train.py', stock, '--resume', *more, *first])
        train.main()
        return {key: asked[-1].get(key) for key in ('resume', 'load_from', 'first_load_from')}

    careful = dict(resume=True, load_from=None, first_load_from='start.pth')
    assert given() == dict(resume=False, load_from='start.pth', first_load_from=None)
    assert given('--protune') == careful
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    assert given() == dict(resume=True, load_from=None, first_load_from=None)
    assert given('--protune') == careful


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='mmengine has no AMP on the CPU')
def test_amp(shapes, tmp_path):
    options = ['--cfg-options', *QUICK, *data(shapes)]
    done = run_tool('tools/train.py', SHAPES, '--work-dir', tmp_path, '--amp', *options)
    assert 'bit-identical' in done.stdout + done.stderr


# mmdet's test-time augmentation refuses masks.
BOXES = [
    'model.roi_head.mask_head=None',
    'model.roi_head.mask_roi_extractor=None',
    'test_evaluator.metric=bbox',
]


@pytest.mark.parametrize('more', [[], ['--tta']])
def test_test_scores_a_checkpoint(trained, shapes, tmp_path, more):
    work, _ = trained
    checkpoint = sorted(work.glob('epoch_*.pth'))[-1]
    out = tmp_path / 'metrics.json'
    shown = tmp_path / 'shown'
    arguments = [SHAPES, checkpoint, '--work-dir', tmp_path, '--out', out, '--show-dir', shown]
    options = [*QUICK[1:], *data(shapes), *(BOXES if more else [])]
    run_tool('tools/test.py', *arguments, *more, '--cfg-options', *options)
    assert -1 <= json.loads(out.read_text())['coco/bbox_mAP'] <= 1
    assert list(tmp_path.glob('**/shown/**/*.png')), 'pictures of predictions'


def test_the_stock_tools_of_mmdet(shapes, tmp_path):
    """The one line, without custom_imports, and tools that know nothing of protune_mm."""
    text = Path(SHAPES).resolve()
    (tmp_path / 'line.py').write_text(f"_base_ = ['{text}']\nrunner_type = 'Runner'\n")
    tools = STOCK_TOOLS['mmdet']
    work = tmp_path / 'work'
    options = ['--cfg-options', *QUICK, *data(shapes)]
    done = run_tool(tools / 'train.py', tmp_path / 'line.py', '--work-dir', work, *options)
    assert 'bit-identical' not in done.stdout + done.stderr, 'no runner of ours, no guard'
    keys = state(work / 'epoch_1.pth')
    assert any('.prompt.' in key for key in keys)
    run_tool(
        tools / 'test.py', tmp_path / 'line.py', work / 'epoch_1.pth', '--work-dir', work, *options
    )
    flops = run_tool(
        tools / 'analysis_tools/get_flops.py', tmp_path / 'line.py', '--num-images', 1, *options
    )
    assert 'Flops: ' in flops.stdout
    run_tool(
        tools / 'analysis_tools/browse_dataset.py',
        tmp_path / 'line.py',
        '--output-dir',
        tmp_path / 'browsed',
        '--not-show',
        *options,
    )
    assert len(list((tmp_path / 'browsed').glob('**/*.png'))) == 6


def test_mmseg_with_stock_and_our_tools(trained_seg, tmp_path):
    config, checkpoint = trained_seg
    # Loading needs torch.load to accept mmengine's file: building our backbone sees to that.
    stock_test = STOCK_TOOLS['mmseg'] / 'test.py'
    run_tool(stock_test, config, checkpoint, '--work-dir', tmp_path / 'stock')
    done = run_tool('tools/train.py', config, '--work-dir', tmp_path / 'ours')
    assert 'bit-identical' in done.stdout + done.stderr
    out = tmp_path / 'metrics.json'
    run_tool('tools/test.py', config, checkpoint, '--work-dir', tmp_path, '--tta', '--out', out)
    assert 'mIoU' in json.loads(out.read_text())


def test_tta_scores_against_the_image_as_it_is(trained_seg):
    from mmengine.registry import DATASETS, DefaultScope

    cfg = cli.read_config(str(trained_seg[0]))
    cfg._cfg_dict.pop('tta_pipeline')  # As in a config without one of its own.
    dataset = cfg.test_dataloader.dataset
    with DefaultScope.overwrite_default_scope('mmseg'):
        before = DATASETS.build(dataset)[0]['data_samples'].gt_sem_seg.data
        tta.use_tta(cfg)
        after = DATASETS.build(dataset)[0]['data_samples']
    assert len(after) == 2
    assert torch.equal(after[0].gt_sem_seg.data, before)
    assert torch.equal(after[1].gt_sem_seg.data, before.flip(-1))


def test_mmpretrain_with_stock_and_our_tools(trained_cls, pictures, tmp_path):
    config, checkpoint = trained_cls
    stock_test = STOCK_TOOLS['mmpretrain'] / 'test.py'
    run_tool(stock_test, config, checkpoint, '--no-pin-memory', '--work-dir', tmp_path / 'stock')
    ours = ['--no-pin-memory', '--work-dir', tmp_path / 'ours']
    done = run_tool('tools/train.py', config, *ours)
    assert 'bit-identical' in done.stdout + done.stderr
    out = tmp_path / 'metrics.json'
    run_tool('tools/test.py', config, checkpoint, *ours, '--tta', '--out', out)
    assert 0 <= json.loads(out.read_text())['accuracy/top1'] <= 100
    # As dumped by a training that was resumed; pictures of all images.
    resumed = tmp_path / 'resumed.py'
    resumed.write_text(f'{config.read_text()}\nresume = True\n')
    shown = ['--show-dir', tmp_path / 'shown', '--out', out]
    options = ['--cfg-options', 'train_dataloader.dataset.data_root=nowhere']
    run_tool('tools/test.py', resumed, checkpoint, *ours, *shown, *options)
    assert len(list((tmp_path / 'shown').glob('**/*.png'))) == len(
        list((pictures / 'classes').glob('*/*'))
    )


def test_auto_scale_lr_and_its_error(shapes, tmp_path):
    options = ['--work-dir', tmp_path, '--no-validate', '--auto-scale-lr', '--cfg-options']
    done = run_tool('tools/train.py', SHAPES, *options, *QUICK, *data(shapes))
    assert 'Scaling the original LR by 0.25' in done.stdout + done.stderr
    done = run_tool(
        'tools/train.py', SHAPES, *options, *QUICK, *data(shapes), 'auto_scale_lr=None', check=False
    )
    assert done.returncode == 2
    assert 'has no auto_scale_lr.base_batch_size' in done.stderr


def test_shapes_replace_nothing_but_shapes(tmp_path):
    def draw(out, **more):
        few = ['--train', 1, '--val', 1, '--size', 48, 32]
        return run_tool('tools/make_shapes.py', tmp_path / out, *few, **more)

    draw('new/shapes')
    draw('new/shapes')
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['shapes']
    mine = tmp_path / 'new/shapes/annotations/train.json'
    for file, text in (
        ('home/thesis.tex', 'years'),
        # A COCO set of somebody else, and shapes with something beside them.
        ('coco/annotations/train.json', '{"categories": [{"id": 1, "name": "cat"}]}'),
        ('images/images/train/0001.png', ''),
        ('mixed/notes.txt', 'mine'),
        ('file', ''),
    ):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if file.startswith('mixed'):
            (tmp_path / 'mixed/annotations').mkdir()
            (tmp_path / 'mixed/annotations/train.json').write_text(mine.read_text())
        done = draw(Path(file).parts[0], check=False)
        assert done.returncode == 2
        assert 'is no folder of shapes alone' in done.stderr.splitlines()[-1]
        assert path.read_text() == text


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_the_shell_scripts_say_how_they_are_used(script):
    done = subprocess.run(['bash', f'tools/{script}'], capture_output=True, text=True)
    assert done.returncode == 2
    assert f'{script} ' in done.stderr
    assert 'usage: ' in done.stderr


def test_two_processes_train_and_test(shapes, tmp_path, trained):
    env = {
        **os.environ,
        'OMP_NUM_THREADS': '1',
        'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}',
        'PORT': '29713',
        'PYTHONWARNINGS': 'ignore',
    }
    options = ['--cfg-options', *QUICK, *data(shapes)]
    work = ['--work-dir', str(tmp_path)]
    command = ['bash', 'tools/dist_train.sh', SHAPES, '2', *work, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'bit-identical' in done.stdout + done.stderr
    checkpoint = str(tmp_path / 'epoch_1.pth')
    command = ['bash', 'tools/dist_test.sh', SHAPES, checkpoint, '2', *work, *options]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'coco/segm_mAP' in done.stdout + done.stderr


@pytest.mark.parametrize(
    ('status', 'requeued'), [(0, False), (1, False), (138, True), (143, False)]
)
def test_slurm_puts_a_signalled_job_back(tmp_path, status, requeued):
    for name, body in (('srun', f'exit {status}'), ('scontrol', 'echo "$@" > "$OUT"')):
        fake = tmp_path / name
        fake.write_text(f'#!/bin/sh\n{body}\n')
        fake.chmod(0o755)
    out = tmp_path / 'out'
    env = {**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'OUT': str(out)}
    command = ['bash', 'tools/slurm_train.sh', 'part', 'job', 'config.py', 'work', '--resume']
    done = subprocess.run(command, env={**env, 'SLURM_JOB_ID': '7'}, check=False)
    assert done.returncode == status
    assert out.exists() == requeued
    if requeued:
        assert out.read_text() == 'requeue 7\n'


def slurm(folder, script='tools/slurm_train.sh', **more):
    """Run the script with a stand-in for srun, which says its options and starts one process."""
    body = 'while [ "$1" != bash ]; do echo "$1"; shift; done; SLURM_JOB_ID=${SLURM_JOB_ID:-70321} '
    for name, text in (('srun', f'{body} exec "$@"'), ('python', 'echo "port $MASTER_PORT $@"')):
        (folder / name).write_text(f'#!/bin/sh\n{text}\n')
        (folder / name).chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM', 'MASTER', 'PORT'))}
    return subprocess.run(
        ['bash', str(script), 'part', 'job', 'config.py', 'a work', '--resume'],
        capture_output=True,
        text=True,
        env={**clean, **more, 'PATH': f'{folder}:{os.environ["PATH"]}'},
    )


@pytest.mark.parametrize(
    ('given', 'port'),
    [
        ({}, 20321),  # srun makes the job.
        ({'SLURM_JOB_ID': '1234567'}, 24567),
        ({'SLURM_JOB_ID': '7', 'MASTER_PORT': '29999'}, 29999),
        ({'MASTER_PORT': '29999', 'PORT': '30001'}, 30001),
    ],
)
def test_slurm_trainings_have_ports_of_their_own(tmp_path, given, port):
    done = slurm(tmp_path, **given)
    assert done.returncode == 0, done.stderr
    words = '-u tools/train.py config.py --work-dir a work --launcher slurm --resume'
    assert done.stdout.splitlines()[-1] == f'port {port} {words}'


@pytest.mark.parametrize(('gpus', 'per_node'), [('4', 4), ('16', 8)])
def test_slurm_asks_for_no_more_gpus_than_are_used(tmp_path, gpus, per_node):
    asked = slurm(tmp_path, GPUS=gpus).stdout.splitlines()
    assert {f'--gres=gpu:{per_node}', f'--ntasks={gpus}', f'--ntasks-per-node={per_node}'} <= {
        *asked
    }


def test_the_copy_that_sbatch_makes_says_how_to_submit(tmp_path):
    copy = tmp_path / 'slurm_script'
    copy.write_text(Path('tools/slurm_train.sh').read_text())
    done = slurm(tmp_path, copy)
    assert done.returncode == 2
    assert 'Submit one that calls tools/slurm_train.sh' in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ('arguments', 'folder'),
    [
        ([], 'resnet18_8xb32_in1k'),
        (['--protune'], 'resnet18_8xb32_in1k-protune'),
        (['--protune', '--policy', 'prompts'], 'resnet18_8xb32_in1k-protune'),
        (['--protune', '--policy', 'head-only'], 'resnet18_8xb32_in1k-protune-head-only'),
        (['--protune', '--work-dir', 'mine'], 'mine'),
        (['--cfg-options', 'work_dir=own', '--protune', '--policy', 'full'], 'own-protune-full'),
    ],
)
def test_twins_of_a_config_have_work_folders_of_their_own(monkeypatch, arguments, folder):
    """Else a training of one writes over the checkpoints of the other."""
    monkeypatch.setattr(
        'sys.argv', ['train.py', 'mmpretrain::resnet/resnet18_8xb32_in1k.py', *arguments]
    )
    parser = argparse.ArgumentParser()
    cli.add_common_arguments(parser)
    cfg, _ = cli.parse(parser)
    assert Path(cfg.work_dir).name == folder


def test_tasks_of_vtab_have_work_folders_of_their_own(monkeypatch):
    folders = set()
    for task in ('dtd', 'cifar'):
        monkeypatch.setenv('VTAB_TASK', task)
        folders.add(load_config('configs/transfer/resnet50_protune_vtab1k.py').work_dir)
    assert len(folders) == 2


def test_a_stock_model_refuses_a_tuned_checkpoint(trained_cls, tmp_path):
    """mmengine loads what it can of it, and scores a backbone at random."""
    config, _ = trained_cls
    run_tool('tools/train.py', config, '--work-dir', tmp_path)
    cfg = load_config(str(config))
    cfg.model.backbone = dict(type='ResNet', depth=18)
    stock = tmp_path / 'stock.py'
    cfg.dump(str(stock))
    for path, *more in ((config, '--policy', 'full'), (stock,)):
        done = run_tool(
            'tools/test.py', path, tmp_path / 'epoch_1.pth', '--work-dir', tmp_path, *more,
            check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "error: the checkpoint is of a model whose 'backbone' was Pro-tuned" in done.stderr
        assert 'ProTuningBlock would be left out: add --protune' in done.stderr


@pytest.mark.parametrize(
    ('policy', 'given', 'message'),
    [
        ('prompts', 'base.pth', 'its ProTuningBlock would be left out'),
        ('head-only', None, 'the frozen weights would be left out'),
        ('head-only', 'base.pth', None),  # A head that goes on with its backbone trained.
    ],
)
def test_a_stock_model_takes_what_it_can_use(policy, given, message):
    protuned = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, policy=policy)
    state = tuned_state_dict(nn.ModuleDict(dict(backbone=MODELS.build(protuned))))
    stock = nn.ModuleDict(dict(backbone=MODELS.build(dict(type='mmdet.ResNet', depth=18))))
    stock.is_init = True
    stock.backbone.init_cfg = dict(type='Pretrained', checkpoint=given) if given else []
    runner = Mock(model=stock)
    if message is None:
        StockModelHook().after_load_checkpoint(runner, dict(state_dict=state))
        return
    with pytest.raises(ValueError, match=message):
        StockModelHook().after_load_checkpoint(runner, dict(state_dict=state))
