"""Rows of backbones whose blocks return tokens."""

from __future__ import annotations

from torch import nn

from ..features import (
    Item,
    LastMaps,
    Layout,
    Maps,
    PatchMaps,
    Tokens,
    TokensOfGrid,
    TokensWithSizes,
)
from .family import (
    Family,
    Stage,
    children,
    default_scale,
    embed_dims,
    even_ends,
    feedforward_dims,
    indices,
    plain,
    stage_lists,
)


def _extra_tokens(backbone: nn.Module, block: nn.Module) -> int:
    # mmseg keeps a class token parameter but may drop the token before the first block.
    if getattr(backbone, 'with_cls_token', True):
        return getattr(backbone, 'num_extra_tokens', 1)
    return 0


def _one_extra(backbone: nn.Module, block: nn.Module) -> int:
    return 1


def _returns_class_token(backbone: nn.Module) -> bool:
    return getattr(backbone, 'out_type', '') == 'cls_token'


def _xcit(backbone: nn.Module) -> list[Stage]:
    # The class-attention layers, which join the class token to the patches, are the last stage.
    patches = [f'xca_layers.{i}' for i in range(len(backbone.xca_layers))]
    names = [*patches, *(f'ca_layers.{i}' for i in range(len(backbone.ca_layers)))]
    read = indices(backbone.out_indices, len(names))
    if len(read) > 1:
        ends = list(zip([0, *(end + 1 for end in read)], read, strict=False))
    else:
        ends = even_ends(len(patches), min(read[0], len(patches) - 1))
        if read[0] >= len(patches):
            ends.append((len(patches), read[0]))
    return [Stage(names[end], tuple(names[start : end + 1])) for start, end in ends]


def _xcit_extra(backbone: nn.Module, block: nn.Module) -> int:
    return int(any(block is layer for layer in backbone.ca_layers))


def _tinyvit_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    return TokensOfGrid(grid=tuple(block.img_size)) if hasattr(block, 'img_size') else Maps()


def _tinyvit_channels(block: nn.Module) -> int:
    return block.in_channels


def _last_linear(block: nn.Module) -> int:
    return [m for m in block.modules() if isinstance(m, nn.Linear)][-1].out_features


def _hivit(backbone: nn.Module) -> list[Stage]:
    # One flat list, with layers between the stages that merge patches. Only its last output works.
    stages: list[Stage] = []
    blocks: list[str] = []
    for i, block in enumerate(backbone.blocks):
        if type(block).__name__ == 'PatchMerge':
            stages.append(Stage(f'stage{len(stages) + 1}', tuple(blocks)))
            blocks = []
        else:
            blocks.append(f'blocks.{i}')
    return [*stages, Stage(f'stage{len(stages) + 1}', tuple(blocks))]


def _hivit_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    main = len(backbone.blocks) - backbone.num_main_blocks
    before = any(block is other for other in backbone.blocks[:main])
    return PatchMaps() if before else Tokens(grid_argument=False)


def _mixmim_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    return TokensOfGrid(grid=tuple(block.input_resolution))


def _tnt_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    pixels = backbone.pixel_embed
    stride = pixels.proj.stride
    grid = tuple(
        side // (step * pixels.new_patch_size[axis])
        for axis, (side, step) in enumerate(zip(pixels.img_size, stride, strict=True))
    )
    return Item(1, TokensOfGrid(grid=grid))


def _conformer(backbone: nn.Module) -> list[Stage]:
    # Its authors name the stages by thirds; block 1 has another form and belongs to the stem.
    third = backbone.depths // 3
    last = max(i for i in backbone.out_indices if i < backbone.fin_stage)
    stages = []
    for k, (start, end) in enumerate(
        [(2, third), (third + 1, 2 * third), (2 * third + 1, 3 * third)]
    ):
        blocks = tuple(f'conv_trans_{i}' for i in range(start, min(end, last) + 1))
        if blocks:
            stages.append(Stage(f'stage{k + 1}', blocks))
    return stages


def _mvit(backbone: nn.Module) -> list[Stage]:
    stages: list[Stage] = []
    blocks: list[str] = []
    for i in range(len(backbone.blocks)):
        blocks.append(f'blocks.{i}')
        if i in backbone.stage_indices:
            stages.append(Stage(f'scale{backbone.stage_indices[i]}', tuple(blocks)))
            blocks = []
    return stages[: max(i for i in backbone.out_scales if i < backbone.num_scales) + 1]


def _pyramid(backbone: nn.Module) -> list[Stage]:
    # A stage is a list: patch embedding, blocks (a position embedding first), norm.
    return [
        Stage(
            f'layers.{i}',
            tuple(
                name
                for name in children(backbone, f'layers.{i}.1')
                if hasattr(backbone.get_submodule(name), 'ffn')
            ),
        )
        for i in range(max(backbone.out_indices) + 1)
    ]


