"""What is exported loads where it should and computes what the model computed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

import protune_mm
from protune_mm.checkpoints import tuned_state_dict
from protune_mm.identity import KEY
from protune_mm.tuned import backbones
from tests.conftest import CLS, ROOT, SEG, flat, image, move_prompts

sys.path.insert(0, str(ROOT / 'tools'))
import export


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A classifier's config, and the tuned-only file of it; a segmentor's; one with LoRA."""
    root = tmp_path_factory.mktemp('export')
    torch.manual_seed(0)
    made = {}
    for kind in ('cls', 'seg', 'lora'):
        if kind == 'seg':
            stock = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
            text = SEG.format(stock=stock, root=str(root))
        else:
            text = CLS.format(root=str(root))
        base = root / f'{kind}_base.pth'
        config = root / f'{kind}.py'
        init = f"dict(type='Pretrained', checkpoint={str(base)!r})"
        more = ", prompt=dict(type='LoRA', rank=2)" if kind == 'lora' else ''
        config.write_text(text.replace("base='ResNet", f"init_cfg={init}{more}, base='ResNet"))
        cfg = protune_mm.load_config(str(config))
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            cfg.model.backbone.init_cfg = None
            cfg.model.pop('data_preprocessor', None)
            model = MODELS.build(cfg.model)
            model.init_weights()
        (backbone,) = backbones(model).values()
        frozen = {k: v for k, v in backbone.state_dict().items() if '.prompt.' not in k}
        torch.save(frozen, base)
        move_prompts(backbone)
        backbone._protune.origin = dict(checkpoint=str(base))
        checkpoint = root / f'{kind}.pth'
        meta = dict(dataset_meta=dict(classes=('a', 'b')), epoch=3)
        torch.save(dict(meta=meta, state_dict=tuned_state_dict(model), optimizer={}), checkpoint)
        made[kind] = (config, checkpoint, model.eval())
    return made


