# MMSegmentation's config reads pretrain/vit_base_patch16_224.pth, which a tool of its repository makes of timm's:
#     python tools/model_converters/vit2mmseg.py jx_vit_base_p16_224-80ecf9dd.pth \
#         pretrain/vit_base_patch16_224.pth
# As no checkpoint can fetch a file of your own, name it for inference, too: PROTUNE_BASE=pretrain/...
_base_ = ['mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='VisionTransformer'))
runner_type = 'protune_mm.ProTuneRunner'
