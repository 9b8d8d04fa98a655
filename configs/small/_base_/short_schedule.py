# AdamW, a short warm-up and a cosine to zero. The backbone of full fine-tuning gets a tenth of
# the learning rate, as is usual; the rule cannot reach prompts.
# The names are new because two bases may not define one key; leaves assign them.
short_train_cfg = dict(type='EpochBasedTrainLoop', val_interval=1)
short_optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
short_param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True),
]
