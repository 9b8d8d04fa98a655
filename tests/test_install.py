"""tools/install.sh: which ops of mmcv it wants, takes and builds."""

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

STUBS = {
    'torch/__init__.py': """
import os
from types import SimpleNamespace
__version__ = '2.0'
cuda = SimpleNamespace(is_available=lambda: os.environ['GPU'] == '1')
version = SimpleNamespace(cuda=os.environ.get('TORCH_CUDA'))
def tensor(values, device):
    return device
""",
    'torch/utils/cpp_extension.py': "import os\nCUDA_HOME = os.environ.get('NVCC')\n",
    'mmcv/__init__.py': "__version__ = '2.1.0'\n",
    'mmcv/ops.py': """
import os
from types import SimpleNamespace
def get_compiling_cuda_version():
    return '12.8' if os.environ['BUILT'] == 'cuda' else 'not available'
def nms(boxes, scores, threshold):
    if boxes == 'cuda' and os.environ.get('BROKEN'):
        raise RuntimeError('no kernel image is available for execution on the device')
    return None, SimpleNamespace(tolist=lambda: [0, 2])
""",
}


UNSET = ('FORCE_CUDA', 'CUDA_HOME', 'TORCH_CUDA_ARCH_LIST')


@pytest.fixture
def bash(tmp_path):
    """A function: run commands after install.sh, with stand-ins for torch and mmcv."""
    for name, text in STUBS.items():
        path = tmp_path / 'stubs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(commands, **given):
        python, root = map(shlex.quote, (sys.executable, str(tmp_path)))
        start = f'source tools/install.sh; PYTHON={python}; REPO={root}\n'
        world = {'GPU': '0', 'BUILT': 'cpu', 'PYTHONPATH': str(tmp_path / 'stubs'), **given}
        clean = {k: v for k, v in os.environ.items() if k not in UNSET}
        return subprocess.run(
            ['bash', '-c', start + commands],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**clean, **world},
        )

    return run


@pytest.mark.parametrize(
    ('given', 'works'),
    [
        (dict(), True),
        (dict(BUILT='cuda'), True),
        (dict(GPU='1', BUILT='cuda'), True),
        (dict(GPU='1'), False),
        (dict(GPU='1', BUILT='cuda', BROKEN='1'), False),
        # To be used on a GPU that is elsewhere.
        (dict(FORCE_CUDA='1'), False),
        (dict(FORCE_CUDA='1', BUILT='cuda'), True),
    ],
)
def test_an_mmcv_without_the_ops_that_are_needed_does_not_work(bash, given, works):
    ops = 'cuda' if '1' in (given.get('GPU'), given.get('FORCE_CUDA')) else 'cpu'
    done = bash(f'OPS={ops}; mmcv_works', **given)
    assert (done.returncode == 0) == works, done.stderr


# No mmcv is here, no wheel is found, and the build says what it would be started with.
BUILD = """
mmcv_works() { [[ ${HERE:-} == "$OPS" ]]; }
find_mmcv() { echo "look for $OPS in $1"; mkdir -p "$1"; return 1; }
check_compiler() { :; }
env() { printf '%s\\n' "$*"; [[ $OPS != "${FAILS:-}" ]]; }
try_mmcv() { cat "$(dirname "$1")/build.log"; }
install_mmcv
"""
ALONE = 'no GPU is seen here: the ops are for the CPU alone'
GPU = dict(TORCH_CUDA='13', GPU='1')


@pytest.fixture
def nvcc(tmp_path):
    path = tmp_path / 'cuda' / 'bin' / 'nvcc'
    path.parent.mkdir(parents=True)
    path.write_text('')
    path.chmod(0o755)
    return str(path.parent.parent)


