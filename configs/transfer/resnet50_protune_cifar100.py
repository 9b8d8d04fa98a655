# CIFAR-100, as CIFAR-10.
_base_ = ['./resnet50_protune_cifar10.py']

images = dict(type='CIFAR100', data_root='data/cifar100')
model = dict(head=dict(num_classes=100))
data_preprocessor = dict(num_classes=100)
train_dataloader = dict(dataset=dict(dataset=images))
val_dataloader = dict(dataset=dict(dataset=images))
test_dataloader = dict(dataset=images)
