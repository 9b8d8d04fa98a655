"""tools/install.sh: which ops of mmcv it wants, takes and builds."""

import os
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


@pytest.fixture
def bash(tmp_path):
    """A function: run commands after install.sh, with stand-ins for torch and mmcv."""
    for name, text in STUBS.items():
        path = tmp_path / 'stubs' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(commands, **given):
        start = f'source tools/install.sh; PYTHON={sys.executable}; REPO={tmp_path}\n'
        world = {'GPU': '0', 'BUILT': 'cpu', 'PYTHONPATH': str(tmp_path / 'stubs'), **given}
        clean = {k: v for k, v in os.environ.items() if k not in ('FORCE_CUDA', 'CUDA_HOME')}
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
    done = bash('OPS=$(needed_ops); mmcv_works', **given)
    assert (done.returncode == 0) == works, done.stderr


# No wheel is found, and the build says what it would be started with.
BUILD = """
find_mmcv() { echo "look for $OPS in $1"; mkdir -p "$1"; return 1; }
check_compiler() { :; }
env() { printf '%s\\n' "$*"; }
try_mmcv() { cat "$(dirname "$1")/build.log"; }
install_mmcv
"""
ALONE = 'no GPU is seen here: the ops are for the CPU alone'


@pytest.mark.parametrize(
    ('given', 'looked', 'hidden', 'told'),
    [
        (dict(), ['cpu'], True, None),
        (dict(TORCH_CUDA='13'), ['cpu'], True, ALONE),
        (dict(TORCH_CUDA='13', GPU='1'), ['cuda', 'cpu'], True, 'A GPU is here but no nvcc'),
        (dict(TORCH_CUDA='13', GPU='1', NVCC='/cuda'), ['cuda'], False, 'CUDA ops are built too'),
        (dict(TORCH_CUDA='13', FORCE_CUDA='1', NVCC='/cuda'), ['cuda'], False, 'CUDA ops are'),
    ],
)
def test_what_is_built_fits_the_machine_and_is_told(bash, tmp_path, given, looked, hidden, told):
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
    assert (ALONE in done.stdout) == (told == ALONE) == ('FORCE_CUDA=1 builds' in done.stdout)


def test_cuda_ops_without_nvcc_are_refused(bash):
    done = bash(BUILD, FORCE_CUDA='1')
    assert done.returncode == 1
    assert 'error: FORCE_CUDA=1 asks for CUDA ops of mmcv, and there is no nvcc' in done.stderr


def test_an_environment_for_the_cpu_is_another_than_one_for_a_gpu(bash, tmp_path):
    files = 'tools/install.sh setup.py pyproject.toml protune_mm/version.py requirements/a.txt'
    make = f'for f in {files}; do mkdir -p "$REPO/$(dirname $f)"; touch "$REPO/$f"; done; '
    found = {bash(f'{make} fingerprint', **given).stdout for given in ({}, {}, {'GPU': '1'})}
    assert len(found) == 2
