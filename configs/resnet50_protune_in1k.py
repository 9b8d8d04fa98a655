_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py']

checkpoint = 'torchvision://resnet50'
# The stock config trains from scratch; a frozen backbone needs its weights.
model = dict(
    backbone=dict(
        type='protune_mm.ProTuned',
        base='ResNet',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    )
)
runner_type = 'protune_mm.ProTuneRunner'
