# For sets without a validation split: every tenth training image, at random, validates. A child names
# the set: `dataset=dict(dataset=dict(type=..., data_root=..., split='train'))`. With a smaller fraction
# to train on the same images validate; a larger one, or another seed, has to be that of both dataloaders.
_base_ = ['./resnet50.py']

train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='protune_mm.FewLabels',
        fraction=0.9,
        dataset=dict(pipeline=_base_.train_pipeline),
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='protune_mm.FewLabels',
        fraction=0.9,
        rest=True,
        dataset=dict(pipeline=_base_.test_pipeline),
    ),
)
test_dataloader = dict(dataset=dict(_delete_=True, pipeline=_base_.test_pipeline))
