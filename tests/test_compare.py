"""tools/compare.py: trains each policy once, remembers it, and draws the table."""

import json

from tests.conftest import run_tool
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
    table = (tmp_path / 'README.md').read_text()
    assert '| head-only | Pro-tuned | full fine-tuning |' in table
    assert '| not run |' in table
    assert 'hidden=2, scale=0.75 | 0 |' in table
    again = run_tool(*arguments)
    assert again.stdout.count('already in') == 2


def test_the_learning_rate_is_picked_by_validation():
    import sys

    sys.path.insert(0, 'tools')
    try:
        from compare import picked
    finally:
        sys.path.remove('tools')
    rows = [
        dict(config='a', policy='full', val=0.2, test=0.9),
        dict(config='a', policy='full', val=0.3, test=0.1),
        dict(config='b', policy='full', val=0.9, test=0.5),
    ]
    assert picked(rows, 'a', 'full') is rows[1]
    assert picked(rows, 'a', 'prompts') is None
