"""The inference functions and inferencers of the three libraries take a Pro-tuned checkpoint."""

import json

import mmcv
import numpy as np
import pytest
import torch

from protune_mm import tuned_parameters
from tests.conftest import run_tool
from tests.small_runs import SHAPES

# Runs in an interpreter that has not imported protune_mm: naming it in the config is enough.
INIT = """
import json, sys
from {api} import {init} as init
assert 'protune_mm' not in sys.modules
model = init({config!r}, {checkpoint!r}, device='cpu')
from protune_mm import tuned_parameters
sums = {{name: float(p.double().sum()) for name, p in tuned_parameters(model).items()}}
{predict}
print('RESULT ' + json.dumps(dict(sums=sums, predicted=predicted, training=model.training)))
"""


def initialized(api, init, config, checkpoint, predict):
    """What a fresh interpreter reports after loading; the prompts are those of the file."""
    text = INIT.format(
        api=api, init=init, config=str(config), checkpoint=str(checkpoint), predict=predict
    )
    done = run_tool('-c', text)
    result = json.loads(done.stdout.split('RESULT ')[1])
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    expected = {k: float(v.double().sum()) for k, v in state.items() if '.prompt.' in k}
    assert result['sums'] == pytest.approx(expected, rel=1e-12)
    assert any(abs(v) > 0 for k, v in expected.items() if '.up.' in k), 'the prompts have trained'
    assert not result['training']
    return result['predicted']


def newest(work):
    return max(work.glob('epoch_*.pth'), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope='session')
def picture(tmp_path_factory):
    """Path of one image."""
    path = tmp_path_factory.mktemp('picture') / 'picture.png'
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    mmcv.imwrite(noise, str(path))
    return path


def test_init_detector(trained, picture):
    predict = (
        'from mmdet.apis import inference_detector\n'
        f'found = inference_detector(model, {str(picture)!r}).pred_instances\n'
        'predicted = [list(found.bboxes.shape), list(found.masks.shape)]'
    )
    boxes, masks = initialized('mmdet.apis', 'init_detector', SHAPES, newest(trained[0]), predict)
    assert boxes[1] == 4
    assert masks[1:] == [48, 64]


def test_init_model(trained_seg, picture):
    predict = (
        'from mmseg.apis import inference_model\n'
        f'predicted = list(inference_model(model, {str(picture)!r}).pred_sem_seg.data.shape)'
    )
    assert initialized('mmseg.apis', 'init_model', *trained_seg, predict) == [1, 48, 64]


def test_get_model(trained_cls, picture):
    config, checkpoint = trained_cls
    predict = (
        'from mmpretrain import ImageClassificationInferencer as Inferencer\n'
        f'predicted = Inferencer(model)({str(picture)!r})[0]["pred_label"]'
    )
    # `get_model` names its second argument `pretrained`; the order is the same.
    assert initialized('mmpretrain', 'get_model', config, checkpoint, predict) in (0, 1)


def same_prompts(model, checkpoint):
    state = torch.load(checkpoint, weights_only=True)['state_dict']
    mine = tuned_parameters(model)
    assert mine
    for name, parameter in mine.items():
        assert torch.equal(parameter, state[name]), name


@pytest.mark.filterwarnings('ignore')
def test_det_inferencer(trained, picture):
    from mmdet.apis import DetInferencer

    checkpoint = newest(trained[0])
    inferencer = DetInferencer(SHAPES, str(checkpoint), device='cpu', show_progress=False)
    same_prompts(inferencer.model, checkpoint)
    found = inferencer(str(picture), return_datasamples=True)['predictions'][0].pred_instances
    assert found.masks.shape[1:] == (48, 64)


@pytest.mark.filterwarnings('ignore')
def test_seg_inferencer(trained_seg, picture):
    from mmseg.apis import MMSegInferencer

    config, checkpoint = trained_seg
    inferencer = MMSegInferencer(str(config), str(checkpoint), device='cpu')
    same_prompts(inferencer.model, checkpoint)
    assert inferencer(str(picture))['predictions'].shape == (48, 64)


@pytest.mark.filterwarnings('ignore')
def test_image_classification_inferencer(trained_cls, picture):
    from mmpretrain import ImageClassificationInferencer

    config, checkpoint = trained_cls
    inferencer = ImageClassificationInferencer(str(config), str(checkpoint), device='cpu')
    same_prompts(inferencer.model, checkpoint)
    assert inferencer(str(picture))[0]['pred_scores'].shape == (2,)
