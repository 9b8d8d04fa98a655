# Oxford-IIIT Pets: 37 classes; every tenth training image validates.
_base_ = ['./_base_/resnet50.py']

images = dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets', split='trainval')
model = dict(head=dict(num_classes=37))
data_preprocessor = dict(num_classes=37)
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
        type='OxfordIIITPet',
        data_root='data/Oxford-IIIT_Pets',
        split='test',
        pipeline=_base_.test_pipeline,
    ),
)
