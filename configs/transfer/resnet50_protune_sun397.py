# SUN397: 397 classes; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='SUN397', data_root='data/SUN397')
model = dict(head=dict(num_classes=397))
data_preprocessor = dict(num_classes=397)
train_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
