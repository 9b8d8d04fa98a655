# CIFAR-10, enlarged to what the weights were trained on; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='CIFAR10', data_root='data/cifar10')
model = dict(head=dict(num_classes=10))
# Its images are RGB already.
data_preprocessor = dict(num_classes=10, to_rgb=False)
train_pipeline = [
    dict(type='RandomCrop', crop_size=32, padding=4),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='Resize', scale=224, interpolation='bicubic'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='Resize', scale=224, interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    dataset=dict(dataset=dict(split='train', pipeline=train_pipeline, **images)),
)
val_dataloader = dict(
    dataset=dict(dataset=dict(split='train', pipeline=test_pipeline, **images)),
)
test_dataloader = dict(dataset=dict(split='test', pipeline=test_pipeline, **images))
train_cfg = dict(max_epochs=20)
