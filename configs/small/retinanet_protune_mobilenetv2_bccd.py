# RetinaNet on 292 pictures of blood cells, many of them small; every sixth image validates.
_base_ = ['./retinanet_protune_mobilenetv2_fruit.py']
classes = ('RBC', 'WBC', 'Platelets')
data_root = '{{$PROTUNE_DATA:data}}/bccd/'
scale = (320, 256)

meta = dict(classes=classes)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        data_root=data_root,
        metainfo=meta,
        indices=[i for i in range(292) if i % 6 != 0],
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
    dataset=dict(
        data_root=data_root,
        metainfo=meta,
        indices=[i for i in range(292) if i % 6 == 0],
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    dataset=dict(data_root=data_root, metainfo=meta, pipeline=test_pipeline),
)
test_evaluator = dict(ann_file=data_root + 'annotations/test.json')
