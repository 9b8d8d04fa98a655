"""Several processes train and test as one does, over one node or two, and stop together."""

import json
import os
import shutil
import signal
import time

import pytest
import torch

from protune_mm import runner
from tests.conftest import ROOT, run_tool
from tests.processes import PLAIN, assert_same, children, dist, finish, weights
from tests.small_runs import SHAPES, data


def test_two_processes_are_one_with_the_double_batch(distributed, two, tmp_path):
    run_tool('tools/train.py', distributed(2), '--work-dir', tmp_path, *PLAIN)
    one = weights(tmp_path)
    # float32 sums in another order, over six steps of momentum.
    assert_same(weights(two), one, rtol=1e-5, atol=1e-6)
    start = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    moved = [n for n, t in one.items() if t.is_floating_point() and not torch.equal(t, start[n])]
    assert len(moved) >= 20, 'prompts and head trained'


@pytest.mark.parametrize('library', ['mmdet', 'mmseg', 'mmpretrain'])
def test_dist_test_gives_the_metrics_of_one_process(
    library, trained, trained_seg, trained_cls, shapes, tmp_path
):
    """Also where the number of images is no multiple of that of processes."""
    config, checkpoint, processes, options = {
        'mmdet': (SHAPES, trained[0] / 'epoch_1.pth', 3, data(shapes)),
        'mmseg': (*trained_seg, 4, []),
        'mmpretrain': (*trained_cls, 4, []),
    }[library]
    if library == 'mmdet':
        checkpoint = sorted(trained[0].glob('epoch_*.pth'))[-1]
        options = ['--cfg-options', 'model.backbone.init_cfg=None', *options]
    arguments = ['--work-dir', tmp_path, *PLAIN]
    run_tool(
        'tools/test.py', config, checkpoint, *arguments, '--out', tmp_path / 'one.json', *options
    )
    several = [processes, *arguments, '--out', tmp_path / 'several.json']
    finish(dist('dist_test', config, checkpoint, *several, *options))
    one, several = (
        json.loads((tmp_path / f'{name}.json').read_text()) for name in ('one', 'several')
    )
    for timed in ('time', 'data_time'):
        one.pop(timed, None)
        several.pop(timed, None)
    assert one == several
    assert one


LONG = 200


@pytest.mark.parametrize(
    ('whom', 'number'), [('torchrun', signal.SIGUSR1), ('one rank', signal.SIGTERM)]
)
def test_a_signal_stops_all_after_the_same_step(distributed, tmp_path, whom, number):
    program = dist('dist_train', distributed(1, LONG), 2, '--work-dir', tmp_path, *PLAIN)
    end = time.monotonic() + 200
    while not list(tmp_path.glob('epoch_*.pth')) and program.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.05)
    ranks = children(program.pid)
    assert len(ranks) == 2
    os.kill(program.pid if whom == 'torchrun' else ranks[1], number)
    text = finish(program, status=None)
    assert program.returncode != 0, text[-4000:]
    (saved,) = tmp_path.glob('preempted_*.pth')
    step = torch.load(saved, weights_only=True)['meta']['iter']
    assert text.count(f'stopped after step {step};') == 1, 'told once'
    text = finish(
        dist('dist_train', distributed(1, LONG), 2, '--work-dir', tmp_path, *PLAIN, '--resume',
             '--cfg-options', f'train_cfg.max_epochs={step // 3 + 2}')
    )  # fmt: skip
    assert f'resumed epoch: {step // 3}, iter: {step}' in text


RANDOM = """
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='RandomResizedCrop', scale=32),
    dict(type='RandomFlip', prob=0.5), dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
randomness = dict(seed=1, diff_rank_seed=True)
"""


def test_stopped_and_resumed_is_as_never_stopped(distributed, tmp_path):
    """Two processes, from the end of the first epoch, with what each draws at random."""
    config = distributed(1).with_name('random.py')
    config.write_text(f"_base_ = ['{distributed(1).name}']\n{RANDOM}")
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    finish(dist('dist_train', config, 2, '--work-dir', whole, *PLAIN))
    parts.mkdir()
    shutil.copy(whole / 'epoch_1.pth', parts)
    random = torch.load(whole / 'epoch_1.pth', weights_only=True)['protune_mm']['random']
    assert len(random) == 2
    assert not torch.equal(random[0]['torch'], random[1]['torch'])
    finish(dist('dist_train', config, 2, '--work-dir', parts, *PLAIN, '--resume'))
    assert_same(weights(parts), weights(whole), rtol=0, atol=0)


def test_all_resume_what_the_first_has_chosen(distributed, two, tmp_path):
    """Nodes with work folders of their own: some would go on, and others start anew."""
    works = [tmp_path / 'a', tmp_path / 'b']
    works[0].mkdir()
    shutil.copy(two / 'epoch_1.pth', works[0])
    programs = [
        dist('dist_train', distributed(1), 1, '--work-dir', works[rank], *PLAIN, '--resume',
             NNODES='2', NODE_RANK=str(rank), PORT='29533')
        for rank in (0, 1)
    ]  # fmt: skip
    finish(*programs)
    assert_same(weights(works[0]), weights(two), rtol=0, atol=0)


def test_a_checkpoint_that_some_cannot_read_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / 'epoch_1.pth'
    path.write_bytes(b'weights')
    assert runner.same_for_all(str(path)) == str(path)
    assert runner.same_for_all(None) is None
    monkeypatch.setattr(runner, 'all_gather_object', lambda seen: [seen, None, 'other'])
    with pytest.raises(RuntimeError, match=r'processes \[1, 2\] find no such file there'):
        runner.same_for_all(str(path))


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from two_nodes import two_nodes

    try:
        with two_nodes() as pair:
            yield pair
    except OSError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize('more', [{}, {'RDZV_ID': 'job'}], ids=['static', 'rendezvous'])
def test_two_nodes(nodes, distributed, two, tmp_path, more):
    works = [tmp_path / 'a', tmp_path / 'b']
    finish(
        *(
            dist('dist_train', distributed(1), 1, '--work-dir', work, *PLAIN, inside=node.inside,
                 PORT='29511', **node.environment, **more)
            for node, work in zip(nodes, works, strict=True)
        )
    )  # fmt: skip
    written = [work for work in works if list(work.glob('*.pth'))]
    assert len(written) == 1, 'the first rank writes'
    assert_same(weights(written[0]), weights(two), rtol=0, atol=0)
    assert min(node.sent() for node in nodes) > 1e5, 'they spoke over the cable'
