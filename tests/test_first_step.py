"""One training step through a whole detector, segmentor or classifier of every family."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

import protune_mm
from protune_mm.optim import wrap_constructor
from protune_mm.tuned import frozen_tensors
from tests.conftest import EXAMPLES, build_stock, example, flat, image

SIZE = (64, 96)


def channels(library, family, **more):
    with torch.no_grad():
        return [o.shape[1] for o in flat(build_stock(library, family, **more)(image(1, *SIZE)))]


def detector(library, family, backbone):
    cfg = protune_mm.load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.model.backbone = backbone
    cfg.model.neck.update(in_channels=channels(library, family), out_channels=16)
    cfg.model.neck.update(start_level=0)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    return cfg.model


def segmentor(library, family, backbone):
    cfg = protune_mm.load_config('mmseg::_base_/models/fcn_r50-d8.py')
    cfg.model.backbone = backbone
    cfg.model.pop('pretrained')
    cfg.model.pop('auxiliary_head')
    cfg.model.data_preprocessor.size = SIZE
    cfg.model.decode_head.update(
        in_channels=channels(library, family)[-1],
        in_index=-1,
        channels=8,
        num_convs=1,
        num_classes=3,
        norm_cfg=dict(type='BN'),
    )
    return cfg.model


def classifier(library, family, backbone):
    last = channels(library, family)[-1]
    vit = family.name == 'VisionTransformer'
    spatial = family.name not in ('VisionTransformer', 'ConvNeXt')
    head = dict(
        type='VisionTransformerClsHead' if vit else 'LinearClsHead', num_classes=3, in_channels=last
    )
    return ConfigDict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling') if spatial else None,
        head=head,
        data_preprocessor=dict(type='ClsDataPreprocessor', num_classes=3),
    )


def batch(library):
    pictures = [torch.randint(0, 255, (3, *SIZE), dtype=torch.uint8) for _ in range(2)]
    if library == 'mmdet':
        from mmdet.structures import DetDataSample
        from mmdet.structures.bbox import HorizontalBoxes
        from mmengine.structures import InstanceData

        samples = []
        for _ in pictures:
            sample = DetDataSample(metainfo=dict(img_shape=SIZE, scale_factor=(1, 1)))
            sample.gt_instances = InstanceData(
                bboxes=HorizontalBoxes(torch.tensor([[5.0, 5.0, 40.0, 40.0]])),
                labels=torch.tensor([1]),
            )
            samples.append(sample)
    elif library == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = [
            SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, 3, (1, *SIZE))))
            for _ in pictures
        ]
    else:
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i) for i in range(2)]
    return dict(inputs=pictures, data_samples=samples)


WHOLE = {'mmdet': detector, 'mmseg': segmentor, 'mmpretrain': classifier}


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_one_step_trains_prompts_neck_and_head_only(library, family, tmp_path):
    init_default_scope(library)
    config, kind = example(library, family)
    # No class of the row's is renamed or told its library here: the scope decides, as in configs.
    backbone = ConfigDict(type='protune_mm.ProTuned', base=kind, prompt=dict(ratio=2), **config)
    torch.manual_seed(0)
    model = MODELS.build(WHOLE[library](library, family, backbone))
    model.init_weights()
    model.train()
    wrapper = Runner.build_optim_wrapper(
        _Holder(model),
        wrap_constructor(dict(optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1))),
    )
    frozen = {name: tensor.clone() for name, tensor in frozen_tensors(model)}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):  # Later steps reach what stands behind a zero start, of a head too.
        log = model.train_step(batch(library), wrapper)
    assert torch.isfinite(log['loss'])
    for name, tensor in frozen_tensors(model):
        assert torch.equal(tensor, frozen[name]), f'{name} moved'
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, start[name]), f'{name} did not train'


class _Holder:
    """What Runner.build_optim_wrapper needs of a runner."""

    def __init__(self, model):
        self.model = model
