# CIFAR-10 with a hundred times more images of the first class than of the last: 4500 of them, because
# every tenth validates. Another ratio has to be that of `train_dataloader` and of `shots`, as in -lt10.
# No class has fewer than 20 images, the bound of "few": ShotAccuracy takes other `bounds`.
_base_ = ['./resnet50_protune_cifar10.py']

long_tail = dict(type='protune_mm.LongTailed', ratio=100, dataset=_base_.train_dataloader.dataset)
train_dataloader = dict(dataset=dict(_delete_=True, **long_tail))
# Accuracy on classes with many, some and few training images.
shots = dict(type='protune_mm.ShotAccuracy', dataset=long_tail)
test_evaluator = [_base_.test_evaluator, shots]
