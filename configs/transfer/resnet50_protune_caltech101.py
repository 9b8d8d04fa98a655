# Caltech-101: 102 classes; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='Caltech101', data_root='data/caltech-101')
model = dict(head=dict(num_classes=102))
data_preprocessor = dict(num_classes=102)
train_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
