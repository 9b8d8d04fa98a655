# CIFAR-100 with a hundred times more images of the first class than of the last. For a ratio of 10 or
# 50: --cfg-options train_dataloader.dataset.ratio=10
_base_ = ['./resnet50_protune_cifar100.py']

train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='protune_mm.LongTailed',
        ratio=100,
        dataset=_base_.train_dataloader.dataset,
    ),
)
# Accuracy on classes with many, some and few training images.
shots = dict(type='protune_mm.ShotAccuracy', dataset=train_dataloader['dataset'])
test_evaluator = [_base_.test_evaluator, shots]
