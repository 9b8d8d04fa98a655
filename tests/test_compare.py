"""tools/compare.py: trains each policy once, remembers it, and draws the table."""

import json

import pytest

from tests.conftest import ROOT, run_tool
from tests.small_runs import SHAPES, data

BEST = 'default_hooks.checkpoint.save_best'
ROW = dict(
    config='a', policy='full', seed=0, metric='m', val=0.2, test=0.9, val_curve=[0.1, 0.2],
    best_epoch=2, epochs=2, parameters=dict(prompts=0, trained=1), threads=1,
    versions=dict(torch='2'), command='python tools/compare.py configs/a.py --policies full',
)  # fmt: skip
"""As older files have them."""


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
    assert all(row['path'] == SHAPES and row['device'] for row in rows)
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

    short = dict(ROW, command=f'{ROW["command"]} --epochs 2')
    assert key_of(short) != key_of(ROW)
    text = table([dict(ROW, policy=name) for name in ('last-2', 'full', 'bias')])
    assert '| head-only | Pro-tuned | full fine-tuning | last-2 | bias |' in text
    assert '\n| bias |' in text


def test_bad_input_is_told_before_the_training(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import compare

    (tmp_path / 'README.md').write_text('# My project\n')
    for arguments, message in (
        ((SHAPES, '--policies', 'biases'), "policy='biases' is unknown"),
        (('configs/upernet_protune_r50_ade20k.py',), 'counts no epochs'),
        ((SHAPES, '--cfg-options', f'{BEST}=auto'), "save_best='auto': it has to name one score"),
        ((SHAPES, '--cfg-options', f'{BEST}=[a,b]'), "save_best=['a', 'b']: it has to name"),
        ((SHAPES, '--out', str(tmp_path)), 'README.md is there, and this tool has not written it'),
    ):
        monkeypatch.setattr('sys.argv', ['compare.py', *arguments])
        with pytest.raises((ValueError, SystemExit)) as caught:
            compare.main()
        told = capsys.readouterr()
        assert message in f'{caught.value} {told.err}'
        assert 'training' not in told.out


def test_configs_of_one_name_in_two_folders_are_two(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import key_of, place, table

    assert place('configs/a.py', ROOT) == place(str(ROOT / 'configs/a.py'), tmp_path)
    assert place('mmdet::a.py', tmp_path) == 'mmdet::a.py'
    new = dict(ROW, path='configs/a.py')
    assert key_of(ROW) == key_of(new), 'an older row stays known'
    other = dict(ROW, path='configs/small/a.py')
    assert key_of(other) != key_of(new)
    assert '\n## a\n' in table([ROW, new])
    text = table([ROW, other])
    assert '\n## configs/a.py\n' in text
    assert '\n## configs/small/a.py\n' in text


def test_each_row_tells_what_it_was_run_on(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import table

    assert table([ROW]).endswith('\nRun on CPU (1 threads a run), with torch 2.\n')
    text = table([ROW, dict(ROW, policy='prompts', device='H100'), dict(ROW, policy='bias')])
    assert '\n- 2 of 3 runs on CPU (1 threads a run), with torch 2.\n' in text
    assert '\n- 1 of 3 runs on H100 (1 threads a run), with torch 2.\n' in text


def test_half_a_line_is_left_out_and_the_file_goes_on(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from compare import note, read

    path = tmp_path / 'results.jsonl'
    note(ROW, path)
    path.write_text(path.read_text() + '{"config": "a", "pol')
    assert read(path) == [ROW]
    more = dict(ROW, policy='prompts')
    note(more, path)
    assert path.read_text() == f'{json.dumps(ROW)}\n{json.dumps(more)}\n'
    assert [file.name for file in tmp_path.iterdir()] == ['results.jsonl']


def test_the_committed_table_is_what_its_results_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import compare

    folder = ROOT / 'docs' / 'real_runs'
    rows = compare.read(folder / 'results.jsonl')
    assert (folder / 'README.md').read_text() == compare.table(rows)
    for row in rows:  # The command of a run gives its options.
        assert all(f' {option}' in row['command'] for option in row['options'])
