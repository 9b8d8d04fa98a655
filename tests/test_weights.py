"""A frozen backbone without its weights is loud, and an error when asked."""

import copy
import logging
import re

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint

from protune_mm.checkpoints import tuned_state_dict
from protune_mm.tuned import prompts
from tests.conftest import EVERY, EXAMPLES, build_protuned, build_stock, image


def warnings_of(log):
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING]


def save(module, path, change=lambda key: key):
    torch.save({'state_dict': {change(k): v for k, v in module.state_dict().items()}}, path)
    return str(path)


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_no_weights_warn_once_at_the_first_forward(library, family, log):
    tuned = build_protuned(library, family)
    tuned(image())
    tuned(image())
    assert len([w for w in warnings_of(log) if 'no weights were loaded into it' in w]) == 1


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_pretrained_is_silent_and_leaves_the_prompts_at_their_start(library, family, log, tmp_path):
    stock = build_stock(library, family)
    # mmdet's and mmseg's Swin read the keys of a whole model only.
    prefix = 'backbone.' if (family.name, library) == ('SwinTransformer', 'mmdet') else ''
    path = save(stock, tmp_path / 'w.pth', lambda key: prefix + key)
    tuned = build_protuned(
        library,
        family,
        init_cfg=ConfigDict(type='Pretrained', checkpoint=path),
        require_weights=True,
    )
    tuned.init_weights()
    tuned(image())
    assert warnings_of(log) == []
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tuned.state_dict()[name], tensor), name
    assert all(
        p.up.weight.abs().max() == 0
        for p in tuned.modules()
        if type(p).__name__ == 'ProTuningBlock'
    )


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_without_pretrained_the_stock_rules_do_not_reach_prompts(library, family):
    tuned = build_protuned(library, family)
    tuned.init_weights()
    for name, prompt in prompts(tuned).items():
        assert prompt.up.weight.abs().max() == 0, name


def test_a_trained_prompt_survives_a_second_init_weights():
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
    tuned.init_weights()
    torch.nn.init.ones_(tuned.layer1[1].prompt.up.weight)
    tuned.init_weights()
    assert torch.equal(
        tuned.layer1[1].prompt.up.weight, torch.ones_like(tuned.layer1[1].prompt.up.weight)
    )


def test_keys_of_another_library_are_loud(tmp_path, log):
    """mmdet and mmpretrain name MobileNetV2's keys differently; stock drops all of them."""
    source = MODELS.build(dict(type='mmpretrain.MobileNetV2', widen_factor=0.25))
    path = save(source, tmp_path / 'w.pth')
    config = dict(
        type='protune_mm.ProTuned',
        base='mmdet.MobileNetV2',
        widen_factor=0.25,
        init_cfg=dict(type='Pretrained', checkpoint=path),
    )
    tuned = MODELS.build(config)
    tuned.init_weights()
    tuned(image())
    loud = [w for w in warnings_of(log) if 'the loaded weights lack' in w]
    assert len(loud) == 1
    assert 'first layer1.0.' in loud[0]
    assert 'instead: load a checkpoint of this very backbone' in loud[0]
    strict = MODELS.build(dict(config, require_weights=True))
    strict.init_weights()
    for _ in range(2):
        with pytest.raises(RuntimeError, match='the loaded weights lack'):
            strict(image())


def test_a_detector_checkpoint_counts_as_weights(tmp_path, log):
    model = torch.nn.ModuleDict(
        dict(backbone=MODELS.build(dict(type='mmdet.ResNet', depth=18)), head=torch.nn.Linear(2, 2))
    )
    path = save(model, tmp_path / 'w.pth')
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, require_weights=True)
    )
    whole = torch.nn.ModuleDict(dict(backbone=tuned, head=torch.nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match='no weights were loaded into it'):
        tuned(image())
    load_checkpoint(whole, path)
    tuned(image())
    assert 'the loaded weights hold no prompts' in log.text
    assert warnings_of(log) == []


def test_output_norms_that_no_imagenet_checkpoint_has_are_no_problem(tmp_path, log):
    stock = MODELS.build(dict(type='mmseg.SwinTransformer', embed_dims=24))
    state = {k: v for k, v in stock.state_dict().items() if not k.startswith('norm')}
    tuned = MODELS.build(
        dict(type='protune_mm.ProTuned', base='mmseg.SwinTransformer', embed_dims=24)
    )
    tuned.load_state_dict(state, strict=False)
    tuned(image())
    assert warnings_of(log) == []


def test_tables_that_a_backbone_computes_are_no_problem(log):
    for parameter in EVERY:
        library, family = parameter.values
        if (library, family.name) == ('mmpretrain', 'SwinTransformerV2'):
            stock = build_stock(library, family)
            tuned = build_protuned(library, family, require_weights=True)
            tuned.load_state_dict(stock.state_dict(), strict=False)
            tuned(image(1, 64, 64))
            return
    raise AssertionError('it is gone')


def test_missing_batch_statistics_are_a_problem(log):
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    state = {k: v for k, v in stock.state_dict().items() if 'running' not in k}
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18))
    tuned.load_state_dict(state, strict=False)
    tuned(image())
    assert any('lack 40 of its' in w and 'bn1.running_mean' in w for w in warnings_of(log))