def run(*args):
    command = [sys.executable, '-W', 'ignore', 'tools/export.py', *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def same(model, other, tolerance=0.0):
    x = image(1, 64, 64)
    with torch.no_grad():
        pairs = list(zip(flat(model.extract_feat(x)), flat(other.extract_feat(x)), strict=True))
    return all((a - b).abs().max() <= tolerance * a.abs().max() for a, b in pairs)


def rebuilt(config, path, stock=False):
    cfg = protune_mm.load_config(str(config))
    if stock:
        for key in ('prompt', 'init_cfg'):
            cfg.model.backbone.pop(key)
        cfg.model.backbone.type = cfg.model.backbone.pop('base')
    cfg.model.pop('data_preprocessor', None)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        load_checkpoint(model, str(path), strict=True)
    return model.eval()


def test_there_and_back_again(trained, tmp_path):
    config, checkpoint, model = trained['cls']
    full, tuned = tmp_path / 'full.pth', tmp_path / 'tuned.pth'
    done = run('full', config, checkpoint, full)
    assert done.returncode == 0, done.stderr
    state = torch.load(full, weights_only=True)
    assert 'optimizer' not in state
    assert state['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert 'backbone.conv1.weight' in state['state_dict']
    assert same(model, rebuilt(config, full))
    model_, meta, _ = export.load(str(config), str(full))
    export.write(dict(meta=meta, state_dict=export.weights(model_, 'tuned')), tuned)
    assert tuned.stat().st_size < full.stat().st_size / 4
    before = torch.load(checkpoint, weights_only=True)['state_dict']
    after = torch.load(tuned, weights_only=True)['state_dict']
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in after.items())


def test_half_precision_loads_and_is_half_the_size(trained, tmp_path):
    config, checkpoint, model = trained['cls']
    loaded = export.load(str(config), str(checkpoint))[0]
    for what, other in (('tuned', checkpoint), ('full', None)):
        path = export.write(
            dict(state_dict=export.weights(loaded, what, half=True)), tmp_path / 'h'
        )
        if other:
            assert path.stat().st_size < other.stat().st_size * 0.6
        assert same(model, rebuilt(config, path), 2e-2)  # float16


def test_half_of_a_base_of_no_file_loads(trained, tmp_path):
    config, checkpoint, model = trained['cls']
    loaded = export.load(str(config), str(checkpoint))[0]
    loaded.backbone._protune.origin['mixture'] = True
    state = export.weights(loaded, 'tuned', half=True)
    assert state['backbone.conv1.weight'].dtype == torch.float32
    assert state['head.fc.weight'].dtype == torch.float16
    path = export.write(dict(state_dict=state), tmp_path / 'h.pth')
    assert same(model, rebuilt(config, path), 2e-2)  # float16


def test_a_published_file_has_its_hash_in_its_name(trained, tmp_path):
    import hashlib

    config, checkpoint, _ = trained['cls']
    done = run('tuned', config, checkpoint, tmp_path / 'birds.pth', '--publish')
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob('*.pth')
    assert path.name == f'birds-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    assert str(path) in done.stdout


def test_merged_is_a_stock_checkpoint(trained, tmp_path):
    config, checkpoint, model = trained['lora']
    loaded = export.load(str(config), str(checkpoint))[0]
    state = export.weights(loaded, 'merged')
    assert not [key for key in state if 'prompt' in key or KEY in key]
    path = export.write(dict(state_dict=state), tmp_path / 'merged.pth')
    assert same(model, rebuilt(config, path, stock=True), 1e-4)  # float32


def test_what_does_not_merge_says_so(trained, tmp_path):
    config, checkpoint, _ = trained['cls']
    done = run('merged', config, checkpoint, tmp_path / 'merged.pth')
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith('error: ProTuningBlock cannot be merged')
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings('ignore')  # PyTorch's exporter uses what PyTorch deprecates.
@pytest.mark.parametrize(('kind', 'backbone'), [('cls', False), ('cls', True), ('seg', False)])
def test_onnx_computes_the_same(trained, tmp_path, kind, backbone):
    pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    config, checkpoint, _ = trained[kind]
    model, _, cfg = export.load(str(config), str(checkpoint))
    path = Path(tmp_path, 'model.onnx')
    assert export.to_onnx(model, cfg, path, (64, 96), backbone) < 1e-4
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.filterwarnings('ignore')
def test_onnx_of_other_outputs_is_not_written(trained, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')
    pytest.importorskip('onnxscript', reason='onnxscript is not installed')
    config, checkpoint, _ = trained['seg']
    model, _, cfg = export.load(str(config), str(checkpoint))

    class Broken(onnxruntime.InferenceSession):
        def run(self, *args):
            first, *others = super().run(*args)
            return [first, *(other * float('nan') for other in others)]

    monkeypatch.setattr(onnxruntime, 'InferenceSession', Broken)
    with pytest.raises(ValueError, match='differs from PyTorch by nan'):
        export.to_onnx(model, cfg, tmp_path / 'model.onnx', (64, 96), backbone=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('onnx', '{cls}', '{pth}', 'no/such/x.onnx'), 'no/such is no folder'),
        (('onnx', '{cls}', '{pth}', 'x.onnx', '--half'), '--half and --publish are for'),
        (('full', '{cls}', '{pth}', '{out}', '--backbone'), '--backbone and --shape are for onnx'),
        (('full', '{cls}', '{base}', '{out}'), 'ResNet is frozen, but the loaded weights lack'),
        (('tuned', '{cls}', '{base}', '{out}'), 'ResNet is frozen, but the loaded weights lack'),
        (('tuned', '{cls}', 'none.pth', '{out}'), 'none.pth can not be found'),
        (('tuned', 'mmpretrain::resnet/resnet18_8xb32_in1k.py', '{pth}', '{out}'), 'add --protune'),
        (('tuned', '{lora}', '{pth}', '{out}'), 'tuned with prompt.type='),
    ],
)
def test_bad_input_is_one_line(trained, tmp_path, args, message):
    names = dict(cls=trained['cls'][0], pth=trained['cls'][1], lora=trained['lora'][0])
    names['base'] = names['pth'].with_name('cls_base.pth')  # Its keys lack the prefix.
    done = run(*(arg.format(out=tmp_path / 'x.pth', **names) for arg in args))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
