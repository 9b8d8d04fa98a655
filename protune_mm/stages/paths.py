"""Rows of segmentation and keypoint networks with several paths or nested backbones."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..features import Maps
from .family import Family, Stage, children, containers
from .maps import MAPS


def _nested(path: str, table: Callable[[nn.Module], list[Stage]]) -> Callable:
    """The stages of a backbone inside a backbone."""

    def split(backbone: nn.Module) -> list[Stage]:
        return [
            Stage(f'{path}.{stage.name}', tuple(f'{path}.{block}' for block in stage.blocks))
            for stage in table(backbone.get_submodule(path))
        ]

    return split


def _inner(backbone: nn.Module) -> list[Stage]:
    """Stages by the row of a nested backbone's own class."""
    rows = {family.name: family for family in MAPS}
    for parent in type(backbone).__mro__:
        if parent.__name__ in rows:
            return rows[parent.__name__].split(backbone)
    raise ValueError(f'the nested backbone {type(backbone).__name__} is in no row of maps')


def _blocks(backbone: nn.Module, path: str) -> tuple[str, ...]:
    """Blocks of a container; a single block stands for itself."""
    if isinstance(backbone.get_submodule(path), nn.Sequential):
        return children(backbone, path)
    return (path,)


def _unet(backbone: nn.Module) -> list[Stage]:
    # The pooling that opens an encoder stage is no block.
    encoder = []
    for i in range(backbone.num_stages):
        blocks = children(backbone, f'encoder.{i}')
        kept = tuple(b for b in blocks if hasattr(backbone.get_submodule(b), 'convs'))
        encoder.append(Stage(f'encoder.{i}', kept))
    decoder = [f'decoder.{i}' for i in reversed(range(backbone.num_stages - 1))]
    return [*encoder, *(Stage(name, (name,)) for name in decoder)]


def _hourglass(backbone: nn.Module) -> list[Stage]:
    # Inside an hourglass maps are added and scaled: its output is where a stage ends. The layers
    # between two hourglasses are one module that runs several times.
    outs = [f'out_convs.{i}' for i in range(backbone.num_stacks)]
    stem = Stage('stem', ('stem.0', *children(backbone, 'stem.1')))
    return [stem, *(Stage(name, (name,)) for name in outs)]


def _bisenet_v1(backbone: nn.Module) -> list[Stage]:
    stages = _nested('context_path.backbone', _inner)(backbone)
    if 0 in backbone.out_indices:  # The other path reaches the first output only.
        layers = tuple(f'spatial_path.{name}' for name in backbone.spatial_path.layers)
        stages.append(Stage('spatial_path', layers))
    return stages


def _bisenet_v2(backbone: nn.Module) -> list[Stage]:
    # Outputs: both paths joined, then the stages of the semantic one, `stage<n>_CEBlock` not.
    names = backbone.semantic.semantic_stages
    joined = 0 in backbone.out_indices
    used = names if joined else names[: max(backbone.out_indices)]
    semantic = [Stage(f'semantic.{n}', _blocks(backbone, f'semantic.{n}')) for n in used]
    if not joined:
        return semantic
    branch = 'detail.detail_branch'
    count = len(backbone.detail.detail_branch)
    return [*containers(backbone, [f'{branch}.{i}' for i in range(count)]), *semantic]


def _stdc(backbone: nn.Module) -> list[Stage]:
    # The first two convolutions are the stem, down to stride 4.
    count, shallow = len(backbone.stages), backbone.num_shallow_features
    deep = [f'stages.{i}' for i in range(shallow, count)]
    return [Stage('stages.1', ('stages.1',)), *containers(backbone, deep)]


def _three_paths(*paths: str) -> Callable[[nn.Module], list[Stage]]:
    """A stem and branches side by side, with three stages each; PIDNet and DDRNet."""

    def split(backbone: nn.Module) -> list[Stage]:
        names = ['stem.2', 'stem.4']
        names += [f'{path}_branch_layers.{i}' for i in range(3) for path in paths]
        return [Stage(name, _blocks(backbone, name)) for name in names]

    return split


def _cgnet(backbone: nn.Module) -> list[Stage]:
    # What the next stage reads is the activation of a concatenation.
    return [Stage(f'norm_prelu_{i}', (f'norm_prelu_{i}.1',)) for i in range(3)]


def _erfnet(backbone: nn.Module) -> list[Stage]:
    stages = []
    for part, opens in (('encoder', 'DownsamplerBlock'), ('decoder', 'UpsamplerBlock')):
        layers, since = backbone.get_submodule(part), 0
        for i in range(len(layers)):
            if i + 1 == len(layers) or type(layers[i + 1]).__name__ == opens:
                blocks = tuple(f'{part}.{k}' for k in range(since, i + 1))
                stages.append(Stage(f'{part}.{i}', blocks))
                since = i + 1
    return stages


