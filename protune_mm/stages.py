"""The stage table: where the stages of each backbone family end. One row a family.

To add a backbone, add one :class:`Family` to :data:`FAMILIES`; the tests run over the table, with
the row's own example configs. See docs/add_a_backbone.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from .features import Layout, Maps, Tokens

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')


@dataclass(frozen=True)
class Stage:
    """One stage: its name, and the dotted names of its blocks in the order they run."""

    name: str
    blocks: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """One row of the stage table.

    Attributes:
        name: class name of the family's root; subclasses are found through their MRO.
        split: the stages of a backbone whose output reaches what the backbone returns, in order.
        channels: channels of a block's output, from the block.
        layout: what a block returns.
        examples: a small config for each library that has the family; the tests build them.
        count_extra: number of extra tokens (class, distillation) of a backbone's blocks.
        reads_extra: whether a backbone returns the extra tokens alone; then they must pass
            through the last prompt, else it gets no gradient.
    """

    name: str
    split: Callable[[nn.Module], list[Stage]]
    channels: Callable[[nn.Module], int]
    layout: Layout
    examples: dict[str, dict]
    count_extra: Callable[[nn.Module], int] = lambda backbone: 0
    reads_extra: Callable[[nn.Module], bool] = lambda backbone: False


def _children(backbone: nn.Module, *containers: str) -> tuple[str, ...]:
    return tuple(
        f'{container}.{name}'
        for container in containers
        for name, _ in backbone.get_submodule(container).named_children()
    )


def _resnet(backbone: nn.Module) -> list[Stage]:
    used = backbone.res_layers[: max(backbone.out_indices) + 1]
    return [Stage(name, _children(backbone, name)) for name in used]


def _mobilenet_v2(backbone: nn.Module) -> list[Stage]:
    # `conv2`, the last entry where it exists, is no stage of its own: layer7's prompt feeds it.
    # `layer1` keeps the stem's stride of 2 and belongs to the stem, as in ResNet, whose first
    # stage ends at stride 4; it ends a stage only where a neck reads it.
    layers = [name for name in backbone.layers if name != 'conv2']
    layers = layers[: max(backbone.out_indices) + 1]
    stages, since = [], 0
    for i, name in enumerate(layers):
        last = i + 1 == len(layers)
        resolution_changes = not last and _stride(backbone.get_submodule(layers[i + 1])[0]) != 1
        if last or i in backbone.out_indices or (resolution_changes and i > 0):
            stages.append(Stage(name, _children(backbone, *layers[since : i + 1])))
            since = i + 1
    return stages


def _stride(block: nn.Module) -> int:
    return max(conv.stride[0] for conv in block.modules() if isinstance(conv, nn.Conv2d))


def _stage_lists(blocks: str) -> Callable[[nn.Module], list[Stage]]:
    def split(backbone: nn.Module) -> list[Stage]:
        return [
            Stage(f'stages.{i}', _children(backbone, f'stages.{i}{blocks}'))
            for i in range(max(backbone.out_indices) + 1)
        ]

    return split


def _plain(backbone: nn.Module) -> list[Stage]:
    ends = sorted({min(i, len(backbone.layers) - 1) for i in backbone.out_indices})
    if len(ends) == 1:
        count = ends[0] + 1
        ends = sorted({round(count * part / 4) - 1 for part in range(1, 5)} - {-1})
    return [
        Stage(f'layers.{end}', tuple(f'layers.{i}' for i in range(start, end + 1)))
        for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)
    ]


def _residual_channels(block: nn.Module) -> int:
    return (getattr(block, 'conv3', None) or block.conv2).out_channels


def _inverted_residual_channels(block: nn.Module) -> int:
    last = block.conv[-1] if hasattr(block, 'conv') else block.linear_conv
    return last.out_channels


def _extra_tokens(backbone: nn.Module) -> int:
    # mmseg keeps a class token parameter but may drop the token before the first block.
    if getattr(backbone, 'with_cls_token', True):
        return getattr(backbone, 'num_extra_tokens', 1)
    return 0


_SWIN = dict(depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), drop_path_rate=0.1)
_SWIN_MM = dict(type='SwinTransformer', embed_dims=16, **_SWIN)
_VIT = dict(embed_dims=32, num_layers=4, num_heads=4)

FAMILIES: tuple[Family, ...] = (
    Family(
        'ResNet',
        split=_resnet,
        channels=_residual_channels,
        layout=Maps(),
        examples=dict(
            mmdet=dict(type='ResNet', depth=18, base_channels=8, norm_eval=False),
            mmseg=dict(type='ResNetV1c', depth=50, base_channels=8, stem_channels=8),
            mmpretrain=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
        ),
    ),
    Family(
        'MobileNetV2',
        split=_mobilenet_v2,
        channels=_inverted_residual_channels,
        layout=Maps(),
        examples=dict(
            mmdet=dict(type='MobileNetV2', widen_factor=0.25),
            mmseg=dict(type='MobileNetV2', widen_factor=0.25, out_indices=(1, 2, 4, 6)),
            mmpretrain=dict(type='MobileNetV2', widen_factor=0.25),
        ),
    ),
    Family(
        'ConvNeXt',
        split=_stage_lists(''),
        channels=lambda block: block.depthwise_conv.in_channels,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='ConvNeXt',
                arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]),
                drop_path_rate=0.1,
            ),
        ),
    ),
    Family(
        'SwinTransformer',
        split=_stage_lists('.blocks'),
        channels=lambda block: block.ffn.embed_dims,
        layout=Tokens(grid_argument=True),
        examples=dict(
            mmdet=_SWIN_MM,
            mmseg=_SWIN_MM,
            mmpretrain=dict(
                type='SwinTransformer',
                arch=dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 4]),
                pad_small_map=True,
            ),
        ),
    ),
    Family(
        'VisionTransformer',
        split=_plain,
        channels=lambda block: getattr(block, 'embed_dims', None) or block.ffn.embed_dims,
        layout=Tokens(grid_argument=False),
        count_extra=_extra_tokens,
        reads_extra=lambda backbone: getattr(backbone, 'out_type', '') == 'cls_token',
        examples=dict(
            mmseg=dict(type='VisionTransformer', img_size=64, out_indices=(0, 1, 2, 3), **_VIT),
            mmpretrain=dict(
                type='VisionTransformer',
                arch=dict(feedforward_channels=64, **_VIT),
                img_size=64,
                drop_path_rate=0.1,
            ),
        ),
    ),
)


def find_family(backbone_type: type) -> Family | None:
    """Row of a backbone class: of itself, else of the nearest parent that has one.

    Only classes of the three libraries match by name, so that a user's own class that merely
    shares a name with one is not taken for it.

    Args:
        backbone_type: class of the stock backbone.

    Returns:
        Family, or None where no class in the MRO has a row.
    """
    rows = {family.name: family for family in FAMILIES}
    for parent in backbone_type.__mro__:
        if parent.__module__.split('.')[0] in LIBRARIES and parent.__name__ in rows:
            return rows[parent.__name__]
    return None


def known_families() -> str:
    """Names of the rows, for messages."""
    return ', '.join(family.name for family in FAMILIES)
