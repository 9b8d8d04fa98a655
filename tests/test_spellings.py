"""The three spellings give the same model section, byte for byte once dumped."""

import sys

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS

import protune_mm
from protune_mm import cli
from protune_mm.config import config_backbones, load_config, protune_config
from protune_mm.runner import ProTuneRunner
from protune_mm.tuned import prompts
from tests.conftest import run_tool

STOCK = {
    'mmdet': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'ResNet'),
    'mmseg': (
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        'SwinTransformer',
    ),
    'mmpretrain': (
        'mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k.py',
        'VisionTransformer',
    ),
}
OPTIONS = {
    'plain': {},
    'options': dict(stages='blocks', prompt=dict(ratio=4, last='series')),
}


def model_text(cfg):
    return Config(dict(model=cfg.model.to_dict())).dump()


def spelled(tmp_path, library, options):
    """The config of each spelling, as the code that trains it sees it."""
    stock, base = STOCK[library]
    extra = ''.join(f', {key}={value!r}' for key, value in options.items())
    child = f"dict(backbone=dict(type='protune_mm.ProTuned', base={base!r}{extra}))"
    (tmp_path / 'line.py').write_text(f'_base_ = [{stock!r}]\nmodel = {child}\n')
    (tmp_path / 'beside.py').write_text(
        "_base_ = ['./line.py']\nrunner_type = 'protune_mm.ProTuneRunner'\n"
    )
    (tmp_path / 'overlay.py').write_text(
        f"_base_ = [{stock!r}, __import__('protune_mm').overlay()]\nprotune = dict({extra[2:]})\n"
    )
    (tmp_path / 'overlay_path.py').write_text(
        f"_base_ = [{stock!r}, 'protune_mm::_base_/protune.py']\nprotune = dict({extra[2:]})\n"
    )
    built = {}

    class Spy(ProTuneRunner):
        def __init__(self, model, cfg, **kwargs):
            built['cfg'] = cfg

    def through_runner(name):
        cfg = Config.fromfile(tmp_path / name)
        cfg.work_dir = str(tmp_path)
        cfg.runner_type = Spy
        RUNNERS.build(cfg)
        return built['cfg']

    return {
        '1 line': Config.fromfile(tmp_path / 'line.py'),
        '2 beside': through_runner('beside.py'),
        '2 overlay': through_runner('overlay.py'),
        '2 overlay by path': through_runner('overlay_path.py'),
        '2 overlay, load_config': protune_mm.load_config(tmp_path / 'overlay.py'),
        '3 --protune': protune_mm.load_config(stock, protune=True, **options),
        'function': protune_mm.protune_config(Config.fromfile(tmp_path / 'line.py'), **options),
    }


@pytest.mark.parametrize('library', STOCK)
@pytest.mark.parametrize('options', OPTIONS)
def test_all_spellings_dump_the_same_model(tmp_path, library, options):
    configs = spelled(tmp_path, library, OPTIONS[options])
    expected = model_text(configs['1 line'])
    assert "type='protune_mm.ProTuned'" in expected
    for name, cfg in configs.items():
        assert model_text(cfg) == expected, name
        assert 'protune' not in cfg, name
        assert 'custom_imports' not in cfg, name
        assert cfg.get('default_scope') == library, name


def test_a_dump_of_the_overlay_is_complete_and_stays_as_it_is(tmp_path):
    configs = spelled(tmp_path, 'mmdet', {})
    dumped = tmp_path / 'dumped.py'
    configs['2 overlay, load_config'].dump(dumped)
    again = protune_mm.load_config(dumped)
    assert model_text(again) == model_text(configs['1 line'])
    assert again.runner_type == 'protune_mm.ProTuneRunner'


def test_from_cfg_leaves_the_users_config_alone(tmp_path):
    cfg = Config.fromfile(_write(tmp_path, 'mmdet'))
    before = cfg.dump()
    with pytest.raises(Exception):  # noqa: B017, PT011  (no data here; how far it gets is not the point)
        RUNNERS.build(cfg)
    assert cfg.dump() == before


def _write(tmp_path, library):
    path = tmp_path / 'overlay.py'
    path.write_text(f"_base_ = [{STOCK[library][0]!r}, __import__('protune_mm').overlay()]\n")
    return path


PURE = {
    'mmdet': ('mmdet.models.backbones', 'ResNet', dict(depth=18)),
    'mmseg': ('mmseg.models.backbones', 'ResNetV1c', dict(depth=18)),
    'mmpretrain': ('mmpretrain.models.backbones', 'ResNet', dict(depth=18)),
}


