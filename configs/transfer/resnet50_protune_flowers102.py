# Oxford 102 Flowers: 102 classes; the set has a validation split of its own.
_base_ = ['./_base_/resnet50.py']

images = dict(_delete_=True, type='Flowers102', data_root='data/Flowers102')
model = dict(head=dict(num_classes=102))
data_preprocessor = dict(num_classes=102)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(split='train', pipeline=_base_.train_pipeline, **images),
)
val_dataloader = dict(dataset=dict(split='val', pipeline=_base_.test_pipeline, **images))
test_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **images))
