# The overlay: adds Pro-tuning to any stock config, without touching its `model`.
#
#     _base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', __import__('protune_mm').overlay()]
#
# The runner turns `protune` into the one line of the canonical form. Options, all optional:
# protune = dict(stages=..., prompt=dict(...), policy=...)
runner_type = 'protune_mm.ProTuneRunner'
protune = dict()
