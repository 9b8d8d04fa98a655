# A Pro-tuned MobileNetV2 with real ImageNet weights, for detection and segmentation on a few
# hundred images. PROTUNE_WEIGHTS and PROTUNE_DATA name the folders with weights and data.
mobilenet_v2 = dict(
    _delete_=True,
    type='protune_mm.ProTuned',
    base='mmpretrain.MobileNetV2',
    out_indices=(1, 2, 4, 6),
    # Full fine-tuning, the twin, keeps the batch statistics: batches are small.
    norm_eval=True,
    init_cfg=dict(
        type='Pretrained', checkpoint='{{$PROTUNE_WEIGHTS:weights}}/mobilenetv2_imagenet.pth'
    ),
)
