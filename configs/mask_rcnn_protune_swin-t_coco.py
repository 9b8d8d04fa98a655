_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']

model = dict(backbone=dict(type='protune_mm.ProTuned', base='SwinTransformer'))
runner_type = 'protune_mm.ProTuneRunner'
