# FCN head on CamVid on the first three stages of a ResNet-18. Its batch norms are folded into the
# convolutions: full fine-tuning, the twin, has to keep their statistics too.
_base_ = ['./fcn_protune_mobilenetv2_camvid.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='protune_mm.ProTuned',
        base='mmpretrain.ResNet',
        depth=18,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='{{$PROTUNE_WEIGHTS:weights}}/resnet18_stages123_imagenet.pth',
        ),
    ),
    decode_head=dict(in_channels=[64, 128, 256], in_index=[0, 1, 2]),
)
