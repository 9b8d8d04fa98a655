"""The benchmarks refuse what they would measure in vain, and leave whole tables alone."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import ROOT


@pytest.fixture
def tool(monkeypatch):
    """A function: run the main program of a benchmark with arguments, up to its tests."""
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))

    def run(name, *arguments):
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
        monkeypatch.setattr(module, 'check_tests', lambda *_, **__: sys.exit('the tests run'))
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
        with pytest.raises(SystemExit) as ended:
            module.main()
        return ended.value.code

    return run


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('memory', ['--cases', 'ViT'], "'ViT' is unknown: there are ResNet-50; MobileNetV2; Conv"),
        ('speed', ['--cases', 'UPerNet R50'], "'UPerNet R50' is unknown: there are ResNet-50; Mob"),
        ('wire', ['--cases', 'Swin-T'], "'Swin-T' is unknown: there are ResNet-50, 10 classes; M"),
        ('memory', ['--cases', 'ViT-B'], '--cases measures a part, docs/benchmark holds all'),
        ('speed', ['--rows', 'lean'], '--rows measures a part, docs/benchmark holds all'),
        ('speed', ['--device', 'cuda'], '--device cuda: PyTorch sees no GPU here'),
        ('products', ['--cases', 'ViT-B'], 'unrecognized arguments: --cases ViT-B'),
        ('tasks', ['--peft', '.peft'], 'unrecognized arguments: --peft .peft'),
        ('wire', ['--peft', '.peft'], 'unrecognized arguments: --peft .peft'),
    ],
)
def test_bad_arguments_are_one_line_before_the_tests(tool, capsys, name, arguments, message):
    assert tool(name, *arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('memory', []),
        ('memory', ['--cases', 'ViT-B', '--out', 'elsewhere']),
        ('speed', ['--models', '--cases', 'UPerNet R50', '--rows', 'lean', '--out', 'elsewhere']),
        ('wire', []),
    ],
)
def test_good_arguments_go_on(tool, name, arguments):
    assert tool(name, *arguments) == 'the tests run'


@pytest.mark.parametrize(
    ('text', 'refused'),
    [
        ('def test_a(): pass', None),
        ('def test_a(): assert 0', 'the tests fail'),
        ('import pytest\n@pytest.mark.skip\ndef test_a(): pass', 'no test has passed'),
        (None, 'the tests fail'),
    ],
)
def test_no_numbers_without_a_test_that_passes(monkeypatch, tmp_path, text, refused):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))
    from cases import check_tests

    file = tmp_path / 'test_it.py'
    file.write_text(text or '')
    arguments = (str(file), f'--rootdir={tmp_path}', '-c', '/dev/null', '-p', 'no:cacheprovider')
    if text is None:
        arguments += ('--no-such-option',)
    if refused is None:
        check_tests(*arguments)
        return
    with pytest.raises(SystemExit) as ended:
        check_tests(*arguments)
    assert f'no benchmark: {refused}' in ended.value.code
    # Which pytest says on standard error.
    assert ('unrecognized arguments' in ended.value.code) == (text is None)


def test_the_trainings_on_two_nodes_do_not_see_a_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '0')
    import wire

    started = []

    def start(command, env, **_):
        started.append(env['CUDA_VISIBLE_DEVICES'])
        return SimpleNamespace(communicate=lambda: ('', None), returncode=0)

    monkeypatch.setattr(wire.subprocess, 'Popen', start)
    node = SimpleNamespace(rank=0, inside=[], environment={})
    wire.train((node, node), Path('config.py'), 'full', Path('work'))
    assert started == ['', '']


def test_the_document_of_memory_is_what_the_tool_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools' / 'benchmark'))
    import memory

    folder = ROOT / 'docs' / 'benchmark'
    rows = json.loads((folder / 'memory.json').read_text())['rows']
    text = memory.table(rows, SimpleNamespace(peft='.peft', cases=None))
    assert (folder / 'memory.md').read_text().startswith(f'{text}\n')
