# A Pro-tuned ResNet-50 with ImageNet's weights, trained on a smaller set for 50 epochs with AdamW. The
# backbone of full fine-tuning, the twin, gets a tenth of the rate; the rule cannot reach prompts.
_base_ = ['../../resnet50_protune_in1k.py']

optim_wrapper = dict(
    _delete_=True,
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs=50)
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='accuracy/top1'))
auto_scale_lr = dict(base_batch_size=64)
