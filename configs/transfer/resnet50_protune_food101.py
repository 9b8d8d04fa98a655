# Food-101: 101 classes; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='Food101', data_root='data/food-101')
model = dict(head=dict(num_classes=101))
data_preprocessor = dict(num_classes=101)
train_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
