_base_ = ['mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='VisionTransformer'))
runner_type = 'protune_mm.ProTuneRunner'
