"""tools/coverage.py tries stock configs, notes each result at once, and goes on where it was."""

import json
import runpy
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import DefaultScope

import protune_mm
from tests.conftest import ROOT, run_tool

CONFIGS = (
    'mmpretrain::shufflenet_v2/shufflenet-v2-1x_16xb64_in1k.py',
    'mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k.py',
)


def run(folder, *more):
    few = ['--config', *CONFIGS, '--jobs', 1, '--work-dir', folder]
    return run_tool('tools/coverage.py', *few, *more)


def test_a_sample_of_configs(tmp_path):
    done = run(tmp_path)
    (results,) = tmp_path.rglob('results.jsonl')
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    kinds = {kind: [r for r in rows if r['key'].startswith(kind)] for kind in ('config', 'build')}
    assert len(kinds['config']) == 2
    assert {row['status'] for row in rows} == {'read', 'ok', 'refused'}
    backbones = [row for row in rows if row['key'].startswith('backbone')]
    assert [row['status'] for row in backbones] == ['ok', 'refused']
    assert 0 < backbones[0]['prompts'] < 0.08
    assert 'masks its own tokens' in backbones[1]['reason']
    steps = [row for row in rows if row['key'].startswith('step')]
    assert [row['file'] for row in steps] == [CONFIGS[0]]
    assert '| mmpretrain | ImageClassifier | ok | shufflenet_v2/' in done.stdout
    assert '1 of 1 types train' in done.stdout
    assert '1 configs: 1 ok (100.0%); 0 with an ok backbone' in done.stdout
    assert '1 configs: 0 ok (0.0%); 0 with an ok backbone in a model' in done.stdout
    assert '[1/' in done.stdout

    # A line that was cut off is done again, and nothing else.
    text = results.read_text()
    results.write_text(text[: text.rindex('{"key"') + 20])
    again = run(tmp_path)
    assert next(line for line in again.stdout.splitlines() if line.startswith('[')).startswith(
        '[1/1,'
    )
    assert run(tmp_path, '--table').stdout.count('ImageClassifier') == 1


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from stock_configs import backbones, steps, table

    return {'backbones': backbones, 'steps': steps, 'table': table}


RESNET = dict(type='mmdet.ResNet', depth=18, base_channels=8)
CONVNEXT = dict(
    type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 32, 64])
)


def test_a_wrong_fold_of_batch_norms_is_noticed(tool, monkeypatch):
    from protune_mm.lean import layers

    stock = layers.affine
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert tool['backbones'].check(RESNET)[0] == ''
        for change in (lambda s, b: (s, b * 0), lambda s, b: (s / s.abs() * s.abs().mean(), b)):
            monkeypatch.setattr(layers, 'affine', lambda norm, c=change: c(*stock(norm)))
            assert 'lean layers differ by' in tool['backbones'].check(RESNET)[0]


def test_a_nan_in_any_output_is_a_difference(tool):
    good, bad = torch.ones(1, 2), torch.full((1, 2), float('nan'))
    for found in ([good, bad], [bad, good], [bad, bad]):
        error = tool['backbones'].difference([good, good], found)
        assert not error <= 1e9
    assert tool['backbones'].difference([good, good], [good, good * 1.5]) == 0.5


def test_every_block_matters_to_what_is_compared(tool):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        stock = tool['backbones'].stock_backbone(CONVNEXT)
    x, expected = tool['backbones'].picture(stock, 3)
    for i in range(4):
        block = stock.stages[i][0]
        block.act = torch.nn.Identity()
        with torch.no_grad():
            found = tool['backbones'].run(stock, x)
        assert tool['backbones'].difference(expected, found) > 1e-3
        expected = found


def test_a_frozen_weight_that_moves_is_noticed(tool, monkeypatch):
    backbones = tool['backbones']
    with DefaultScope.overwrite_default_scope('mmdet'):
        tuned = protune_mm.protune(backbones.stock_backbone(RESNET)).train()
        tuned.conv1.weight.requires_grad_()
        (problem, *_) = backbones.check_training(tuned, torch.randn(1, 3, 64, 96))
    assert problem == 'a gradient at conv1.weight, which is frozen'