def _twins(backbone: nn.Module) -> list[Stage]:
    return stage_lists('stages' if hasattr(backbone, 'stages') else 'layers')(backbone)


def _mscan(backbone: nn.Module) -> list[Stage]:
    names = [f'block{i + 1}' for i in range(backbone.num_stages)]
    return [Stage(name, children(backbone, name)) for name in names]


_DEPTHS = [1, 1, 2, 1]
_SWIN = dict(depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), drop_path_rate=0.1)
_SWIN_MM = dict(type='SwinTransformer', embed_dims=16, **_SWIN)
_WINDOWS = dict(embed_dims=16, depths=_DEPTHS, num_heads=[1, 2, 4, 4])
_VIT = dict(embed_dims=32, num_layers=4, num_heads=4)
_ARCH = dict(feedforward_channels=64, **_VIT)
_PVT = dict(embed_dims=8, num_layers=[1] * 4, num_heads=[1, 2, 4, 4])
_TWINS = dict(
    embed_dims=[16, 16, 32, 32],
    depths=_DEPTHS,
    num_heads=[1, 1, 2, 2],
    patch_sizes=[4, 2, 2, 2],
    strides=[4, 2, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    sr_ratios=[8, 4, 2, 1],
)
_BEIT = dict(type='BEiT', mlp_ratio=2, img_size=(64, 96), out_indices=(0, 1, 2, 3), **_VIT)

TOKENS: tuple[Family, ...] = (
    Family(
        'SwinTransformer',
        split=stage_lists(blocks='.blocks'),
        channels=feedforward_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(
            mmdet=_SWIN_MM,
            mmseg=_SWIN_MM,
            mmpretrain=dict(type='SwinTransformer', arch=_WINDOWS, pad_small_map=True),
        ),
    ),
    Family(
        'SwinTransformerV2',
        split=stage_lists(blocks='.blocks'),
        channels=feedforward_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(
            mmpretrain=dict(
                type='SwinTransformerV2',
                arch=dict(extra_norm_every_n_blocks=0, **_WINDOWS),
                pad_small_map=True,
            ),
        ),
    ),
    Family(
        'DaViT',
        split=stage_lists(blocks='.blocks'),
        channels=lambda block: block.channel_block.ffn.embed_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(mmpretrain=dict(type='DaViT', arch=_WINDOWS, pad_small_map=True)),
    ),
    Family(
        'VisionTransformer',
        split=plain(),
        channels=embed_dims,
        layout=Tokens(grid_argument=False),
        count_extra=_extra_tokens,
        reads_extra=_returns_class_token,
        examples=dict(
            mmseg=dict(type='VisionTransformer', img_size=64, out_indices=(0, 1, 2, 3), **_VIT),
            mmpretrain=dict(type='VisionTransformer', arch=_ARCH, img_size=64, drop_path_rate=0.1),
        ),
    ),
    Family(
        'BEiTViT',
        split=plain(),
        channels=embed_dims,
        layout=Tokens(grid_argument=False),
        count_extra=_extra_tokens,
        reads_extra=_returns_class_token,
        examples=dict(mmpretrain=dict(type='BEiTViT', arch=_ARCH, img_size=(64, 96))),
    ),
    Family(
        'BEiT',
        split=plain(),
        channels=feedforward_dims,
        layout=Tokens(grid_argument=False),
        count_extra=_one_extra,
        examples=dict(mmseg=_BEIT),
    ),
    Family(
        'ViTSAM',
        split=plain(),
        channels=embed_dims,
        layout=LastMaps(),
        examples=dict(
            mmpretrain=dict(
                type='ViTSAM',
                arch=dict(global_attn_indexes=[3], **_ARCH),
                img_size=64,
                window_size=3,
                out_channels=16,
            ),
        ),
    ),
    Family(
        'T2T_ViT',
        split=plain('encoder'),
        channels=feedforward_dims,
        layout=Tokens(grid_argument=False),
        embedding='tokens_to_token',
        count_extra=_extra_tokens,
        reads_extra=_returns_class_token,
        examples=dict(
            mmpretrain=dict(
                type='T2T_ViT',
                img_size=64,
                embed_dims=32,
                num_layers=4,
                t2t_cfg=dict(token_dims=8),
                layer_cfgs=dict(num_heads=2, feedforward_channels=64),
            ),
        ),
    ),
    Family(
        'TNT',
        split=plain(),
        channels=lambda block: block.projection.out_features,
        native=lambda backbone: backbone.pixel_embed.img_size,
        layout=_tnt_layout,
        count_extra=_one_extra,
        reads_extra=lambda backbone: True,
        examples=dict(
            mmpretrain=dict(
                type='TNT',
                arch=dict(
                    embed_dims_outer=32,
                    embed_dims_inner=8,
                    num_layers=4,
                    num_heads_inner=2,
                    num_heads_outer=4,
                ),
                img_size=(64, 96),
            ),
        ),
    ),
    Family(
        'XCiT',
        split=_xcit,
        channels=feedforward_dims,
        layout=Tokens(grid_argument=False),
        count_extra=_xcit_extra,
        reads_extra=_returns_class_token,
        examples=dict(
            mmpretrain=dict(type='XCiT', embed_dims=32, depth=4, num_heads=2, cls_attn_layers=1),
        ),
    ),
    Family(
        'RevVisionTransformer',
        split=plain(),
        channels=embed_dims,
        layout=Item(1, Tokens(grid_argument=False)),  # The stream that the next attention reads.
        count_extra=lambda backbone, block: backbone.num_extra_tokens,
        examples=dict(mmpretrain=dict(type='RevVisionTransformer', arch=_ARCH, img_size=64)),
    ),
    Family(
        'MlpMixer',
        split=plain(),
        channels=lambda block: block.channel_mix.embed_dims,
        layout=Tokens(grid_argument=False),
        examples=dict(
            mmpretrain=dict(
                type='MlpMixer',
                arch=dict(embed_dims=32, num_layers=4, tokens_mlp_dims=16, channels_mlp_dims=64),
                img_size=(64, 96),
            ),
        ),
    ),
    Family(
        'LeViT',
        split=stage_lists(),
        channels=_last_linear,
        layout=TokensOfGrid(),
        image=(3, 64, 64),
        examples=dict(mmpretrain=dict(type='LeViT', arch='128s', img_size=64)),
    ),
    Family(
        'TinyViT',
        split=stage_lists(blocks='.blocks'),
        channels=_tinyvit_channels,
        layout=_tinyvit_layout,
        examples=dict(
            mmpretrain=dict(
                type='TinyViT',
                arch=dict(channels=[16, 32, 48, 64], num_heads=[1, 2, 3, 4], depths=[1] * 4),
                img_size=(64, 96),
            ),
        ),
    ),
    Family(
        'HiViT',
        split=_hivit,
        channels=lambda block: block.dim,
        layout=_hivit_layout,
        examples=dict(
            mmpretrain=dict(
                type='HiViT',
                arch=dict(embed_dims=32, depths=[1, 1, 7], num_heads=2),
                img_size=64,
                out_indices=[-1],
            ),
        ),
    ),
    Family(
        'MixMIMTransformer',
        split=stage_lists('layers', '.blocks'),
        channels=embed_dims,
        layout=_mixmim_layout,
        image=(3, 64, 128),
        examples=dict(
            mmpretrain=dict(
                type='MixMIMTransformer',
                arch=dict(embed_dims=16, depths=[1] * 4, num_heads=[1, 2, 4, 4]),
                img_size=(64, 128),
                window_size=[2, 2, 2, 2],
            ),
        ),
    ),
    Family(
        'Conformer',
        split=_conformer,
        channels=lambda block: block.fusion_block.conv3.out_channels,
        layout=Item(0, Maps()),  # The map; the tokens take from it in the next block.
        examples=dict(
            mmpretrain=dict(
                type='Conformer',
                arch=dict(embed_dims=32, depths=6, num_heads=2, channel_ratio=0.25),
            ),
        ),
    ),
    Family(
        'MViT',
        split=_mvit,
        channels=lambda block: block.out_dims,
        layout=Item(0, Tokens(grid_argument=True), grid_index=1),
        examples=dict(
            mmpretrain=dict(
                type='MViT',
                arch=dict(embed_dims=16, num_layers=4, num_heads=1, downscale_indices=[1, 2, 3]),
                img_size=64,
            ),
        ),
    ),
    Family(
        'PyramidVisionTransformer',
        split=_pyramid,
        channels=embed_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(
            mmdet=dict(
                type='PyramidVisionTransformer',
                mlp_ratios=(2,) * 4,
                pretrain_img_size=64,
                **_PVT,
            ),
        ),
    ),
    Family(
        'MixVisionTransformer',
        split=_pyramid,
        channels=embed_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(mmseg=dict(type='MixVisionTransformer', mlp_ratio=2, **_PVT)),
    ),
    Family(
        'PCPVT',
        split=_twins,
        channels=feedforward_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(
            mmseg=dict(type='PCPVT', **_TWINS),
            mmpretrain=dict(type='PCPVT', arch=_TWINS),
        ),
    ),
    Family(
        'MSCAN',
        split=_mscan,
        channels=default_scale,
        layout=TokensWithSizes(),
        examples=dict(
            mmseg=dict(
                type='MSCAN',
                embed_dims=[8, 16, 24, 32],
                mlp_ratios=[2] * 4,
                depths=_DEPTHS,
                norm_cfg=dict(type='BN'),
            ),
        ),
    ),
)
