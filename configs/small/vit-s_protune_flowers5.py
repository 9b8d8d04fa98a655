# ViT-S/14 (DINOv2, fine-tuned for saliency) on three tenths of the five flowers' training images,
# at 112x112. Its head reads the class token alone, so `model.backbone.prompt.extra_tokens` matters.
_base_ = ['./mobilenetv2_protune_flowers5.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='protune_mm.ProTuned',
        base='mmpretrain.VisionTransformer',
        arch='dinov2-small',
        img_size=112,
        patch_size=14,
        layer_scale_init_value=1e-5,
        init_cfg=dict(
            type='Pretrained', checkpoint='{{$PROTUNE_WEIGHTS:weights}}/vit_s14_saliency_fp16.pth'
        ),
    ),
    neck=None,
    head=dict(in_channels=384),
)
train_dataloader = dict(dataset=dict(indices=[i for i in range(3457) if i % 10 in (1, 4, 7)]))
train_cfg = dict(max_epochs=8)
