"""The script of faults: its quickest cases end well, and it can fail."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT


def run(*args):
    command = [sys.executable, '-W', 'ignore', 'tools/faults.py', '--quick', *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_cases_end_well():
    done = run('--only', 'disk full while saving', 'bit-flipped checkpoint', 'wrong base')
    assert done.returncode == 0, done.stdout + done.stderr
    assert '4 of 4 cases ended well' in done.stdout
    assert done.stdout.count('right model, bit for bit') == 2, 'as it ends, and in the table'


def test_a_case_that_ends_badly_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import faults

    def wrong(bench, count):
        (tmp_path / 'output').write_text('all is well')
        return faults.clear_error(0, tmp_path)

    bench = SimpleNamespace(of_case=lambda name: bench)
    roots = []
    monkeypatch.setattr(faults, 'Bench', lambda root, *_, **__: roots.append(root) or bench)
    monkeypatch.setattr(faults, 'CASES', {'undisturbed': lambda *_: 'fine', 'wrong': wrong})
    monkeypatch.setattr(sys, 'argv', ['faults.py', '--keep', 'deep/kept'])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='1'):
        faults.main()
    shown = capsys.readouterr().out
    assert 'FAILED: the program ended as if all were well' in shown
    assert '1 of 2 cases ended well' in shown
    # Where a malicious file's code would write, and where that is looked for.
    assert roots == [Path.cwd()] == [tmp_path / 'deep/kept']


def test_a_gpu_of_the_machine_is_hidden(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    import faults

    faults.wait(faults.begin(['sh', '-c', 'echo "<$CUDA_VISIBLE_DEVICES>"'], tmp_path))
    assert faults.last_line(tmp_path) == '<>'
