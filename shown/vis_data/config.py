auto_scale_lr = dict(base_batch_size=16, enable=False)
backend_args = None
classes = (
    'circle',
    'square',
    'triangle',
)
data_root = 'data/shapes/'
dataset_type = 'CocoDataset'
default_hooks = dict(
    checkpoint=dict(
        _scope_='mmdet',
        interval=1,
        max_keep_ckpts=1,
        save_best='coco/segm_mAP',
        type='CheckpointHook',
    ),
    logger=dict(_scope_='mmdet', interval=1, type='LoggerHook'),
    param_scheduler=dict(_scope_='mmdet', type='ParamSchedulerHook'),
    sampler_seed=dict(_scope_='mmdet', type='DistSamplerSeedHook'),
    timer=dict(_scope_='mmdet', type='IterTimerHook'),
    visualization=dict(_scope_='mmdet', draw=True, type='DetVisualizationHook'),
)
default_scope = 'mmdet'
env_cfg = dict(
    cudnn_benchmark=False,
    dist_cfg=dict(backend='nccl'),
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
)
launcher = 'none'
load_from = '/tmp/pytest-of-root/pytest-12/trained0/epoch_1.pth'
log_level = 'INFO'
log_processor = dict(_scope_='mmdet', by_epoch=True, type='LogProcessor', window_size=50)
mobilenet_v2 = dict(
    _delete_=True,
    base='mmpretrain.MobileNetV2',
    init_cfg=dict(checkpoint='weights/mobilenetv2_imagenet.pth', type='Pretrained'),
    norm_eval=True,
    out_indices=(
        1,
        2,
        4,
        6,
    ),
    type='protune_mm.ProTuned',
)
model = dict(
    _scope_='mmdet',
    backbone=dict(
        base='mmpretrain.MobileNetV2',
        init_cfg=None,
        norm_eval=True,
        out_indices=(
            1,
            2,
            4,
            6,
        ),
        type='protune_mm.ProTuned',
    ),
    data_preprocessor=dict(
        bgr_to_rgb=True,
        mean=[
            123.675,
            116.28,
            103.53,
        ],
        pad_mask=True,
        pad_size_divisor=32,
        std=[
            58.395,
            57.12,
            57.375,
        ],
        type='DetDataPreprocessor',
    ),
    neck=dict(
        in_channels=[
            24,
            32,
            96,
            320,
        ],
        num_outs=5,
        out_channels=64,
        type='FPN',
    ),
    roi_head=dict(
        bbox_head=dict(
            bbox_coder=dict(
                target_means=[
                    0.0,
                    0.0,
                    0.0,
                    0.0,
                ],
                target_stds=[
                    0.1,
                    0.1,
                    0.2,
                    0.2,
                ],
                type='DeltaXYWHBBoxCoder',
            ),
            fc_out_channels=256,
            in_channels=64,
            loss_bbox=dict(loss_weight=1.0, type='L1Loss'),
            loss_cls=dict(loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=False),
            num_classes=3,
            reg_class_agnostic=False,
            roi_feat_size=7,
            type='Shared2FCBBoxHead',
        ),
        bbox_roi_extractor=dict(
            featmap_strides=[
                4,
                8,
                16,
                32,
            ],
            out_channels=64,
            roi_layer=dict(output_size=7, sampling_ratio=0, type='RoIAlign'),
            type='SingleRoIExtractor',
        ),
        mask_head=dict(
            conv_out_channels=64,
            in_channels=64,
            loss_mask=dict(loss_weight=1.0, type='CrossEntropyLoss', use_mask=True),
            num_classes=3,
            num_convs=2,
            type='FCNMaskHead',
        ),
        mask_roi_extractor=dict(
            featmap_strides=[
                4,
                8,
                16,
                32,
            ],
            out_channels=64,
            roi_layer=dict(output_size=14, sampling_ratio=0, type='RoIAlign'),
            type='SingleRoIExtractor',
        ),
        type='StandardRoIHead',
    ),
    rpn_head=dict(
        anchor_generator=dict(
            ratios=[
                0.5,
                1.0,
                2.0,
            ],
            scales=[
                8,
            ],
            strides=[
                4,
                8,
                16,
                32,
                64,
            ],
            type='AnchorGenerator',
        ),
        bbox_coder=dict(
            target_means=[
                0.0,
                0.0,
                0.0,
                0.0,
            ],
            target_stds=[
                1.0,
                1.0,
                1.0,
                1.0,
            ],
            type='DeltaXYWHBBoxCoder',
        ),
        feat_channels=64,
        in_channels=64,
        loss_bbox=dict(loss_weight=1.0, type='L1Loss'),
        loss_cls=dict(loss_weight=1.0, type='CrossEntropyLoss', use_sigmoid=True),
        type='RPNHead',
    ),
    test_cfg=dict(
        rcnn=dict(
            mask_thr_binary=0.5,
            max_per_img=20,
            nms=dict(iou_threshold=0.5, type='nms'),
            score_thr=0.05,
        ),
        rpn=dict(
            max_per_img=50, min_bbox_size=0, nms=dict(iou_threshold=0.7, type='nms'), nms_pre=100
        ),
    ),
    train_cfg=dict(
        rcnn=dict(
            assigner=dict(
                ignore_iof_thr=-1,
                match_low_quality=True,
                min_pos_iou=0.5,
                neg_iou_thr=0.5,
                pos_iou_thr=0.5,
                type='MaxIoUAssigner',
            ),
            debug=False,
            mask_size=28,
            pos_weight=-1,
            sampler=dict(
                add_gt_as_proposals=True,
                neg_pos_ub=-1,
                num=32,
                pos_fraction=0.25,
                type='RandomSampler',
            ),
        ),
        rpn=dict(
            allowed_border=-1,
            assigner=dict(
                ignore_iof_thr=-1,
                match_low_quality=True,
                min_pos_iou=0.3,
                neg_iou_thr=0.3,
                pos_iou_thr=0.7,
                type='MaxIoUAssigner',
            ),
            debug=False,
            pos_weight=-1,
            sampler=dict(
                add_gt_as_proposals=False,
                neg_pos_ub=-1,
                num=64,
                pos_fraction=0.5,
                type='RandomSampler',
            ),
        ),
        rpn_proposal=dict(
            max_per_img=100, min_bbox_size=0, nms=dict(iou_threshold=0.7, type='nms'), nms_pre=200
        ),
    ),
    type='MaskRCNN',
)
optim_wrapper = dict(
    clip_grad=dict(max_norm=10.0),
    optimizer=dict(lr=0.001, type='AdamW', weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0),
    type='OptimWrapper',
)
param_scheduler = [
    dict(begin=0, by_epoch=False, end=50, start_factor=0.01, type='LinearLR'),
    dict(by_epoch=True, convert_to_iter_based=True, type='CosineAnnealingLR'),
]
randomness = dict(seed=0)
resume = False
runner_type = 'protune_mm.ProTuneRunner'
scale = (
    192,
    144,
)
short_optim_wrapper = dict(
    clip_grad=dict(max_norm=10.0),
    optimizer=dict(lr=0.001, type='AdamW', weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0),
    type='OptimWrapper',
)
short_param_scheduler = [
    dict(begin=0, by_epoch=False, end=50, start_factor=0.01, type='LinearLR'),
    dict(by_epoch=True, convert_to_iter_based=True, type='CosineAnnealingLR'),
]
short_train_cfg = dict(type='EpochBasedTrainLoop', val_interval=1)
test_cfg = dict(_scope_='mmdet', type='TestLoop')
test_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _scope_='mmdet',
        ann_file='annotations/val.json',
        backend_args=None,
        data_prefix=dict(img='images/val/'),
        data_root='/tmp/pytest-of-root/pytest-12/data0/shapes/',
        metainfo=dict(
            classes=(
                'circle',
                'square',
                'triangle',
            )
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(
                keep_ratio=True,
                scale=(
                    192,
                    144,
                ),
                type='Resize',
            ),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
                type='PackDetInputs',
            ),
        ],
        test_mode=True,
        type='CocoDataset',
    ),
    drop_last=False,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_scope_='mmdet', shuffle=False, type='DefaultSampler'),
)
test_evaluator = dict(
    _scope_='mmdet',
    ann_file='/tmp/pytest-of-root/pytest-12/data0/shapes/annotations/val.json',
    backend_args=None,
    format_only=False,
    metric=[
        'bbox',
        'segm',
    ],
    type='CocoMetric',
)
test_pipeline = [
    dict(_scope_='mmdet', backend_args=None, type='LoadImageFromFile'),
    dict(
        _scope_='mmdet',
        keep_ratio=True,
        scale=(
            1333,
            800,
        ),
        type='Resize',
    ),
    dict(_scope_='mmdet', type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        _scope_='mmdet',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
        ),
        type='PackDetInputs',
    ),
]
train_cfg = dict(max_epochs=8, type='EpochBasedTrainLoop', val_interval=1)
train_dataloader = dict(
    batch_sampler=dict(_scope_='mmdet', type='AspectRatioBatchSampler'),
    batch_size=4,
    dataset=dict(
        _scope_='mmdet',
        ann_file='annotations/train.json',
        backend_args=None,
        data_prefix=dict(img='images/train/'),
        data_root='/tmp/pytest-of-root/pytest-12/data0/shapes/',
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        metainfo=dict(
            classes=(
                'circle',
                'square',
                'triangle',
            )
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                keep_ratio=True,
                scale=(
                    192,
                    144,
                ),
                type='Resize',
            ),
            dict(prob=0.5, type='RandomFlip'),
            dict(type='PackDetInputs'),
        ],
        type='CocoDataset',
    ),
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_scope_='mmdet', shuffle=True, type='DefaultSampler'),
)
train_pipeline = [
    dict(_scope_='mmdet', backend_args=None, type='LoadImageFromFile'),
    dict(_scope_='mmdet', type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        _scope_='mmdet',
        keep_ratio=True,
        scale=(
            1333,
            800,
        ),
        type='Resize',
    ),
    dict(_scope_='mmdet', prob=0.5, type='RandomFlip'),
    dict(_scope_='mmdet', type='PackDetInputs'),
]
val_cfg = dict(_scope_='mmdet', type='ValLoop')
val_dataloader = dict(
    batch_size=1,
    dataset=dict(
        _scope_='mmdet',
        ann_file='annotations/val.json',
        backend_args=None,
        data_prefix=dict(img='images/val/'),
        data_root='/tmp/pytest-of-root/pytest-12/data0/shapes/',
        metainfo=dict(
            classes=(
                'circle',
                'square',
                'triangle',
            )
        ),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(
                keep_ratio=True,
                scale=(
                    192,
                    144,
                ),
                type='Resize',
            ),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                ),
                type='PackDetInputs',
            ),
        ],
        test_mode=True,
        type='CocoDataset',
    ),
    drop_last=False,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(_scope_='mmdet', shuffle=False, type='DefaultSampler'),
)
val_evaluator = dict(
    _scope_='mmdet',
    ann_file='/tmp/pytest-of-root/pytest-12/data0/shapes/annotations/val.json',
    backend_args=None,
    format_only=False,
    metric=[
        'bbox',
        'segm',
    ],
    type='CocoMetric',
)
vis_backends = [
    dict(_scope_='mmdet', type='LocalVisBackend'),
]
visualizer = dict(
    _scope_='mmdet',
    name='visualizer',
    save_dir='shown',
    type='DetLocalVisualizer',
    vis_backends=[
        dict(type='LocalVisBackend'),
    ],
)
work_dir = '/tmp/pytest-of-root/pytest-12/test_test_scores_a_checkpoint_0'