@pytest.mark.parametrize(
    ('given', 'looked', 'hidden', 'told'),
    [
        (dict(), ['cpu'], True, None),
        (dict(TORCH_CUDA='13'), ['cpu'], True, ALONE),
        (GPU, ['cuda', 'cpu'], True, 'A GPU is here but no nvcc'),
        (dict(GPU, NVCC='/no/such'), ['cuda', 'cpu'], True, 'A GPU is here but no nvcc'),
        (dict(GPU, NVCC='here'), ['cuda'], False, 'CUDA ops are built too'),
        (dict(GPU, NVCC='here', FAILS='cuda'), ['cuda', 'cpu'], True, 'not be built for the GPU'),
        (dict(GPU, NVCC='here', FORCE_CUDA='1'), ['cuda'], False, 'CUDA ops are'),
        (
            dict(TORCH_CUDA='13', FORCE_CUDA='1', NVCC='here', TORCH_CUDA_ARCH_LIST='9.0'),
            ['cuda'],
            False,
            'CUDA ops are',
        ),
    ],
)
def test_what_is_built_fits_the_machine_and_is_told(
    bash, tmp_path, nvcc, given, looked, hidden, told
):
    if given.get('NVCC') == 'here':
        given = dict(given, NVCC=nvcc)
    done = bash(BUILD, **given)
    assert done.returncode == 0, done.stderr
    name = f'{tmp_path}/.whl/cp3{sys.version_info[1]}-torch-2.0'
    folders = {'cpu': name, 'cuda': f'{name}-cuda'}
    lines = done.stdout.splitlines()
    assert [x for x in lines if x.startswith('look')] == [
        f'look for {kind} in {folders[kind]}' for kind in looked
    ]
    assert (' CUDA_VISIBLE_DEVICES= ' in lines[-1]) == hidden
    assert 'MMCV_WITH_OPS=1' in lines[-1]
    assert told is None or told in done.stdout
    assert (ALONE in done.stdout) == (told == ALONE) == ('FORCE_CUDA=1 TORCH' in done.stdout)


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        (dict(TORCH_CUDA='13'), 'there is no nvcc to build them'),
        (dict(NVCC='here'), 'the torch here is built for the CPU'),
        (dict(NVCC='here', TORCH_CUDA='13'), 'Set TORCH_CUDA_ARCH_LIST, to 9.0 for an H100'),
        (dict(GPU, NVCC='here', FAILS='cuda'), 'the build of mmcv 2.1.0 failed'),
    ],
)
def test_cuda_ops_that_are_asked_for_and_cannot_be_had(bash, nvcc, given, told):
    given = dict(given, NVCC=nvcc) if 'NVCC' in given else given
    done = bash(BUILD, FORCE_CUDA='1', **given)
    assert done.returncode == 1
    assert told in done.stderr


@pytest.mark.parametrize(('given', 'told'), [({}, False), (GPU, True)])
def test_an_mmcv_that_works_is_left_alone(bash, given, told):
    done = bash(BUILD, HERE='cpu', **given)
    assert done.returncode == 0, done.stderr
    assert 'look' not in done.stdout
    assert ('with FORCE_CUDA=1 one is made' in done.stdout) == told


def test_cuda_ops_are_asked_for_once(bash):
    """A GPU that comes and goes, as on a login node, is no reason to install again."""
    files = 'tools/install.sh setup.py pyproject.toml protune_mm/version.py requirements/a.txt'
    make = f'for f in {files}; do mkdir -p "$REPO/$(dirname $f)"; touch "$REPO/$f"; done; '
    worlds = ({}, {'GPU': '1'}, {'FORCE_CUDA': '1'})
    plain, gpu, forced = (bash(f'{make} fingerprint', **given).stdout for given in worlds)
    assert plain == gpu != forced


def test_an_environment_of_its_user_is_not_emptied(bash, tmp_path):
    """One without pip, as uv makes them, that is not active."""
    python = tmp_path / '.venv' / 'bin' / 'python'
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\ncase "$2" in *pip*) exit 1;; esac\n')
    python.chmod(0o755)
    kept = tmp_path / '.venv' / 'mine.txt'
    kept.touch()
    done = bash('unset VIRTUAL_ENV; choose_environment')
    assert done.returncode == 1
    assert '.venv is an environment without pip, or' in done.stderr
    assert 'not made by this script: remove it, or activate another' in done.stderr
    assert kept.exists()
    # One of its own is made anew, also after a kill before pip was there.
    mark = tmp_path / '.venv' / '.made_by_protune_mm'
    mark.touch()
    done = bash(
        'unset VIRTUAL_ENV; find_python() { echo stand_in; }\n'
        'stand_in() { if [[ $2 == venv ]]; then echo "$@"; mkdir "$3/bin"; '
        'ln -s "$(command -v python3)" "$3/bin/python"; fi; }\n'
        'choose_environment'
    )
    assert f'-m venv {tmp_path}/.venv' in done.stdout, done.stderr
    assert not kept.exists()
    assert mark.exists()
