"""Jobs run side by side: each result is noted at once, and a death costs one job."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def test_a_broken_line_in_the_middle_is_told(results):
    run = results()
    run.work(job, ['good a', 'good b'])
    first, second = run.path.read_text().splitlines()
    text = f'{first[:-10]}\n{second}\n'
    run.path.write_text(text)
    with pytest.raises(ValueError, match=r'line 1, is no JSON .*remove the line'):
        results()
    assert run.path.read_text() == text


def test_a_line_that_was_cut_off_is_done_again(results, capsys):
    run = results()
    run.work(job, ['good a', 'good b'])
    text = run.path.read_text()
    run.path.write_text(text[:-10])
    capsys.readouterr()
    assert list(results().known) == [json.loads(text.splitlines()[0])['key']]
    assert run.path.read_text() == text[:-10], 'reading alone changes nothing'
    assert len(results().work(job, ['good a', 'good b'])) == 2
    assert '[1/1, 0 min left] ok good' in capsys.readouterr().out
    assert len(results().known) == 2
    lines = run.path.read_text().splitlines()
    assert sorted(json.loads(line)['key'] for line in lines) == ['good a', 'good b']


def test_two_processes_lose_nothing_of_each_other(results, capsys):
    from jobs import hold

    one, two = results(), results()
    with one.path.open('a') as theirs:
        hold(theirs)
        waiting = threading.Thread(target=two.add, args=[dict(key='b')])
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        # Of a process that died while it wrote.
        theirs.write('{"key": "a"}\n{"key": "lo')
    waiting.join()
    assert one.path.read_text() == '{"key": "a"}\n{"key": "b"}\n'
    one.failed = {'b': 'the process died', 'c': 'a mistake'}
    one.read_again()
    assert list(one.known) == ['a', 'b']
    assert list(one.failed) == ['c'], 'the other has had it'
    one.path.write_text('{"key": "a"}')  # Only the end of the line was lost.
    one.mend()
    assert one.path.read_text() == '{"key": "a"}\n'


SLEEPER = """
import os, sys, time
sys.path.insert(0, {tools!r})
from pathlib import Path
from jobs import Results

def job(key):
    Path({out!r}, key).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == '__main__':
    Results(Path({out!r}, 'results.jsonl'), 1).work(job, ['first', 'second'])
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / 'sleeper.py'
    script.write_text(SLEEPER.format(tools=str(ROOT / 'tools'), out=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, script])
    note = tmp_path / 'first'
    wait_for(lambda: note.exists() and note.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    worker = int(note.read_text())
    wait_for(lambda: not alive(worker), seconds=20)
    assert not (tmp_path / 'second').exists()


def test_what_waits_is_not_done_after_an_interrupt(results, monkeypatch, tmp_path):
    run, noted = results(), []

    def note(row, progress):
        noted.append(row['key'])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, '_note', note)
    keys = [f'{tmp_path}/{i}' for i in range(12)]
    with pytest.raises(KeyboardInterrupt):
        run.work(touch, keys)
    assert len(noted) == 1
    # Two at a time: some more may have begun, and none goes on.
    before = len(list(tmp_path.glob('*')))
    assert before < 12
    time.sleep(1)
    assert len(list(tmp_path.glob('*'))) == before


def test_what_is_wrong_with_all_jobs_ends_them(results, tmp_path):
    run, keys = results(), [f'{tmp_path}/{i}' for i in range(12)]
    with pytest.raises(ValueError, match=r'^a mistake of all$') as told:
        run.work(touch_or_end, [*keys[:1], 'hopeless', *keys[1:]])
    assert type(told.value).__name__ == 'HopelessError'
    assert told.value.__cause__ is None
    assert len(list(tmp_path.glob('*'))) < 12
    assert results().known == run.known, 'what has ended is noted'


def touch_or_end(key):
    if key == 'hopeless':
        from jobs import HopelessError

        raise HopelessError('a mistake of all')
    return touch(key)


def touch(key):
    Path(key).touch()
    time.sleep(0.3)
    return dict(key=key, status='ok', reason='')


def alive(pid):
    try:
        # A process that has ended and that nobody has waited for is a zombie.
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it took too long'
        time.sleep(0.1)
