# CIFAR-100 with 10 times more images of the first class than of the last.
_base_ = ['./resnet50_protune_cifar100-lt.py']

long_tail = dict(ratio=10)
train_dataloader = dict(dataset=long_tail)
shots = dict(dataset=long_tail)
test_evaluator = [
    _base_.test_evaluator[0],
    dict(_base_.shots, dataset=dict(_base_.long_tail, **long_tail)),
]
