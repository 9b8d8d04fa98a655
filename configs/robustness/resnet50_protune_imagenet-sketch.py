# Trained on ImageNet, tested on ImageNet-Sketch (arXiv 1905.13549): all thousand classes.
_base_ = ['../resnet50_protune_in1k.py']

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='protune_mm.ClassMap',
        # The folder of training images names the model's classes.
        target='data/imagenet/train',
        dataset=dict(
            type='CustomDataset',
            data_root='data/sketch',
            pipeline=_base_.test_dataloader.dataset.pipeline,
        ),
    )
)
test_evaluator = dict(_delete_=True, type='protune_mm.MappedAccuracy')
