_base_ = ['mmseg::upernet/upernet_r50_4xb2-80k_cityscapes-512x1024.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='ResNetV1c'))
runner_type = 'protune_mm.ProTuneRunner'
