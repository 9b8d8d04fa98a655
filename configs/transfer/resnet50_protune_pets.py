# Oxford-IIIT Pets: 37 classes; every tenth training image validates.
_base_ = ['./_base_/no_validation_split.py']

images = dict(type='OxfordIIITPet', data_root='data/Oxford-IIIT_Pets')
model = dict(head=dict(num_classes=37))
data_preprocessor = dict(num_classes=37)
train_dataloader = dict(dataset=dict(dataset=dict(split='trainval', **images)))
val_dataloader = dict(dataset=dict(dataset=dict(split='trainval', **images)))
test_dataloader = dict(dataset=dict(split='test', **images))
