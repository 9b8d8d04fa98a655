# A classifier on 3457 pictures of five flowers, at 112x112; every tenth training image validates.
_base_ = [
    'mmpretrain::mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    './_base_/mobilenet_v2.py',
    './_base_/short_schedule.py',
]
data_root = '{{$PROTUNE_DATA:data}}/flowers5/'

_base_.mobilenet_v2.out_indices = (7,)
model = dict(
    backbone=_base_.mobilenet_v2,
    head=dict(num_classes=5, topk=(1,)),
)
data_preprocessor = dict(num_classes=5)

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(112, 112)),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        indices=[i for i in range(3457) if i % 10 != 0],
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='RandomResizedCrop', scale=112, crop_ratio_range=(0.5, 1.0)),
            dict(type='RandomFlip', prob=0.5, direction='horizontal'),
            dict(type='PackInputs'),
        ],
    ),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        indices=[i for i in range(3457) if i % 10 == 0],
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='test',
        pipeline=test_pipeline,
    ),
)
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(_delete_=True, **_base_.short_train_cfg, max_epochs=15)
optim_wrapper = dict(_delete_=True, **_base_.short_optim_wrapper)
param_scheduler = _base_.short_param_scheduler
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(interval=1, max_keep_ckpts=1, save_best='accuracy/top1'),
)
randomness = dict(seed=0)
runner_type = 'protune_mm.ProTuneRunner'
