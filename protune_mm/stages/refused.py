"""Backbone classes that cannot be Pro-tuned, and why."""

from __future__ import annotations

_MASKS = (
    'it masks its own tokens for pre-training, and no head reads its output: Pro-tune {} with the '
    'weights it was pre-trained to'
)
_VIT = _MASKS.format('VisionTransformer')
_BEIT = _MASKS.format('BEiTViT')
_SPARK = (
    'its layers expect the mask of SparK pre-training: Pro-tune {} with the weights it was '
    'pre-trained to'
)

REFUSED: dict[str, str] = {
    'MAEViT': _VIT,
    'MILANViT': _VIT,
    'MFFViT': _VIT,
    'MaskFeatViT': _VIT,
    'BEiTPretrainViT': _BEIT,
    'CAEPretrainViT': _BEIT,
    'MAEHiViT': _MASKS.format('HiViT'),
    'iTPNHiViT': _MASKS.format('HiViT'),
    'SimMIMSwinTransformer': _MASKS.format('SwinTransformer'),
    'MixMIMPretrainTransformer': _MASKS.format('MixMIMTransformer'),
    'SparseResNet': _SPARK.format('ResNet'),
    'SparseConvNeXt': _SPARK.format('ConvNeXt'),
    'LoRAModel': (
        'it drops all but its own parameters from every checkpoint, prompts among them: Pro-tune '
        'the backbone that its key `module` holds'
    ),
    'VPD': (
        'it is a diffusion network whose layers run through functions that replace their forward: '
        'fine-tune it as it is'
    ),
}
"""Class name to the reason, for the message and docs/coverage.md."""