def _fast_scnn(backbone: nn.Module) -> list[Stage]:
    # Outputs: high resolution, low resolution, both joined.
    down = 'learning_to_downsample'
    stages = [Stage(down, tuple(f'{down}.{name}' for name in ('conv', 'dsconv1', 'dsconv2')))]
    if max(backbone.out_indices) >= 1:
        deep = 'global_feature_extractor'
        stages += containers(backbone, [f'{deep}.bottleneck{i}' for i in (1, 2, 3)])
    if 2 in backbone.out_indices:
        stages.append(Stage('feature_fusion', ('feature_fusion',)))
    return stages


def _root(backbone: nn.Module) -> list[str]:
    """The backbone itself returns more while training."""
    return ['']


_BN = dict(type='BN')
_R18 = dict(depth=18, base_channels=8, norm_cfg=_BN)
_STDC = dict(
    type='STDCNet',
    stdc_type='STDCNet1',
    in_channels=3,
    channels=(8, 8, 16, 32, 64),
    bottleneck_type='cat',
    norm_cfg=_BN,
    act_cfg=dict(type='ReLU'),
)

PATHS: tuple[Family, ...] = (
    Family(
        'UNet',
        split=_unet,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='UNet', base_channels=8, enc_num_convs=(1,) * 5, dec_num_convs=(1,) * 4
            ),
        ),
    ),
    Family(
        'HourglassNet',
        split=_hourglass,
        layout=Maps(),
        examples=dict(
            mmdet=dict(
                type='HourglassNet',
                downsample_times=2,
                num_stacks=2,
                stage_channels=(16, 16, 24),
                stage_blocks=(1, 1, 1),
                feat_channel=16,
            ),
        ),
    ),
    Family(
        'ICNet',
        split=_nested('backbone', _inner),
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='ICNet',
                backbone_cfg=dict(type='ResNetV1c', stem_channels=8, **_R18),
                layer_channels=(16, 64),
                light_branch_middle_channels=8,
                psp_out_channels=16,
                out_channels=(8, 16, 16),
                norm_cfg=_BN,
            ),
        ),
    ),
    Family(
        'BiSeNetV1',
        split=_bisenet_v1,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='BiSeNetV1',
                backbone_cfg=dict(type='ResNet', **_R18),
                context_channels=(16, 32, 64),
                spatial_channels=(8, 8, 8, 16),
                out_channels=32,
            ),
        ),
    ),
    Family(
        'BiSeNetV2',
        split=_bisenet_v2,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='BiSeNetV2',
                detail_channels=(8, 8, 16),
                semantic_channels=(8, 8, 16, 16),
                semantic_expansion_ratio=2,
                bga_channels=16,
            ),
        ),
    ),
    Family(
        'STDCNet',
        split=_stdc,
        layout=Maps(),
        examples=dict(mmseg=_STDC),
    ),
    Family(
        'STDCContextPathNet',
        split=_nested('backbone', _stdc),
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='STDCContextPathNet',
                backbone_cfg=_STDC,
                last_in_channels=(64, 32),
                out_channels=16,
                ffm_cfg=dict(in_channels=32, out_channels=32, scale_factor=4),
            ),
        ),
    ),
    Family(
        'PIDNet',
        split=_three_paths('i', 'p', 'd'),
        layout=Maps(),
        forks=_root,
        examples=dict(mmseg=dict(type='PIDNet', channels=8, ppm_channels=8)),
    ),
    Family(
        'DDRNet',
        split=_three_paths('context', 'spatial'),
        layout=Maps(),
        forks=_root,
        examples=dict(mmseg=dict(type='DDRNet', channels=8, ppm_channels=8)),
    ),
    Family(
        'CGNet',
        split=_cgnet,
        channels=lambda block: block.num_parameters,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='CGNet', num_channels=(8, 16, 32), num_blocks=(2, 2), reductions=(4, 4)
            ),
        ),
    ),
    Family(
        'ERFNet',
        split=_erfnet,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='ERFNet',
                enc_downsample_channels=(8, 16, 32),
                enc_stage_non_bottlenecks=(1, 4),
                enc_non_bottleneck_channels=(16, 32),
                dec_upsample_channels=(16, 8),
                dec_stages_non_bottleneck=(1, 1),
                dec_non_bottleneck_channels=(16, 8),
            ),
        ),
    ),
    Family(
        'FastSCNN',
        split=_fast_scnn,
        layout=Maps(),
        examples=dict(
            mmseg=dict(
                type='FastSCNN',
                downsample_dw_channels=(8, 8),
                global_in_channels=8,
                global_block_channels=(8, 16, 24),
                global_out_channels=16,
                higher_in_channels=8,
                lower_in_channels=16,
                fusion_out_channels=16,
            ),
        ),
    ),
)