def test_a_module_given_with_its_weights_is_not_asked(log):
    import protune_mm

    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    protune_mm.protune(stock)(image())
    assert warnings_of(log) == []


def test_weights_of_another_width_are_an_error_when_asked(tmp_path):
    """PyTorch reports a wrong shape apart from missing keys, and mmengine only logs it."""
    source = MODELS.build(dict(type='mmpretrain.MobileNetV2', widen_factor=0.5))
    tuned = MODELS.build(
        dict(
            type='protune_mm.ProTuned',
            base='mmpretrain.MobileNetV2',
            widen_factor=0.25,
            require_weights=True,
            init_cfg=dict(type='Pretrained', checkpoint=save(source, tmp_path / 'w.pth')),
        )
    )
    tuned.init_weights()
    with pytest.raises(RuntimeError, match='which has another shape there'):
        tuned(image())


def test_norms_inside_the_stages_are_not_exempt(log):
    config = dict(depth=18, norm_cfg=dict(type='GN', num_groups=8))
    stock = MODELS.build(dict(type='mmdet.ResNet', **config))
    state = {k: v for k, v in stock.state_dict().items() if '.gn' not in k}
    tuned = MODELS.build(dict(type='protune_mm.ProTuned', base='mmdet.ResNet', **config))
    tuned.load_state_dict(state, strict=False)
    tuned(image())
    assert any('layer1.0.gn1.weight' in w for w in warnings_of(log))


def test_init_weights_keeps_the_weights_a_module_came_with():
    import protune_mm

    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
    before = {k: v.clone() for k, v in stock.state_dict().items()}
    tuned = protune_mm.protune(stock)
    tuned.init_weights()
    for name, tensor in before.items():
        assert torch.equal(tuned.state_dict()[name], tensor), name


def test_rules_of_the_model_around_that_reach_them_are_a_problem(log):
    import protune_mm

    rule = dict(type='Kaiming', layer='Conv2d')
    for init_cfg in (None, rule):
        model = BaseModule(init_cfg=init_cfg)
        stock = MODELS.build(dict(type='mmdet.ResNet', depth=18))
        model.backbone = protune_mm.protune(stock, require_weights=True)
        if init_cfg is None:
            model.init_weights()
            model.backbone(image())
            assert 'drawn anew' not in log.text
            continue
        model.init_weights()
        told = r'of its tensors, first conv1\.weight, were drawn anew after the backbone had come'
        with pytest.raises(RuntimeError, match=told):
            model.backbone(image())
        # What is loaded afterwards counts.
        model.backbone.load_state_dict(stock.state_dict())
        model.backbone(image())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu_what_comes_after_starts_as_without_prompts():
    drawn = []
    for policy in ('prompts', 'head-only'):
        config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, policy=policy)
        backbone = MODELS.build(config).cuda()
        torch.manual_seed(0)
        backbone.init_weights()
        drawn.append(torch.rand(3, device='cuda'))
    assert torch.equal(*drawn)


def test_weights_that_a_stock_rule_draws_anew_are_a_problem(tmp_path, log):
    """As MMPretrain's transformers do where `init_cfg` is a list."""
    config = dict(base='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=32)
    path = tmp_path / 'base.pth'
    torch.save(MODELS.build(dict(type='protune_mm.ProTuned', **config)).state_dict(), path)
    rule = dict(type='Pretrained', checkpoint=str(path))
    whole = MODELS.build(dict(type='protune_mm.ProTuned', **config, init_cfg=rule))
    whole.init_weights()
    whole(torch.zeros(1, 3, 32, 32))
    assert 'drawn anew' not in log.text
    drawn = MODELS.build(dict(type='protune_mm.ProTuned', **config, init_cfg=[rule]))
    drawn.init_weights()
    drawn(torch.zeros(1, 3, 32, 32))
    assert re.search(r'first pos_embed, were drawn anew after they had been loaded', log.text)
    # So the file can be loaded again.
    assert 'pos_embed' in tuned_state_dict(drawn)
    asked = dict(config, init_cfg=[rule], require_weights=True)
    asked = MODELS.build(dict(type='protune_mm.ProTuned', **asked))
    asked.init_weights()
    with pytest.raises(RuntimeError, match='a dict and no list'):
        asked(torch.zeros(1, 3, 32, 32))


def test_what_is_no_new_draw(tmp_path, log):
    stock = MODELS.build(dict(type='mmdet.ResNet', depth=18)).state_dict()
    torch.save(stock, tmp_path / 'base.pth')
    rule = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, init_cfg=rule)
    backbone = MODELS.build({**config, 'require_weights': True})
    backbone.init_weights()
    for again in (copy.deepcopy(backbone), backbone.double()):
        again.init_weights()
        again(torch.zeros(1, 3, 32, 32, dtype=next(again.parameters()).dtype))
    with torch.inference_mode():
        backbone = MODELS.build({**config, 'require_weights': True})
        backbone.init_weights()
        backbone.load_state_dict(stock)
        backbone(torch.zeros(1, 3, 32, 32))
