"""Jobs run side by side: each result is noted at once, and a death costs one job."""

import os

import pytest

from tests.conftest import ROOT


def job(key):
    if key.startswith('kill'):
        os._exit(9)
    if key.startswith('raise'):
        raise ValueError('a mistake')
    return dict(key=key, status='ok', reason='')


def failure(key, reason):
    return dict(key=key, status='failed', reason=reason)


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from jobs import Results

    return lambda failure=None: Results(tmp_path / 'results.jsonl', 2, failure)


KEYS = ['good a', 'kill b', 'raise c', *(f'good {i}' for i in range(6))]


def test_a_process_that_dies_costs_one_job(results, capsys):
    rows = results(failure).work(job, KEYS)
    assert [row['key'] for row in rows] == KEYS
    assert [row['status'] for row in rows] == ['ok', 'failed', 'failed', *['ok'] * 6]
    assert [row['reason'] for row in rows[1:3]] == ['the process died', 'ValueError: a mistake']
    assert '[9/9, 0 min left]' in capsys.readouterr().out
    assert results(failure).work(job, KEYS) == rows


def test_without_a_result_for_failures_they_are_tried_again(results, capsys):
    run = results()
    assert len(run.work(job, KEYS)) == 7
    assert run.failed == {'kill b': 'the process died', 'raise c': 'ValueError: a mistake'}
    capsys.readouterr()
    assert len(results().work(job, KEYS)) == 7
    assert '[2/2, 0 min left]' in capsys.readouterr().out


def test_a_line_that_was_cut_off_is_done_again(results, capsys):
    run = results()
    run.work(job, ['good a', 'good b'])
    text = run.path.read_text()
    run.path.write_text(text[:-10])
    capsys.readouterr()
    assert len(results().work(job, ['good a', 'good b'])) == 2
    assert '[1/1, 0 min left] ok good' in capsys.readouterr().out
    assert len(results().known) == 2
