_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='ResNet'))
runner_type = 'protune_mm.ProTuneRunner'
