# Stanford Cars: 196 models of cars; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='StanfordCars', data_root='data/Stanford_Cars')
model = dict(head=dict(num_classes=196))
data_preprocessor = dict(num_classes=196)
train_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='train', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
