_base_ = ['mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py']

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/swin-transformer/swin_tiny_224_b16x64_300e_imagenet_20210616_090925-66df6be6.pth'
# The stock config trains from scratch; a frozen backbone needs its weights.
model = dict(
    backbone=dict(
        type='protune_mm.ProTuned',
        base='SwinTransformer',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone'),
    )
)
runner_type = 'protune_mm.ProTuneRunner'
