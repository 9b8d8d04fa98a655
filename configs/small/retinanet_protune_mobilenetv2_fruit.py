# RetinaNet on 240 images of apples, bananas and oranges; every sixth image validates.
_base_ = [
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
    './_base_/mobilenet_v2.py',
    './_base_/short_schedule.py',
]
classes = ('apple', 'banana', 'orange')
data_root = '{{$PROTUNE_DATA:data}}/fruit/'
scale = (256, 256)

model = dict(
    backbone=_base_.mobilenet_v2,
    neck=dict(in_channels=[24, 32, 96, 320], out_channels=64),
    bbox_head=dict(num_classes=3, in_channels=64, feat_channels=64, stacked_convs=2),
)

meta = dict(classes=classes)
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        metainfo=meta,
        indices=[i for i in range(240) if i % 6 != 0],
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=scale, keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PackDetInputs'),
        ],
    ),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances'),
    ),
]
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/train.json',
        data_prefix=dict(img='images/'),
        metainfo=meta,
        indices=[i for i in range(240) if i % 6 == 0],
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=data_root,
        ann_file='annotations/test.json',
        data_prefix=dict(img='images/'),
        metainfo=meta,
        pipeline=test_pipeline,
    ),
)
# Without an annotation file the metric takes the boxes from the dataset, so that it counts the
# images of this split only.
val_evaluator = dict(ann_file=None)
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')

train_cfg = dict(_delete_=True, **_base_.short_train_cfg, max_epochs=36)
optim_wrapper = dict(_delete_=True, **_base_.short_optim_wrapper)
param_scheduler = _base_.short_param_scheduler
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='coco/bbox_mAP'),
)
randomness = dict(seed=0)
runner_type = 'protune_mm.ProTuneRunner'
