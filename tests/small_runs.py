"""Configs and options of the runs that several test files share; they take seconds each."""

SHAPES = 'configs/small/mask_rcnn_protune_mobilenetv2_shapes.py'
QUICK = (
    'train_cfg.max_epochs=1',
    'default_hooks.logger.interval=1',
    'model.backbone.init_cfg=None',
)


def data(root):
    roots = [f'{split}_dataloader.dataset.data_root={root}/' for split in ('train', 'val', 'test')]
    val = f'{root}/annotations/val.json'
    return [*roots, f'val_evaluator.ann_file={val}', f'test_evaluator.ann_file={val}']


SEG = """
_base_ = [{stock!r}]
crop_size = (48, 64)
data_root = {root!r}
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
dataset = dict(
    _delete_=True, type='BaseSegDataset', data_root=data_root, img_suffix='.png',
    data_prefix=dict(img_path='images', seg_map_path='masks'), pipeline=pipeline,
    metainfo=dict(classes=('a', 'b', 'c')),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=3, val_interval=3)
default_hooks = dict(checkpoint=dict(interval=3), logger=dict(interval=1))
model = dict(
    data_preprocessor=dict(size=crop_size),
    pretrained=None,
    backbone=dict(type='protune_mm.ProTuned', base='ResNetV1c', depth=18, norm_cfg=dict(type='BN')),
    decode_head=dict(
        in_channels=[64, 128, 256, 512], channels=8, num_classes=3, norm_cfg=dict(type='BN')
    ),
    auxiliary_head=dict(in_channels=256, channels=8, num_classes=3, norm_cfg=dict(type='BN')),
)
"""


CLS = """
_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 48)), dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root={root!r}, pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
model = dict(
    backbone=dict(type='protune_mm.ProTuned', base='ResNet'), head=dict(num_classes=2, topk=(1,))
)
data_preprocessor = dict(num_classes=2)
"""
