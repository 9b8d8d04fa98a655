_base_ = ['mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='ResNetV1c'))
runner_type = 'protune_mm.ProTuneRunner'
