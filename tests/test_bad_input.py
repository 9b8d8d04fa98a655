"""Bad input gives one clear error that names the thing and what would be right."""

import shutil

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from torch import nn

import protune_mm
from tests.conftest import ROOT, run_tool

STOCK = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'


def build(**backbone):
    init_default_scope('mmdet')
    config = dict(type='protune_mm.ProTuned', base='ResNet', depth=18)
    return MODELS.build({**config, **backbone})


CASES = [
    (dict(base='ResNt'), r"base='ResNt' is no model of scope 'mmdet': did you mean 'ResNet'\?"),
    (dict(base='Qqq'), r"base='Qqq' is no model of scope 'mmdet': give its library"),
    (dict(base='protune_mm.ProTuned'), 'nests Pro-tuning'),
    (dict(stages=['layer5']), r"ResNet has no stage 'layer5' \(did you mean 'layer\d'\?\)"),
    (dict(stages=['layer1', 'layer1.1']), "names block 'layer1.1' twice"),
    (dict(stages='every'), "stages='every' is unknown"),
    (dict(stages=[]), r'stages=\[\] is unknown'),
    (dict(prompt=dict(ratio=65)), "stage 'layer1': ratio=65 leaves no channel of 64"),
    (
        dict(prompt=dict(type='Nope')),
        "prompt.type='Nope' is unknown: known are Adapter, .*ProTuningBlock",
    ),
    (dict(prompt=dict(rate=3)), "stage 'layer1'.*unexpected keyword argument 'rate'"),
    (dict(prompt=dict(ratio='4')), "stage 'layer1': ratio='4' is no number"),
    (dict(prompt=dict(kernel_size=4)), "stage 'layer1': kernel_size=4 shifts the map"),
    (dict(prompt=dict(kernel_size=-1)), "stage 'layer1': kernel_size=-1 is no side in pixels"),
    (dict(prompt=dict(scale=float('nan'))), "stage 'layer1': scale=nan is not finite"),
    (dict(prompt=dict(depthwise='no')), "stage 'layer1': depthwise='no' is neither True nor"),
    (
        dict(prompt=dict(norm_cfg=dict(type='GN'))),
        r"stage 'layer1': norm_cfg=\{'type': 'GN'\}: mmcv refuses it \(AssertionError\)",
    ),
    (
        dict(prompt=dict(norm_cfg=dict(type='Foo'))),
        r"layer1': norm_cfg=\{'type': 'Foo'\}: mmcv knows no type 'Foo'",
    ),
    (
        dict(prompt=dict(act_cfg=dict(type='Foo'))),
        r"layer1': act_cfg=\{'type': 'Foo'\}: mmcv knows no type 'Foo'",
    ),
    (dict(stages=3), 'stages=3 is unknown: use None for every stage'),
    (dict(stages=True), 'stages=True is unknown: use None for every stage'),
    (
        dict(prompt=dict(init_mode='principal', last='series')),
        "prompt.init_mode='principal' adds nothing at first, and prompt.last='series'",
    ),
    (dict(prompt=dict(last='first')), "prompt.last='first' is unknown: use one of residual"),
    (
        dict(prompt='papr'),
        "prompt='papr' is unknown: use 'paper', 'principal', 'principal-trained' or a",
    ),
    (dict(policy='half'), "policy='half' is unknown: use one of prompts, head-only, full, bias"),
]


@pytest.mark.parametrize(('backbone', 'message'), CASES, ids=lambda c: str(c)[:40])
def test_factory(backbone, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(**backbone)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (dict(prompt=8), 'prompt=8 is neither a name nor a dict'),
        (dict(prompt=['a']), r"prompt=\['a'\] is neither a name nor a dict"),
        (dict(require_weights='no'), "require_weights='no' is neither True nor False"),
        (dict(affine='yes'), "affine='yes' is neither True nor False"),
        (dict(base_checkpoint=3), 'base_checkpoint=3 is neither a string nor None'),
    ],
)
def test_options_of_another_type(backbone, message):
    with pytest.raises(TypeError, match=message):
        build(**backbone)


