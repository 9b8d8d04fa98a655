"""A wheel ships the package and its .mim folder; an editable install sees the source's."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version

import pytest

import protune_mm
from protune_mm.compat import STACK, stack_versions
from tests.conftest import ROOT, run_tool


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of the source, so that no build folder is left in the tree."""
    source = tmp_path_factory.mktemp('source') / 'protune_mm'
    ignored = ('.git', '.venv', '.whl', 'build', 'work_dirs', 'data', '*.egg-info')
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored), symlinks=True)
    return source


@pytest.fixture(scope='module')
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation']
    done = subprocess.run([*command, '-w', out, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob('*.whl'))


def test_the_wheel_ships_mim_as_real_files(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ['git', 'ls-files', 'configs', 'tools'], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    expected = {f'protune_mm/.mim/{name}' for name in tracked or ['configs/_base_/protune.py']}
    assert expected <= names, expected - names
    assert 'protune_mm/.mim/model-index.yml' in names
    assert {'protune_mm/prompts/pro_tuning.py', 'protune_mm/ops/depthwise.json'} <= names
    assert not [n for n in names if '__pycache__' in n or n.startswith(('tests/', 'configs/'))]


def test_the_source_distribution_has_what_setup_reads(source, tmp_path):
    code = 'from setuptools.build_meta import build_sdist; '
    command = [sys.executable, '-c', f'{code} print(build_sdist({str(tmp_path)!r}))']
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    needed = {f'requirements/{path.name}' for path in (ROOT / 'requirements').glob('*.txt')}
    needed |= {'setup.py', 'README.md', 'protune_mm/version.py', 'tools/train.py'}
    assert needed <= names, needed - names


def test_the_wheel_works_from_elsewhere(wheel, tmp_path):
    site = tmp_path / 'site'
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        'import protune_mm, sys; from mmengine.config import Config;'
        'assert protune_mm.__file__.startswith(sys.argv[1]), protune_mm.__file__;'
        'cfg = Config.fromfile(protune_mm.overlay()); assert cfg.runner_type;'
        "cfg = protune_mm.load_config('protune_mm::retinanet_protune_r50_coco.py');"
        "Config.fromstring(\"_base_ = ['protune_mm::_base_/protune.py']\", '.py');"
        'print(cfg.model.backbone.type)'
    )
    done = run_tool('-c', code, site, env={'PYTHONPATH': str(site)}, cwd=tmp_path)
    assert 'protune_mm.ProTuned' in done.stdout


def test_it_requires_no_mm_library(wheel):
    meta = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith('METADATA'))
    lines = zipfile.ZipFile(wheel).read(meta).decode().splitlines()
    required = [x for x in lines if x.startswith('Requires-Dist') and 'extra ==' not in x]
    assert required
    assert not [line for line in required if ' mm' in line or 'onedl' in line]
    assert 'License: Apache-2.0' in lines
    assert f'Version: {protune_mm.__version__}' in lines


def test_versions_are_found_by_import_name():
    found = stack_versions()
    assert set(found) == set(STACK)
    assert found['torch'] == version('torch')
    assert 'mmsegmentation' in found['mmseg'] or found['mmseg'][0].isdigit()
    assert 'not installed' not in found.values()


def test_the_wheels_of_a_folder_with_a_space_are_found(tmp_path):
    root = tmp_path / 'my work' / 'main'
    for name in ('main/.ci', 'main/tools', 'shared/wheels'):
        (root.parent / name).mkdir(parents=True)
    shutil.copy(ROOT / '.ci' / 'run', root / '.ci')
    (root / 'tools' / 'run_tests.sh').write_text('printf %s "$PIP_FIND_LINKS"')
    with zipfile.ZipFile(root.parent / 'shared/wheels/tiny_x-1-py3-none-any.whl', 'w') as file:
        file.writestr(
            'tiny_x-1.dist-info/METADATA', 'Metadata-Version: 2.1\nName: tiny-x\nVersion: 1'
        )
        file.writestr('tiny_x-1.dist-info/WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any')
    env = {**os.environ, 'PIP_FIND_LINKS': '/elsewhere'}
    done = subprocess.run(['bash', root / '.ci/run'], capture_output=True, text=True, env=env)
    links = done.stdout
    assert links.endswith('/my%20work/shared/wheels /elsewhere')
    command = [sys.executable, '-m', 'pip', 'download', '--no-index', '--no-deps', 'tiny-x']
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**env, 'PIP_FIND_LINKS': links}
    )
    assert found.returncode == 0, found.stderr
