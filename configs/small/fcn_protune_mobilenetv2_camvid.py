# FCN head on the 367 street scenes of CamVid, 11 classes, at 240x180.
_base_ = [
    'mmseg::_base_/models/fcn_r50-d8.py',
    'mmseg::_base_/default_runtime.py',
    './_base_/mobilenet_v2.py',
    './_base_/short_schedule.py',
]
classes = (
    'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car', 'pedestrian',
    'bicyclist',
)  # fmt: skip
data_root = '{{$PROTUNE_DATA:data}}/camvid/'
scale = (240, 180)

model = dict(
    data_preprocessor=dict(size=(192, 256)),
    pretrained=None,
    backbone=_base_.mobilenet_v2,
    decode_head=dict(
        in_channels=[24, 32, 96, 320],
        in_index=[0, 1, 2, 3],
        input_transform='resize_concat',
        channels=64,
        num_convs=1,
        kernel_size=1,
        concat_input=False,
        num_classes=11,
        norm_cfg=dict(_delete_=True, type='GN', num_groups=8),
    ),
    auxiliary_head=None,
)

dataset_type = 'BaseSegDataset'
common = dict(
    type=dataset_type,
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix='.jpg',
    seg_map_suffix='.png',
    reduce_zero_label=False,
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='RandomResize', scale=scale, ratio_range=(0.75, 1.5), keep_ratio=True),
            dict(type='RandomCrop', crop_size=(180, 240), cat_max_ratio=0.75),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs'),
        ],
        **common,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
        pipeline=test_pipeline,
        **common,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/test', seg_map_path='masks/test'),
        pipeline=test_pipeline,
        **common,
    ),
)
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=40, **_base_.short_train_cfg)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = _base_.short_optim_wrapper
param_scheduler = _base_.short_param_scheduler
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
runner_type = 'protune_mm.ProTuneRunner'
log_processor = dict(by_epoch=True)
