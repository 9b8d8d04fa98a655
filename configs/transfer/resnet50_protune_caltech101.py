# Caltech-101: 102 classes; every tenth training image validates.
_base_ = ['./_base_/resnet50.py']

images = dict(type='Caltech101', data_root='data/caltech-101', split='train')
model = dict(head=dict(num_classes=102))
data_preprocessor = dict(num_classes=102)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='protune_mm.FewLabels',
        fraction=0.9,
        dataset=dict(pipeline=_base_.train_pipeline, **images),
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='protune_mm.FewLabels',
        fraction=0.9,
        rest=True,
        dataset=dict(pipeline=_base_.test_pipeline, **images),
    ),
)
test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='Caltech101',
        data_root='data/caltech-101',
        split='test',
        pipeline=_base_.test_pipeline,
    ),
)
