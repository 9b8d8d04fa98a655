# Trained on ImageNet, tested on ImageNet-V2 (arXiv 1902.10811): its folders are numbered as ImageNet's classes are.
_base_ = ['../resnet50_protune_in1k.py']

test_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='protune_mm.ClassMap',
        # The folder of training images names the model's classes.
        target='data/imagenet/train',
        classes='indices',
        dataset=dict(
            type='CustomDataset',
            data_root='data/imagenetv2-matched-frequency-format-val',
            pipeline=_base_.test_dataloader.dataset.pipeline,
        ),
    )
)
test_evaluator = dict(_delete_=True, type='protune_mm.MappedAccuracy')
