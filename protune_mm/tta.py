"""Test-time augmentation, as the stock test scripts of the three libraries set it up."""

from __future__ import annotations

import copy

from mmengine.config import Config, ConfigDict

from .config import library

DEFAULT_MODELS = {
    'mmdet': dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
    ),
    'mmseg': dict(type='SegTTAModel'),
    'mmpretrain': dict(type='mmpretrain.AverageClsScoreTTA'),
}


def use_tta(cfg: Config) -> None:
    """Wrap ``cfg.model`` for test-time augmentation and set its pipeline, in place.

    The config's ``tta_model`` and ``tta_pipeline`` are used; where it has none, predictions on
    the image and on its mirror image are merged, as in the stock scripts.
    """
    scope = library(cfg)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'tta_pipeline' not in cfg:
        pipeline = copy.deepcopy(list(dataset.pipeline))
        pack = pipeline[-1]
        if scope == 'mmdet':
            keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
            pack = dict(type=pack['type'], meta_keys=(*keys, 'flip', 'flip_direction'))
        # Scores are those of the first view, whose ground truth must be that of the image.
        flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
        pipeline[-1] = dict(type='TestTimeAug', transforms=[flips, [pack]])
        cfg.tta_pipeline = pipeline
    dataset.pipeline = cfg.tta_pipeline
    tta_model = cfg.get('tta_model') or DEFAULT_MODELS[scope]
    cfg.model = ConfigDict({**tta_model, 'module': cfg.model})
