"""What a training shows: counts and memory in its log and TensorBoard, pictures of its prompts."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import HOOKS, MODELS

from protune_mm.report import parameter_counts
from protune_mm.show import PromptVisualizationHook, _pictures
from protune_mm.tuned import prompts
from tests.conftest import build_protuned, image, move_prompts, run_tool
from tests.small_runs import CLS, QUICK, SEG, SHAPES, data

DRAW = """
custom_hooks = [dict(type='protune_mm.PromptVisualizationHook', images=3, size=96)]
visualizer = dict(
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
)
"""


def drawn(work):
    return sorted(Path(work).glob('*/vis_data/vis_image/prompts_*.png'))


@pytest.fixture(scope='module')
def shown(pictures, tmp_path_factory):
    work = tmp_path_factory.mktemp('shown')
    config = work / 'cls.py'
    config.write_text(CLS.format(root=str(pictures / 'classes')) + DRAW)
    plain = ['--no-pin-memory', '--no-persistent-workers', '--cfg-options']
    options = ['train_cfg.max_epochs=2', 'default_hooks.logger.interval=1']
    done = run_tool('tools/train.py', config, '--work-dir', work, *plain, *options)
    return work, done.stdout + done.stderr


def test_the_log_tells_counts_and_memory(shown):
    _, text = shown
    assert '% of the model frozen' in text
    steps = [line for line in text.splitlines() if 'Epoch(train)' in line]
    assert len(steps) == 6
    assert all(' time: ' in line and ' memory: ' in line for line in steps)


def test_a_classifier_inside_the_backbone_counts_as_a_head():
    model = MODELS.build(dict(type='protune_mm.ProTuned', base='mmpretrain.LeNet5', num_classes=10))
    counts = parameter_counts(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts['rest'] == sum(p.numel() for p in model.classifier.parameters())
    assert counts['prompts'] + counts['rest'] == trained
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())


def test_tensorboard_has_them(shown):
    work, text = shown
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (folder,) = work.glob('*/vis_data')
        events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    counts = {
        name: events.Scalars(f'parameters/{name}')[0].value
        for name in ('frozen', 'prompts', 'neck_and_head', 'frozen_share')
    }
    line = next(line for line in text.splitlines() if 'Pro-tuning: backbone frozen' in line)
    for name in ('frozen', 'prompts', 'neck_and_head'):
        assert f'{counts[name]:,.0f}' in line, name
    share = counts['frozen'] / (sum(counts.values()) - counts['frozen_share'])
    assert counts['frozen_share'] == pytest.approx(100 * share, rel=1e-5)
    assert {'time', 'memory', 'loss'} <= set(tags['scalars'])
    assert all(event.value > 100 for event in events.Scalars('memory')), 'MiB of a process'
    assert 'prompts_0' in tags['images']


def test_counts_are_in_the_json_too(shown):
    work, _ = shown
    (file,) = work.glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert sum('parameters/frozen_share' in row for row in rows) == 1


def test_pictures_are_in_the_work_folder(shown):
    work, _ = shown
    files = drawn(work)
    # Three images at each of two validations.
    assert [file.name for file in files] == [
        f'prompts_{i}_{s}.png' for i in range(3) for s in (3, 6)
    ]
    # The input and four prompts, each 96 x 72 below its title.
    sheets = [cv2.imread(str(file)) for file in files]
    assert {sheet.shape for sheet in sheets} == {(72 + 20, 5 * 96, 3)}
    cells = np.split(sheets[-1][20:], 5, axis=1)
    assert all((cells[0] != cell).any() for cell in cells[1:]), 'trained prompts add something'


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_detection_and_segmentation(library, shapes, pictures, tmp_path):
    config = tmp_path / 'config.py'
    if library == 'mmdet':
        config.write_text(f"_base_ = ['{Path(SHAPES).resolve()}']\n{DRAW}")
        options = ['--cfg-options', *QUICK, *data(shapes)]
    else:
        stock = 'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
        config.write_text(SEG.format(stock=stock, root=str(pictures)) + DRAW)
        options = []
    run_tool('tools/train.py', config, '--work-dir', tmp_path, *options)
    assert len(drawn(tmp_path)) == 3


class Runner:
    """As much of a runner as the hook touches."""

    def __init__(self, model):
        self.model, self.visualizer, self.logger = model, self, self
        self.sheets, self.warnings, self._train_loop = {}, [], None

    def add_image(self, name, sheet, step):
        self.sheets[name] = sheet

    def warning(self, text):
        self.warnings.append(text)


def look(backbone, hook=None, batches=1):
    """What the hook draws in a validation of two images a batch."""
    model = torch.nn.ModuleDict(dict(backbone=backbone))
    runner = Runner(model)
    hook = hook or PromptVisualizationHook(images=2)
    hook.before_val_epoch(runner)
    with torch.no_grad():
        for _ in range(batches):
            hook.before_val_iter(runner, 0)
            backbone(image())
            hook.after_val_iter(runner, 0)
    return runner


def family(name, library='mmpretrain'):
    from protune_mm.stages import FAMILIES

    return next(f for f in FAMILIES if f.name == name and library in f.examples)


def test_what_is_drawn_is_what_is_added(monkeypatch):
    """Against the stage's output before and after its prompt, computed by hand."""
    backbone = build_protuned('mmpretrain', family('ResNet'))
    move_prompts(backbone)
    seen = {}
    monkeypatch.setattr(
        PromptVisualizationHook, '_sheet', lambda self, picture, norms: seen.update(norms)
    )
    look(backbone)
    name, prompt = next(iter(prompts(backbone).items()))
    block = backbone.get_submodule(name.removesuffix('.prompt'))
    kept = {}
    block.register_forward_hook(lambda module, args, out: kept.update(after=out))
    prompt.register_forward_pre_hook(lambda module, args: kept.update(before=args[0]))
    with torch.no_grad():
        backbone(image())
    added, given = seen[name.removesuffix('.prompt')]
    # The last image of the batch was drawn last.
    torch.testing.assert_close(given, kept['before'][1].norm(dim=0))
    torch.testing.assert_close(
        added, (kept['after'] - kept['before'])[1].norm(dim=0), rtol=1e-4, atol=1e-5
    )
    assert len(seen) == len(prompts(backbone))