@pytest.mark.parametrize(
    ('tuned', 'stock', 'status'),
    [
        (['KeyError: a', ''], ['KeyError: a', ''], 'ok'),
        # A batch with which stock trains and the Pro-tuned model does not.
        (['KeyError: a', ''], [''], 'failed'),
        (['KeyError: a', 'KeyError: b'], ['KeyError: a', 'KeyError: b'], 'stock fails'),
        (['no gradient at x.prompt.up.weight'], ['KeyError: a'], 'failed'),
        (['frozen and moved: conv1.weight'], ['KeyError: a'], 'failed'),
        (['the loss is nan', ''], ['', ''], 'failed'),
    ],
)
def test_a_step_fails_as_stock_only_where_stock_fails_too(tool, tuned, stock, status):
    assert tool['steps'].verdict(tuned, stock)[0] == status


def test_what_was_not_run_is_not_ok(tool):
    item = dict(name='model.backbone', type='ResNet', structure=dict(depth=18))
    config = dict(
        key='config mmdet::a.py', status='read', reason='', library='mmdet', file='mmdet::a.py',
        model=dict(type='M'), model_type='M', backbones=[item],
    )  # fmt: skip
    build = dict(key='build mmdet::a.py', status='ok', reason='', file='mmdet::a.py')
    check = dict(key='backbone mmdet::a.py model.backbone', status='ok', reason='', type='ResNet',
                 structure=dict(depth=18), prompts=0.01)  # fmt: skip
    step = dict(key='step mmdet::a.py', status='ok', reason='', file='mmdet::a.py')
    for rows in ([config], [config, build], [config, check]):
        assert not tool['table'].complete(rows, ['mmdet::a.py'])
        assert '1 configs: 0 ok (0.0%)' in tool['table'].table(rows)
        assert '1 not run yet' in tool['table'].table(rows)
    assert '1 configs: 1 ok (100.0%)' in tool['table'].table([config, build, check])
    assert not tool['table'].complete([config, build, check], ['mmdet::a.py']), 'no step was tried'
    everything = [config, build, check, step]
    assert tool['table'].complete(everything, ['mmdet::a.py'])
    assert not tool['table'].complete(everything, ['mmdet::a.py', 'mmdet::b.py'])
    # A second model of that type: a step of the first that fails as stock does is not the last.
    config = dict(config, key='config mmdet::b.py', file='mmdet::b.py', model=dict(type='M', b=1))
    build = dict(build, key='build mmdet::b.py', file='mmdet::b.py')
    files = ['mmdet::a.py', 'mmdet::b.py']
    assert tool['table'].complete([*everything, config, build], files)
    step['status'] = 'stock fails'
    assert not tool['table'].complete([*everything, config, build], files)
    step = dict(step, key='step mmdet::b.py', file='mmdet::b.py')
    assert tool['table'].complete([*everything, config, build, step], files)


@pytest.fixture
def script(monkeypatch):
    """The names of tools/coverage.py, which is no module."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    return runpy.run_path(str(ROOT / 'tools' / 'coverage.py'), run_name='__mp_main__')


def test_results_are_those_of_the_installed_packages(script, monkeypatch):
    first = script['state_digest']()
    assert script['state_digest']() == first
    found = [SimpleNamespace(name='timm', version='1')]
    monkeypatch.setitem(script['state_digest'].__globals__, 'distributions', lambda: found)
    second = script['state_digest']()
    found[0].version = '2'
    assert len({first, second, script['state_digest']()}) == 3


def test_what_killed_its_process_is_tried_again(script, tmp_path):
    path = tmp_path / 'results.jsonl'
    reasons = ('ValueError: a mistake', 'the process died')
    rows = [script['failure'](f'config mmdet::{i}.py', why) for i, why in enumerate(reasons)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert list(script['Attempts'](path, 1).known) == ['config mmdet::0.py']


def test_as_many_processes_as_there_are_cores_to_use(script, monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda _: {3, 5, 7})
    monkeypatch.setattr('sys.argv', ['coverage.py'])
    assert script['parse_args']().jobs == 3
