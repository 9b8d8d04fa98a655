"""tools/study.py: the same steps and grid for all, resumed at any run, picked by validation."""

import json

import pytest

from tests.conftest import ROOT, run_tool
from tests.small_runs import CLS

STUDY = """
methods = {methods}
lrs = [1e-3, {other}]
seeds = [0]
tasks = dict(
    small=dict(
        config={config!r}, backbone='ResNet', metrics=['accuracy/top1'], fractions={fractions},
        steps=3,
    ),
)
options = dict(ResNet=dict(lora=dict(prompt=dict(rank=1))))
"""


@pytest.fixture
def study(tmp_path, pictures):
    config = tmp_path / 'classifier.py'
    config.write_text(CLS.format(root=str(pictures / 'classes')))

    def write(methods=('lora', 'full'), other=1e-2, fractions=(1.0,), **change):
        text = STUDY.format(
            methods=list(methods), other=other, fractions=list(fractions), config=str(config)
        )
        for old, new in change.items():
            text = text.replace(old, new)
        (tmp_path / 'study.py').write_text(text)
        return tmp_path / 'study.py'

    return write


def run(file, out, *more, check=True):
    return run_tool('tools/study.py', file, '--out', out, '--jobs', 1, *more, check=check)


def read(out):
    return [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]


KEYS = {
    'method', 'task', 'backbone', 'fraction', 'seed', 'lr', 'steps', 'metric', 'score', 'val_score',
    'diverged', 'trainable_backbone', 'backbone_parameters', 'peak_memory', 'wall_s', 'command',
    'versions',
}  # fmt: skip


def test_a_study_runs_and_goes_on_where_it_was(study, tmp_path):
    # A rate at which the loss of full fine-tuning is no number after a step or two.
    file, out = study(other=1e30), tmp_path / 'out'
    run(file, out)
    rows = read(out)
    assert len(rows) == 4
    assert all(set(row) >= KEYS for row in rows)
    by_run = {(row['method'], row['lr']): row for row in rows}
    assert {row['steps'] for row in rows} == {3}
    lora, full = by_run['lora', 1e-3], by_run['full', 1e-3]
    assert 0 < lora['trainable_backbone'] < 0.02 * lora['backbone_parameters']
    assert full['trainable_backbone'] == full['backbone_parameters'] == lora['backbone_parameters']
    assert 0 < lora['peak_memory'] < full['peak_memory']
    wild = by_run['full', 1e30]
    assert (wild['diverged'], wild['score'], wild['val_score']) == (True, 0.0, 0.0)
    assert not full['diverged']
    text = (out / 'README.md').read_text()
    assert '## small, 100% of the labels' in text
    assert '| 2 (1) |' in text, 'the run that diverged is counted'

    # Cut off in the middle of a line.
    whole = (out / 'results.jsonl').read_text()
    (out / 'results.jsonl').write_text(whole[:-30])
    again = run(file, out)
    assert '[1/1, 0 min left]' in again.stdout
    last = json.loads(whole.splitlines()[-1])
    new = read(out)[-1]
    assert {k: new[k] for k in KEYS - {'wall_s'}} == {k: last[k] for k in KEYS - {'wall_s'}}


def test_one_run_by_its_command(study, tmp_path):
    file = study(fractions=(0.5,))
    done = run_tool('tools/study.py', file, '--run', 'small pro-tuning 0.5 0.001 0')
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert (row['method'], row['fraction'], row['lr']) == ('pro-tuning', 0.5, 1e-3)
    assert row['command'].endswith('--run "small pro-tuning 0.5 0.001 0"')


def test_scenarios(study):
    pytest.importorskip('imagecorruptions', reason='requirements/robustness.txt')
    pytest.importorskip('torchattacks', reason='requirements/robustness.txt')
    more = (
        'long_tail=2, scenarios=dict(every=2, severities=[1], attacks=dict(fgsm=[0, 1])), steps=3'
    )
    file = study(**{'steps=3': more})
    done = run_tool('tools/study.py', file, '--run', 'small lora 1 0.001 0')
    rows = {r['metric']: r for r in map(json.loads, done.stdout.strip().splitlines()[-4:])}
    assert set(rows) == {'accuracy/top1', '100 - mCE, severity 1', 'fgsm, 0/255', 'fgsm, 1/255'}
    assert len({row['val_score'] for row in rows.values()}) == 1, 'of clean images'
    assert rows['fgsm, 1/255']['score'] <= rows['fgsm, 0/255']['score']
    assert 0 <= rows['100 - mCE, severity 1']['score'] <= 100


@pytest.mark.parametrize(
    ('change', 'more', 'message'),
    [
        (dict(methods=('lora', 'lorra')), (), "method 'lorra' is unknown: use full, head-only"),
        (dict(seeds='sets'), (), 'has no `seeds`'),
        (dict(classifier='clasifier'), (), "task 'small' has no config"),
        (dict(), ('--method', 'mona'), '--method mona: '),
    ],
)
def test_bad_input(study, tmp_path, change, more, message):
    done = run(study(**change), tmp_path / 'out', *more, check=False)
    assert done.returncode
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'out' / 'README.md').exists()


def test_the_rate_is_picked_by_validation_over_all_seeds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from study_parts.report import cells

    def line(method, lr, seed, val, score):
        return dict(
            task='t', fraction=1.0, metric='m', method=method, lr=lr, seed=seed, val_score=val,
            score=score, diverged=False,
        )  # fmt: skip

    lines = [
        line('a', 1, 0, 50, 90), line('a', 1, 1, 50, 90),
        line('a', 2, 0, 90, 10), line('a', 2, 1, 20, 20),
        # Not all seeds yet: it cannot win.
        line('a', 3, 0, 99, 99),
    ]  # fmt: skip
    lines[2]['val_score'] = 85
    found = cells(lines)['t', 1.0, 'm']['a']
    assert (found['lr'], found['score']) == (2, 15)
    assert found['count'] == 5