def test_no_hook_stays_on_the_model():
    backbone = build_protuned('mmpretrain', family('ResNet'))
    look(backbone)
    assert not any(m._forward_hooks for m in prompts(backbone).values())
    assert not backbone._forward_pre_hooks


def test_number_of_images_and_interval():
    backbone = build_protuned('mmpretrain', family('ResNet'))
    hook = PromptVisualizationHook(images=3, interval=2)
    assert sorted(look(backbone, hook, batches=4).sheets) == ['prompts_0', 'prompts_1', 'prompts_2']
    assert look(backbone, hook).sheets == {}
    assert look(backbone, hook).sheets


def test_class_token_and_tokens_are_drawn_as_maps():
    runner = look(build_protuned('mmpretrain', family('SwinTransformer')))
    assert len(runner.sheets) == 2
    assert not runner.warnings


def test_prompts_without_places_are_told_once():
    backbone = build_protuned(
        'mmpretrain', family('SwinTransformer'), prompt=dict(type='LoRA', rank=2)
    )
    runner = look(backbone, batches=2)
    assert runner.sheets == {}
    assert len(runner.warnings) == 1


@pytest.mark.parametrize('to_rgb', [True, False])
def test_the_picture_is_the_image(to_rgb):
    """Denormalized, and in RGB whatever the backbone was trained on."""
    config = dict(
        type='mmengine.ImgDataPreprocessor', mean=[103.5, 116.3, 123.7], std=[58.4, 57.1, 57.4],
        bgr_to_rgb=to_rgb,
    )  # fmt: skip
    model = torch.nn.Module()
    model.data_preprocessor = MODELS.build(config)
    bgr = torch.randint(0, 256, (3, 8, 9), generator=torch.Generator().manual_seed(0)).byte()
    inputs = model.data_preprocessor(dict(inputs=[bgr.clone()]))['inputs']
    (picture,) = _pictures(inputs, model)
    assert np.array_equal(picture, bgr.flip(0).permute(1, 2, 0).numpy())


def test_a_gray_image_is_drawn():
    (picture,) = _pictures(torch.full((1, 1, 4, 5), 7.0), torch.nn.Module())
    assert picture.shape == (4, 5, 3)
    assert (picture == 7).all()


@pytest.mark.parametrize('option', ['images', 'interval', 'size'])
def test_bad_options(option):
    with pytest.raises(ValueError, match=f'{option}=0 must be 1 or more'):
        HOOKS.build(dict(type='protune_mm.PromptVisualizationHook', **{option: 0}))
