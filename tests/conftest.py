"""Shared fixtures: the stage table as parameters, scopes, and small data written on the fly."""

import copy
import importlib.util
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    # What the stack warns of while it is imported is not ours; later warnings are errors.
    warnings.simplefilter('ignore')
    import mmdet.models
    import mmpretrain.models
    import mmseg.models
    from mmengine.logging import MMLogger
    from mmengine.registry import MODELS, DefaultScope

    import protune_mm
    from protune_mm.stages import FAMILIES

from tests.processes import EPOCHS, PLAIN, TRAIN, dist, finish
from tests.small_runs import CLS, QUICK, SEG, SHAPES, data

ROOT = Path(__file__).parent.parent
STOCK_TOOLS = {
    m.__name__: Path(m.__file__).parent / '.mim/tools' for m in (mmdet, mmseg, mmpretrain)
}


def needs(family):
    """Skip a row whose backbones come from a library that is not installed."""
    missing = family.requires and importlib.util.find_spec(family.requires) is None
    return [pytest.mark.skip(f'{family.requires} is not installed')] if missing else []


EVERY = [
    pytest.param(library, family, id=f'{library}-{family.name}', marks=needs(family))
    for family in FAMILIES
    for library in family.examples
]
"""The whole stage table: for tests of seconds in all."""
SAMPLE = ('ResNet', 'MobileNetV2', 'ConvNeXt', 'SwinTransformer', 'VisionTransformer')
EXAMPLES = [param for param in EVERY if param.values[1].name in SAMPLE]
"""One family of each kind, for tests that take longer."""


def example(library, family):
    """A copy of a row's example config, and its type."""
    config = copy.deepcopy(family.examples[library])
    return config, config.pop('type')


def defined(backbone):
    """A backbone without weights that mmdet leaves as the memory was: a NaN equals nothing."""
    for module in backbone.modules():
        if type(module).__name__ == 'TridentConv':
            torch.nn.init.kaiming_uniform_(module.weight)
    return backbone


def build_stock(library, family, **more):
    """The stock backbone of a row's example, in evaluation mode (some `eval` return None)."""
    config, kind = example(library, family)
    backbone = MODELS.build(dict(type=f'{library}.{kind}', **{**config, **more}))
    backbone.eval()
    return defined(backbone)


def build_protuned(library, family, **more):
    """The Pro-tuned backbone of a row's example, in evaluation mode."""
    config, kind = example(library, family)
    config = {**config, **more}
    base = f'{library}.{kind}'
    return defined(MODELS.build(dict(type='protune_mm.ProTuned', base=base, **config)).eval())


def pair(library, family, **more):
    """A stock backbone and a Pro-tuned one with the same weights.

    The stock one is frozen too: PyTorch picks other kernels for weights that need a gradient,
    which differ in the last bit.
    """
    torch.manual_seed(0)
    stock = build_stock(library, family)
    stock.requires_grad_(False)
    tuned = build_protuned(library, family, **more)
    tuned.load_state_dict(stock.state_dict())
    return stock, tuned


def flat(outputs):
    """All tensors of a backbone's output, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for output in outputs if output is not None for tensor in flat(output)]


def image(batch=2, height=64, width=96):
    """A non-square image, so that a mixed-up axis shows."""
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def move_prompts(module):
    """Give the prompts a visible effect, the same each time."""
    from protune_mm.tuned import prompts

    generator = torch.Generator().manual_seed(2)
    for prompt in prompts(module).values():
        for parameter in prompt.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.fixture
def library_scope(request):
    """Some backbones build their layers through the default scope."""
    params = request.node.callspec.params if hasattr(request.node, 'callspec') else {}
    with DefaultScope.overwrite_default_scope(params.get('library', 'mmdet')):
        yield


@pytest.fixture(autouse=True)
def clean_scope():
    """No default scope leaks from one test into the next."""
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def log(caplog):
    """Text of everything logged during a test, through mmengine's logger too."""
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


def run_tool(*arguments, check=True, env=None, cwd=ROOT):
    """Run a script with this Python as a user would, from the repository root."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})},
    )
    if check:
        assert done.returncode == 0, f'{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return done


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """A COCO-format folder with a dozen drawn images."""
    out = tmp_path_factory.mktemp('data') / 'shapes'
    run_tool('tools/make_shapes.py', out, '--train', 6, '--val', 4, '--size', 96, 64)
    return out


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    """Six images with semantic masks (three classes), and the same in folders of two classes."""
    import cv2
    import numpy as np

    root = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    for i in range(6):
        picture = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        for folder in ('images', f'classes/{"ab"[i % 2]}', 'masks'):
            (root / folder).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f'images/{i}.png'), picture)
        cv2.imwrite(str(root / f'classes/{"ab"[i % 2]}/{i}.png'), picture)
        mask = rng.integers(0, 3, (48, 64), dtype=np.uint8)
        cv2.imwrite(str(root / f'masks/{i}.png'), mask)
    return root


@pytest.fixture(scope='session')
def trained(shapes, tmp_path_factory):
    """Work folder of one epoch of the quickstart's config, and what was printed."""
    work = tmp_path_factory.mktemp('trained')
    done = run_tool(
        'tools/train.py', SHAPES, '--work-dir', work, '--cfg-options', *QUICK, *data(shapes)
    )
    return work, done


@pytest.fixture(scope='session')
def trained_seg(pictures, tmp_path_factory):
    """A segmentor's config, the checkpoint of three iterations with mmseg's own train.py."""
    work = tmp_path_factory.mktemp('trained_seg')
    config = work / 'seg.py'
    stock = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
    config.write_text(SEG.format(stock=stock, root=str(pictures)))
    run_tool(STOCK_TOOLS['mmseg'] / 'train.py', config, '--work-dir', work)
    return config, work / 'iter_3.pth'


@pytest.fixture(scope='session')
def trained_cls(pictures, tmp_path_factory):
    """A classifier's config, the checkpoint of one epoch with mmpretrain's own train.py."""
    work = tmp_path_factory.mktemp('trained_cls')
    config = work / 'cls.py'
    config.write_text(CLS.format(root=str(pictures / 'classes')))
    plain = ['--no-pin-memory', '--no-persistent-workers']
    run_tool(STOCK_TOOLS['mmpretrain'] / 'train.py', config, *plain, '--work-dir', work)
    return config, work / 'epoch_1.pth'


@pytest.fixture(scope='session')
def distributed(pictures, tmp_path_factory):
    """A function: the config of a training, for the batch size of each process."""
    root = tmp_path_factory.mktemp('dist')
    torch.manual_seed(0)
    stock = protune_mm.load_config('mmpretrain::resnet/resnet18_8xb32_in1k.py').model.backbone
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        torch.save(MODELS.build(stock).state_dict(), root / 'base.pth')

    def make(batch, epochs=EPOCHS):
        path = root / f'config_{batch}_{epochs}.py'
        more = TRAIN.format(batch=batch, epochs=epochs, base=str(root / 'base.pth'))
        text = CLS.format(root=str(pictures / 'classes')).replace('batch_size=2', 'batch_size=1', 1)
        (root / f'stock_{batch}.py').write_text(text)
        path.write_text(f"_base_ = ['stock_{batch}.py']\n{more}")
        return path

    return make


@pytest.fixture(scope='session')
def two(distributed, tmp_path_factory):
    """Work folder of two processes with a batch of one each."""
    work = tmp_path_factory.mktemp('two')
    finish(dist('dist_train', distributed(1), 2, '--work-dir', work, *PLAIN))
    return work
