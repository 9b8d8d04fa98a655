"""MMDetection's semi-supervised detectors, a student and its mean teacher."""

import copy
import logging
from types import SimpleNamespace

import mmdet.models  # noqa: F401
import pytest
import torch
from mmdet.engine.hooks import MeanTeacherHook
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

import protune_mm
from protune_mm.checkpoints import (
    FillBaseHook,
    TunedCheckpointHook,
    note_origin,
    tuned_state_dict,
)
from protune_mm.hooks import FrozenGuardHook
from protune_mm.loading import origin_told
from protune_mm.tuned import prompts

DETECTOR = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict(
        type='protune_mm.ProTuned', base='MobileNetV2', out_indices=(1, 2, 4, 7), widen_factor=0.25
    ),
    neck=dict(
        type='FPN',
        in_channels=[8, 8, 24, 1280],
        out_channels=16,
        num_outs=5,
        start_level=1,
        add_extra_convs='on_output',
    ),
    bbox_head=dict(
        type='RetinaHead',
        num_classes=3,
        in_channels=16,
        stacked_convs=1,
        feat_channels=16,
        anchor_generator=dict(
            type='AnchorGenerator',
            octave_base_scale=4,
            scales_per_octave=3,
            ratios=[1.0],
            strides=[8, 16, 32, 64, 128],
        ),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0] * 4, target_stds=[1] * 4),
    ),
    test_cfg=dict(nms_pre=10, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5)),
)


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(ConfigDict(copy.deepcopy(cfg)))


def detector(**backbone):
    return {**DETECTOR, 'backbone': {**DETECTOR['backbone'], **backbone}}


def semi(**backbone):
    return build(
        dict(
            type='SemiBaseDetector',
            detector=detector(**backbone),
            data_preprocessor=dict(
                type='MultiBranchDataPreprocessor',
                data_preprocessor=dict(type='DetDataPreprocessor'),
            ),
            semi_train_cfg=dict(freeze_teacher=True),
            semi_test_cfg=dict(predict_on='teacher'),
        )
    )


def runner_of(model):
    return SimpleNamespace(
        model=model, _resume=False, logger=logging.getLogger('semi'), hooks=[], iter=0
    )


def load(model, state, address=None):
    """As our runner does."""
    checkpoint = dict(state_dict=dict(state))
    FillBaseHook().after_load_checkpoint(runner_of(model), checkpoint)
    with origin_told():
        load_state_dict(model, checkpoint['state_dict'], strict=False, logger=None)
    note_origin(model, checkpoint, address or 'file.pth')


@pytest.fixture
def base(tmp_path):
    path = tmp_path / 'base.pth'
    torch.save(build(detector(policy='full')).backbone.state_dict(), path)
    return dict(type='Pretrained', checkpoint=str(path))


def test_a_training_starts_from_a_tuned_detector(base):
    tuned = build(detector(init_cfg=base))
    tuned.init_weights()
    for prompt in prompts(tuned).values():
        nn.init.normal_(prompt.up.weight)
    state = tuned_state_dict(tuned)
    assert 'backbone.conv1.conv.weight' not in state
    model = semi(init_cfg=base)
    model.init_weights()
    load(model, state)
    for part in (model.student, model.teacher):
        mine = part.state_dict()
        for name, tensor in tuned.state_dict().items():
            assert torch.equal(mine[name], tensor), name


def test_checkpoints_after_a_stock_detector_was_loaded_load_again(base, tmp_path):
    stock = build(detector(policy='full')).state_dict()
    model = semi(init_cfg=base)
    model.init_weights()
    load(model, stock, str(tmp_path / 'detector.pth'))
    assert torch.equal(
        model.student.backbone.conv1.conv.weight, stock['backbone.conv1.conv.weight']
    )
    written = dict(state_dict=dict(model.state_dict()))
    TunedCheckpointHook().before_save_checkpoint(runner_of(model), written)
    again = semi(init_cfg=base)
    load(again, written['state_dict'])
    mine = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.parametrize('policy', ['prompts', 'head-only'])
def test_a_teacher_may_be_averaged(policy):
    model = semi(policy=policy)
    model.train()
    hooks = [MeanTeacherHook(), FrozenGuardHook()]
    runner = runner_of(model)
    runner.hooks = hooks
    for hook in hooks:
        hook.before_train(runner)
    for runner.iter in range(3):
        sum(
            out.square().mean() for out in model.student.extract_feat(torch.randn(2, 3, 64, 64))
        ).backward()
        for hook in hooks:
            hook.after_train_iter(runner, 0)
    for hook in hooks:
        hook.after_train(runner)
    with torch.no_grad():
        model.student.backbone.conv1.conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r'student\.backbone\.conv1\.conv\.weight. moved'):
        hooks[1].after_train(runner)


@pytest.mark.parametrize('prompt', ['principal', 'principal-trained'])
def test_a_teacher_gets_a_start_that_had_to_wait(prompt):
    model = nn.Module()
    for name in ('student', 'teacher'):
        stock = build(dict(DETECTOR['backbone'], policy='full'))
        setattr(model, name, protune_mm.protune(stock, stages='inside', prompt=prompt))
    model.teacher.requires_grad_(False).eval()
    model.student.train()
    hooks = [MeanTeacherHook(), FrozenGuardHook()]
    runner = runner_of(model)
    runner.hooks = hooks
    for hook in hooks:
        hook.before_train(runner)
    # A batch in which nothing differs decides nothing.
    for runner.iter, images in enumerate(
        [torch.zeros(2, 3, 64, 64), *torch.randn(2, 2, 3, 64, 64)]
    ):
        sum(out.square().mean() for out in model.student(images)).backward()
        for hook in hooks:
            hook.after_train_iter(runner, 0)
    followers = prompts(model.teacher)
    for name, one in prompts(model.student).items():
        assert one.started
        assert not one.waits
        # float32: an average of a tensor with itself, at most.
        torch.testing.assert_close(followers[name].down.weight, one.down.weight)