def test_a_backbone_that_cannot_be_tuned_says_so_before_it_is_built():
    with pytest.raises(ValueError, match='VPD cannot be Pro-tuned: it is a diffusion network'):
        build(base='mmseg.VPD', no_such_argument=1)


def test_unknown_family_names_the_known_ones_and_the_file():
    class Mine(nn.Module):
        pass

    message = r'Mine is of no known backbone family \(ResNet, .*\): name its stages.*add_a_backbone'
    with pytest.raises(ValueError, match=message):
        protune_mm.protune(Mine())
    with pytest.raises(ValueError, match=message):
        protune_mm.protune(Mine(), stages='blocks')


def test_a_part_of_a_prompt_that_is_a_name(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("model = dict(backbone=dict(type='protune_mm.ProTuned', base='mmdet.ResNet', "
                    "depth=18, prompt='principal'))")  # fmt: skip
    with pytest.raises(ValueError, match=r'config.py with --cfg-options: prompt=.*_delete_=True'):
        protune_mm.load_config(str(path), cfg_options={'model.backbone.prompt.type': 'LoRA'})


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.never = nn.Conv2d(3, 3, 1)
        self.box = nn.ModuleList()
        self.custom = Custom(nn.Conv2d(3, 3, 1))
        self.fine = nn.Conv2d(3, 3, 1)
        self.back = Back()

    def forward(self, x):
        self.pair(x)
        self.back(x)
        return self.fine(self.custom(x))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Back(nn.Module):
    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Custom(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ('stage', 'error', 'message'),
    [
        ('pair', TypeError, r"stage 'pair' yields a tuple; a prompt needs a \(B, C, H, W\)"),
        (
            'back',
            TypeError,
            r"'back' yields a tensor of shape .*the channels, changes with the size",
        ),
        ('never', TypeError, r"stage 'never' never runs in Odd.forward"),
        ('box', ValueError, r"stage 'box' is empty"),
        ('custom', ValueError, r"'custom': Custom is a container with a forward of its own"),
    ],
)
def test_a_stage_that_yields_something_unexpected(stage, error, message):
    module = Odd()
    before = dict(module.named_parameters())
    with pytest.raises(error, match=message):
        protune_mm.protune(module, stages=['fine', stage])
    assert_untouched(module, before)


def assert_untouched(module, before):
    assert type(module) is Odd
    assert type(module.fine) is nn.Conv2d
    assert dict(module.named_parameters()).keys() == before.keys()
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())


def test_a_ratio_error_leaves_the_module_untouched():
    module = Odd()
    before = dict(module.named_parameters())
    with pytest.raises(ValueError, match="stage 'fine': ratio=8 leaves no channel of 3"):
        protune_mm.protune(module, stages=['fine'])
    assert_untouched(module, before)


def test_applied_again():
    module = build()
    assert protune_mm.protune(module) is module, 'the same options change nothing'
    with pytest.raises(ValueError, match='Pro-tuned already'):
        protune_mm.protune(module, prompt=dict(ratio=4))
    with pytest.raises(ValueError, match="submodule '0' is Pro-tuned already"):
        protune_mm.protune(nn.Sequential(module), stages=['0.layer1'])


@pytest.mark.parametrize(
    ('base', 'option'),
    [
        (dict(type='mmpretrain.TinyViT', arch='5m'), 'use_checkpoint'),
        (dict(type='mmpretrain.RepLKNet', arch='31B'), 'with_cp'),
    ],
    ids=str,
)
def test_a_backbone_that_computes_whole_blocks_again(base, option):
    stock = MODELS.build(dict(base, **{option: True}))
    with pytest.raises(ValueError, match=f'with {option}=True computes whole blocks again'):
        protune_mm.protune(stock)
    protune_mm.protune(stock, policy='full')


def test_a_compiled_module():
    module = torch.compile(Odd(), backend='eager')
    with pytest.raises(ValueError, match=r'compiled already: .*then call torch\.compile'):
        protune_mm.protune(module, stages=['_orig_mod.fine'])
    assert all(p.requires_grad for p in module.parameters())