@pytest.mark.parametrize('library', PURE)
@pytest.mark.parametrize('spelling', ['classes', 'strings', 'function'])
def test_a_pure_python_config_builds(tmp_path, library, spelling):
    from mmengine.registry import MODELS, init_default_scope

    module, base, options = PURE[library]
    inner = ''.join(f', {key}={value!r}' for key, value in options.items())
    (tmp_path / 'stock_base.py').write_text(
        f'from {module} import {base}\n'
        f"default_scope = {library!r}\nmodel = dict(type='X', backbone=dict(type={base}{inner}))\n"
    )
    kind, name = {
        'classes': ('ProTuned', base),
        'strings': ("'protune_mm.ProTuned'", f"'{library}.{base}'"),
        'function': ('ProTuned', f"'{library}.{base}'"),
    }[spelling]
    (tmp_path / 'child.py').write_text(
        'from mmengine.config import read_base\n'
        f'from {module} import {base}\nfrom protune_mm import ProTuned\n'
        'with read_base():\n    from .stock_base import *\n'
        f'model.update(dict(backbone=dict(type={kind}, base={name}{inner})))\n'
    )
    cfg = Config.fromfile(tmp_path / 'child.py')
    init_default_scope(library)
    for config in (cfg, _dumped(cfg, tmp_path)):
        backbone = MODELS.build(config.model.backbone)
        assert type(backbone).__name__ == base
        assert len(protune_mm.tuned_parameters(backbone)) == 24
    rewritten = protune_mm.protune_config(Config.fromfile(tmp_path / 'stock_base.py'))
    rewritten = _dumped(rewritten, tmp_path)
    assert len(protune_mm.tuned_parameters(MODELS.build(rewritten.model.backbone))) == 24


def _dumped(cfg, tmp_path):
    cfg.dump(tmp_path / 'dump.py')
    return Config.fromfile(tmp_path / 'dump.py')


def test_a_runner_type_that_is_set_is_kept():
    cfg = protune_mm.load_config(STOCK['mmdet'][0])
    cfg.runner_type = 'FlexibleRunner'
    protune_mm.protune_config(cfg)
    assert cfg.runner_type == 'FlexibleRunner'
    assert cfg.model.backbone.type == 'protune_mm.ProTuned'


def test_options_from_the_command_line_reach_a_stock_config():
    cfg = cli.read_config(
        STOCK['mmdet'][0],
        protune=True,
        policy='head-only',
        options={'model.backbone.prompt': 'paper', 'model.backbone.depth': 101},
    )
    assert cfg.model.backbone.prompt == 'paper'
    assert cfg.model.backbone.depth == 101
    assert cfg.model.backbone.policy == 'head-only'


def test_options_from_the_command_line_reach_an_overlay(tmp_path):
    options = {'protune.prompt.ratio': 4}
    cfg = cli.read_config(_write(tmp_path, 'mmdet'), options=options)
    assert cfg.model.backbone.prompt == dict(ratio=4)
    with pytest.raises(ValueError, match="type='ResNeXt' overrides"):
        cli.read_config(
            'configs/retinanet_protune_r50_coco.py',
            options={'model.backbone.type': 'ResNeXt'},
        )


def test_a_library_path_that_mmengine_takes_for_no_base():
    cfg = load_config('mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py', protune=True)
    assert cfg.model.backbone.base == 'ResNet'


def test_a_backbone_under_another_name():
    encoder = dict(type='ResNet', depth=18)
    for key, place in ((encoder, 'model.image_encoder'), ([encoder], 'model.image_encoder.0')):
        cfg = Config(dict(model=dict(type='ImageToImageRetriever', image_encoder=key)))
        ((name, backbone),) = config_backbones(protune_config(cfg))
        assert (name, backbone.type, backbone.base) == (place, 'protune_mm.ProTuned', 'ResNet')


def test_our_paths_resolve_in_a_fresh_process():
    done = run_tool('tools/inspect_model.py', 'protune_mm::retinanet_protune_r50_coco.py')
    assert 'prompts 1,409,440 (6.00% of backbone)' in done.stdout
    code = (
        'import protune_mm; from mmengine.config import Config;'
        'print(Config.fromfile(protune_mm.overlay()).runner_type)'
    )
    assert 'protune_mm.ProTuneRunner' in run_tool('-c', code).stdout
    assert sys.version_info >= (3, 10)


def test_pure_python_configs_import_what_others_name(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        'from mmdet.models.backbones import ResNet\n'
        'from protune_mm import ProTuned, ProTuneRunner\n'
        'from protune_mm.prompts import ScaleShift\n'
        'runner_type = ProTuneRunner\n'
        'backbone = dict(type=ProTuned, base=ResNet, depth=18, prompt=dict(type=ScaleShift))\n'
    )
    cfg = Config.fromfile(path)
    assert cfg.runner_type is ProTuneRunner
    for config in (cfg, _dumped(cfg, tmp_path)):
        found = prompts(MODELS.build(config.backbone)).values()
        assert {type(prompt).__name__ for prompt in found} == {'ScaleShift'}
    assert protune_mm.FewLabels.__name__ == 'FewLabels'
    with pytest.raises(AttributeError, match="no attribute 'AdamW'"):
        protune_mm.AdamW
