_base_ = ['mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='SwinTransformer'))
runner_type = 'protune_mm.ProTuneRunner'