def test_configs():
    with pytest.raises(ValueError, match=r'has no model\.backbone'):
        protune_mm.protune_config(Config(dict(model=dict(type='X'))))
    with pytest.raises(ValueError, match=r'has no model\.backbone'):
        protune_mm.protune_config(Config(dict()))
    for kind, instead in (
        ('TimmClassifier', "with type='TIMMBackbone'"),
        ('mmpretrain.HuggingFaceClassifier', 'with the backbone of MMPretrain or timm'),
    ):
        with pytest.raises(ValueError, match=f'is one network: use ImageClassifier {instead}'):
            protune_mm.protune_config(Config(dict(model=dict(type=kind))))
    cfg = protune_mm.load_config(STOCK, protune=True, prompt=dict(ratio=4))
    before = cfg.dump()
    protune_mm.protune_config(cfg)
    protune_mm.protune_config(cfg, prompt=dict(ratio=4))
    with pytest.raises(ValueError, match='Pro-tuned already, with prompt='):
        protune_mm.protune_config(cfg, prompt=dict(ratio=2))
    with pytest.raises(ValueError, match="option 'ratio' is unknown: known are stages, prompt"):
        protune_mm.protune_config(cfg, ratio=2)
    assert cfg.dump() == before, 'nothing half-written'


GRANDCHILD = [
    ("model = dict(backbone=dict(type='ResNeXt'))", r"type='ResNeXt' overrides.*base='ResNeXt'"),
    (
        "model = dict(backbone=dict(_delete_=True, type='ResNet', depth=18))",
        'model.backbone is not Pro-tuned',
    ),
]


@pytest.mark.parametrize(('line', 'message'), GRANDCHILD)
def test_a_grandchild_that_drops_the_prompts_is_noticed_at_start(tmp_path, line, message):
    path = tmp_path / 'grandchild.py'
    ours = ROOT / 'configs/mask_rcnn_protune_r50_coco.py'
    path.write_text(f"_base_ = ['{ours}']\n{line}\nwork_dir = '{tmp_path}'\n")
    with pytest.raises(ValueError, match=message):
        RUNNERS.build(Config.fromfile(path))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('tools/train.py', 'nowhere.py'), 'nowhere.py'),
        (('tools/train.py', STOCK, '--policy', 'full'), 'is not Pro-tuned; add --protune'),
        (('tools/train.py', 'protune_mm::nowhere.py'), 'nowhere.py'),
        (
            (
                'tools/inspect_model.py',
                'configs/retinanet_protune_r50_coco.py',
                '--cfg-options',
                'model.backbone.base=ResNt',
            ),
            "did you mean 'ResNet'?",
        ),
    ],
)
def test_tools_end_in_one_line(arguments, message):
    done = run_tool(*arguments, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1
    assert message in errors[0]
    assert 'Traceback' not in done.stderr


def test_a_config_that_refuses_its_values_ends_in_one_line(tmp_path):
    child = tmp_path / 'child.py'
    child.write_text(
        f"_base_ = ['{ROOT}/configs/retinanet_protune_r50_coco.py']\n"
        "raise ValueError('no task of that name')\n"
    )
    done = run_tool('tools/inspect_model.py', child, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f'error: {child}, line 2: no task of that name'
    assert 'Traceback' not in done.stderr


def test_a_coco_folder_with_a_missing_file_is_named(tmp_path, shapes):
    broken = tmp_path / 'shapes'
    shutil.copytree(shapes, broken)
    (broken / 'annotations/train.json').unlink()
    done = run_tool(
        'tools/train.py',
        'configs/small/mask_rcnn_protune_mobilenetv2_shapes.py',
        '--work-dir',
        tmp_path / 'work',
        '--cfg-options',
        f'train_dataloader.dataset.data_root={broken}/',
        'model.backbone.init_cfg=None',
        check=False,
    )
    assert done.returncode == 2
    assert 'annotations/train.json' in done.stderr.splitlines()[-1]
