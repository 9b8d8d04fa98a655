"""Every stock way to load a checkpoint fetches the base of one that holds prompts only.

The predictions are those of the whole checkpoint, bit for bit; another base, or none, is an error.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

import protune_mm
from protune_mm.identity import KEY
from protune_mm.tuned import frozen_keys
from tests.conftest import STOCK_TOOLS, run_tool
from tests.small_runs import QUICK, SHAPES, data

pytestmark = pytest.mark.filterwarnings('ignore')


class Case:
    """A config, a whole checkpoint, the same without frozen weights, and two files of bases."""

    def __init__(self, library, config, whole, root, options=None):
        self.library, self.config, self.whole = library, str(config), str(whole)
        self.base, self.other, self.tuned = (root / f'{n}.pth' for n in ('base', 'other', 'tuned'))
        checkpoint = torch.load(whole, weights_only=True)
        cfg = protune_mm.load_config(self.config, cfg_options=options)
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(self.base))
        with DefaultScope.overwrite_default_scope(library):
            model = MODELS.build(cfg.model)
        state = {k: v for k, v in checkpoint['state_dict'].items() if f'.{KEY}.' not in k}
        frozen = frozen_keys(model)
        base = {k.removeprefix('backbone.'): state[k] for k in frozen}
        torch.save(base, self.base)
        name = next(k for k, v in sorted(base.items()) if v.is_floating_point() and v.ndim == 4)
        torch.save({**base, name: base[name] * 1.5}, self.other)
        model.load_state_dict(state, strict=False)
        checkpoint['state_dict'] = protune_mm.tuned_state_dict(model)
        assert not frozen & checkpoint['state_dict'].keys()
        torch.save(checkpoint, self.tuned)


@pytest.fixture(scope='module')
def cases(trained, trained_seg, trained_cls, tmp_path_factory):
    whole = sorted(trained[0].glob('epoch_*.pth'))[-1]
    given = dict(
        mmdet=(SHAPES, whole, {'model.backbone.init_cfg': None}),
        mmseg=(*trained_seg,),
        mmpretrain=(*trained_cls,),
    )
    return {
        library: Case(library, config, checkpoint, tmp_path_factory.mktemp(library), *options)
        for library, (config, checkpoint, *options) in given.items()
    }


@pytest.fixture(scope='module')
def picture():
    return np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)


def init_detector(config, checkpoint, picture):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(config, checkpoint, device='cpu')
    # Untrained scores are below any threshold.
    model.roi_head.test_cfg.score_thr = 0.0
    found = inference_detector(model, picture).pred_instances
    return torch.cat([found.bboxes.flatten(), found.scores])


def det_inferencer(config, checkpoint, picture):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(config, checkpoint, device='cpu', show_progress=False)
    inferencer.model.roi_head.test_cfg.score_thr = 0.0
    found = inferencer(picture, return_datasamples=True)['predictions'][0].pred_instances
    return torch.cat([found.bboxes.flatten(), found.scores])


def init_model(config, checkpoint, picture):
    from mmseg.apis import inference_model, init_model

    return inference_model(init_model(config, checkpoint, device='cpu'), picture).seg_logits.data


def seg_inferencer(config, checkpoint, picture):
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(config, checkpoint, device='cpu')
    return torch.from_numpy(inferencer(picture)['predictions'])


def get_model(config, checkpoint, picture):
    from mmpretrain import ImageClassificationInferencer, get_model

    model = get_model(config, checkpoint, device='cpu')
    return torch.from_numpy(ImageClassificationInferencer(model)(picture)[0]['pred_scores'])


def classification_inferencer(config, checkpoint, picture):
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer(config, checkpoint, device='cpu')
    return torch.from_numpy(inferencer(picture)[0]['pred_scores'])


def feature_extractor(config, checkpoint, picture):
    from mmpretrain import FeatureExtractor

    return FeatureExtractor(config, checkpoint, device='cpu')(picture)[0][-1]


WAYS = {
    'mmdet': (init_detector, det_inferencer),
    'mmseg': (init_model, seg_inferencer),
    'mmpretrain': (get_model, classification_inferencer, feature_extractor),
}
EACH = [
    pytest.param(library, way, id=way.__name__) for library, ways in WAYS.items() for way in ways
]


@pytest.mark.parametrize(('library', 'way'), EACH)
def test_it_is_the_model_of_the_whole_file(library, way, cases, picture, monkeypatch):
    case = cases[library]
    expected = way(case.config, case.whole, picture)
    assert expected.numel() > 1
    monkeypatch.setenv('PROTUNE_ALLOW_ORIGIN', '1')
    assert torch.equal(way(case.config, str(case.tuned), picture), expected)
    monkeypatch.delenv('PROTUNE_ALLOW_ORIGIN')
    monkeypatch.setenv('PROTUNE_BASE', str(case.base))
    assert torch.equal(way(case.config, str(case.tuned), picture), expected)


@pytest.mark.parametrize(('library', 'way'), EACH)
def test_another_base_or_none_is_an_error(library, way, cases, picture, monkeypatch):
    case = cases[library]
    with pytest.raises(RuntimeError) as none:
        way(case.config, str(case.tuned), picture)
    assert str(case.base) in str(none.value)
    assert 'PROTUNE_ALLOW_ORIGIN' in str(none.value)
    monkeypatch.setenv('PROTUNE_BASE', str(case.other))
    with pytest.raises(RuntimeError, match='another base') as other:
        way(case.config, str(case.tuned), picture)
    assert str(case.base) in str(other.value)
    assert str(case.other) in str(other.value)


@pytest.mark.parametrize(
    ('library', 'ours'), [*((library, False) for library in WAYS), ('mmpretrain', True)]
)
def test_the_test_scripts_score_the_same(library, ours, cases, shapes, tmp_path):
    """test.py of the library, and ours."""
    case = cases[library]
    script = 'tools/test.py' if ours else STOCK_TOOLS[library] / 'test.py'
    options = {'mmdet': [*QUICK[1:], *data(shapes)], 'mmpretrain': [], 'mmseg': []}[library]
    options = ['--cfg-options', *options] if options else []
    options += ['--no-pin-memory'] if library == 'mmpretrain' else []
    scores = []
    for name, env in ((case.whole, {}), (case.tuned, {'PROTUNE_ALLOW_ORIGIN': '1'})):
        work = tmp_path / Path(name).stem
        run_tool(script, case.config, name, '--work-dir', work, *options, env=env)
        (log,) = work.glob('*/*.json')
        found = json.loads(log.read_text())
        scores.append({k: v for k, v in found.items() if k not in ('time', 'data_time')})
    assert scores[0] == scores[1]
    assert scores[0]
    refused = run_tool(
        script, case.config, case.tuned, '--work-dir', tmp_path / 'refused', *options, check=False,
        env={'PROTUNE_BASE': str(case.other)},
    )  # fmt: skip
    assert refused.returncode != 0
    last = refused.stderr.strip().splitlines()[-1]
    assert 'another base' in last
    assert str(case.base) in last
    assert str(case.other) in last


def test_mmengine_load_checkpoint(cases, monkeypatch):
    """What all of these call."""
    case = cases['mmpretrain']
    monkeypatch.setenv('PROTUNE_ALLOW_ORIGIN', '1')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        models = [MODELS.build(protune_mm.load_config(case.config).model) for _ in range(2)]
    load_checkpoint(models[0], case.whole, map_location='cpu')
    load_checkpoint(models[1], str(case.tuned), map_location='cpu')
    states = [model.state_dict() for model in models]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
