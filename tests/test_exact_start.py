"""A fresh Pro-tuned backbone gives the stock output exactly, for every row of the table."""

import copy

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import protune_mm
from tests.conftest import EXAMPLES, build_stock, example, flat, image, move_prompts, pair


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
@pytest.mark.parametrize('stages', [None, 'blocks'])
def test_output_is_the_stock_output_bit_for_bit(library, family, stages):
    stock, tuned = pair(library, family, stages=stages, lean=False)
    x = image()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for i, (a, b) in enumerate(zip(flat(stock(x)), flat(tuned(x)), strict=True)):
                assert torch.equal(a, b), f'output {i} differs by {(a - b).abs().max()}'


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
@pytest.mark.parametrize('lean', [False, 'memory', 'time'])
def test_output_is_the_trainable_stock_output_but_for_rounding(library, family, lean):
    stock, tuned = pair(library, family, lean=lean)
    trainable = build_stock(library, family)
    trainable.load_state_dict(stock.state_dict())
    x = image()
    for a, b in zip(flat(trainable(x)), flat(tuned(x)), strict=True):
        # float32: PyTorch picks other kernels for weights that need a gradient, and lean layers
        # fold batch norms.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_prompts_change_the_output(library, family):
    stock, tuned = pair(library, family)
    move_prompts(tuned)
    x = image()
    for i, (a, b) in enumerate(zip(flat(stock(x)), flat(tuned(x)), strict=True)):
        assert a.shape == b.shape
        assert not torch.allclose(a, b), f'output {i} is blind to the prompts'


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_new_keys_are_exactly_the_prompts(library, family):
    stock, tuned = pair(library, family)
    added = set(tuned.state_dict()) - set(stock.state_dict())
    assert set(stock.state_dict()) <= set(tuned.state_dict())
    assert added == set(protune_mm.tuned_parameters(tuned))
    assert type(tuned).__name__ == type(stock).__name__
    assert isinstance(tuned, type(stock))


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_same_seed_leaves_the_random_state_as_stock_does(library, family):
    """So that the neck and head of one seed start alike, Pro-tuned or not."""
    config, kind = example(library, family)
    states = []
    for spelled in (
        dict(type=f'{library}.{kind}'),
        dict(type='protune_mm.ProTuned', base=f'{library}.{kind}'),
    ):
        torch.manual_seed(0)
        MODELS.build(dict(**spelled, **config)).init_weights()
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize('lean', [False, True])
def test_load_from_a_stock_detector_begins_at_its_predictions(lean, tmp_path, log):
    from mmengine.config import Config
    from mmengine.runner import load_checkpoint

    cfg = Config.fromfile('configs/small/mask_rcnn_protune_mobilenetv2_shapes.py')
    init_default_scope('mmdet')
    backbone = cfg.model.backbone
    backbone.pop('init_cfg')
    stock_cfg = copy.deepcopy(cfg.model)
    stock_cfg.backbone.type = stock_cfg.backbone.pop('base')
    torch.manual_seed(0)
    stock = MODELS.build(stock_cfg).eval()
    cfg.model.backbone.lean = lean
    tuned = MODELS.build(cfg.model).eval()
    torch.save(dict(state_dict=stock.state_dict()), tmp_path / 'stock.pth')
    load_checkpoint(tuned, str(tmp_path / 'stock.pth'))  # What the Runner does for `load_from`.
    assert 'the prompts keep their start' in log.text
    assert 'missing keys' not in log.text
    from mmdet.structures import DetDataSample

    sample = DetDataSample(
        metainfo=dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1, 1))
    )
    sample.set_metainfo(dict(pad_shape=(96, 128), batch_input_shape=(96, 128)))
    x = image(1, 96, 128)
    with torch.no_grad():
        a = stock.predict(x, [sample.clone()])[0].pred_instances
        b = tuned.predict(x, [sample.clone()])[0].pred_instances
    assert len(a) > 0
    for key in ('bboxes', 'scores', 'labels', 'masks'):
        one, other = torch.as_tensor(a[key]), torch.as_tensor(b[key])
        if lean:
            # float32, pixels up to 128; folded batch norms round differently.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
        else:
            assert torch.equal(one, other), key
