"""tools/compare.py: trains each policy once, remembers it, and draws the table."""

import json

from tests.conftest import ROOT, run_tool
from tests.small_runs import SHAPES, data


def test_compare_trains_tests_and_remembers(shapes, tmp_path):
    options = [
        *data(shapes), 'model.backbone.init_cfg=None', 'model.backbone.prompt.hidden=2',
        'model.backbone.prompt.scale=0.75',
    ]  # fmt: skip
    arguments = [
        *('tools/compare.py', SHAPES, '--policies', 'head-only', 'prompts', '--epochs', 1),
        *('--out', tmp_path, '--work-dir', tmp_path / 'work', '--cfg-options', *options),
    ]
    run_tool(*arguments)
    rows = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
    assert [row['policy'] for row in rows] == ['head-only', 'prompts']
    assert rows[0]['parameters']['prompts'] == 0 < rows[1]['parameters']['prompts']
    assert rows[1]['options'] == options
    # Two hidden channels in each of four stages: counted with the options.
    channels = (24, 32, 96, 320)
    assert rows[1]['parameters']['prompts'] == sum(5 * c + 54 for c in channels)
    assert all(-1 <= row['test'] <= 1 and len(row['val_curve']) == 1 for row in rows)
    assert all(row['rule'] == 'greater' for row in rows)
    table = (tmp_path / 'README.md').read_text()
    assert '| head-only | Pro-tuned | full fine-tuning |' in table
    assert '| not run |' in table
    assert 'hidden=2, scale=0.75 | 0 |' in table
    again = run_tool(*arguments)
    assert again.stdout.count('already in') == 2


def test_the_learning_rate_is_picked_by_validation(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import picked

    rows = [
        dict(config='a', policy='full', val=0.2, test=0.9, rule='greater'),
        dict(config='a', policy='full', val=0.3, test=0.1),
        dict(config='b', policy='full', val=0.9, test=0.5),
    ]
    assert picked(rows, 'a', 'full') is rows[1]
    assert picked(rows, 'a', 'prompts') is None


def test_of_a_loss_the_least_is_picked(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import picked

    rows = [
        dict(config='a', policy='full', val=0.2, rule='less'),
        dict(config='a', policy='full', val=0.3, rule='less'),
    ]
    assert picked(rows, 'a', 'full') is rows[0]


def test_runs_are_told_apart_and_all_policies_have_their_line(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import key_of, table

    common = dict(
        config='a', seed=0, metric='m', val=0.2, test=0.9, val_curve=[0.1, 0.2], best_epoch=2,
        epochs=2, parameters=dict(prompts=0, trained=1), threads=1, versions={},
        command='python tools/compare.py a.py --policies full --seed 0',
    )  # fmt: skip
    short = dict(common, policy='full', command=f'{common["command"]} --epochs 2')
    assert key_of(short) != key_of(dict(common, policy='full'))
    text = table([dict(common, policy=name) for name in ('last-2', 'full', 'bias')])
    assert '| head-only | Pro-tuned | full fine-tuning | last-2 | bias |' in text
    assert '\n| bias |' in text


def test_bad_input_is_told_before_the_training():
    for arguments, message in (
        ((SHAPES, '--policies', 'biases'), "policy='biases' is unknown"),
        (('configs/upernet_protune_r50_ade20k.py',), 'counts no epochs'),
    ):
        done = run_tool('tools/compare.py', *arguments, check=False)
        assert message in done.stderr
        assert 'training' not in done.stdout
