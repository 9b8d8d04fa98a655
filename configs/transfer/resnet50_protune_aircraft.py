# FGVC-Aircraft: 100 classes; the set has a validation split of its own.
_base_ = ['./_base_/resnet50.py']

images = dict(_delete_=True, type='FGVCAircraft', data_root='data/fgvc-aircraft-2013b')
model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(split='train', pipeline=_base_.train_pipeline, **images),
)
val_dataloader = dict(dataset=dict(split='val', pipeline=_base_.test_pipeline, **images))
test_dataloader = dict(dataset=dict(split='test', pipeline=_base_.test_pipeline, **images))
