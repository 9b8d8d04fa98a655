# CUB-200-2011: 200 species of birds; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='CUB', data_root='data/CUB_200_2011')
model = dict(head=dict(num_classes=200))
data_preprocessor = dict(num_classes=200)
train_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
