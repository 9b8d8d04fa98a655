_base_ = ['mmpretrain::vision_transformer/vit-base-p16_64xb64_in1k-384px.py']

checkpoint = 'https://download.openmmlab.com/mmclassification/v0/vit/finetune/vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth'
# The stock config trains from scratch; a frozen backbone needs its weights.
model = dict(
    backbone=dict(
        type='protune_mm.ProTuned',
        base='VisionTransformer',
        init_cfg=dict(_delete_=True, type='Pretrained', checkpoint=checkpoint, prefix='backbone'),
    )
)
runner_type = 'protune_mm.ProTuneRunner'
