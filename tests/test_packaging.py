"""A wheel ships the package and its .mim folder; an editable install sees the source's."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version

import pytest

import protune_mm
from protune_mm.compat import STACK, stack_versions
from tests.conftest import ROOT, run_tool


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """A wheel built from a copy, so that no build folder is left in the tree."""
    source = tmp_path_factory.mktemp('source') / 'protune_mm'
    ignored = ('.git', '.venv', '.whl', 'build', 'work_dirs', 'data', '*.egg-info')
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*ignored), symlinks=True)
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
