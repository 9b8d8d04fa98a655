"""Rows of backbones whose stages follow each other and return maps."""

from __future__ import annotations

from torch import nn

from ..features import Layout, Maps, TokensOfGrid
from .family import (
    Family,
    Stage,
    by_stride,
    children,
    containers,
    default_scale,
    inverted_channels,
    out_channels,
    plain,
    residual_channels,
    stage_lists,
)


def _resnet(backbone: nn.Module) -> list[Stage]:
    return containers(backbone, backbone.res_layers[: max(backbone.out_indices) + 1])


def _trident(backbone: nn.Module) -> list[Stage]:
    # Blocks of the last stage return a list of branches; its last block joins them.
    stages = _resnet(backbone)
    joins = lambda name: getattr(backbone.get_submodule(name), 'concat_output', True)  # noqa: E731
    return [Stage(s.name, tuple(filter(joins, s.blocks))) for s in stages]


def _trident_forks(backbone: nn.Module) -> list[str]:
    # Three branches while training, one in a test.
    return [n for n, m in backbone.named_modules() if type(m).__name__.startswith('Trident')]


def _mobilenet_v2(backbone: nn.Module) -> list[Stage]:
    # `conv2`, the last entry where it exists, is no stage of its own: layer7's prompt feeds it.
    # `layer1` keeps the stem's stride of 2 and belongs to the stem, as in ResNet, whose first
    # stage ends at stride 4; it ends a stage only where a neck reads it.
    layers = [name for name in backbone.layers if name != 'conv2']
    return by_stride(backbone, {i: children(backbone, name) for i, name in enumerate(layers)})


def _mobilenet_v3(backbone: nn.Module) -> list[Stage]:
    # The first and the last layer are plain convolutions. mmseg dilates strides away.
    blocks = {
        i: (name,)
        for i, name in enumerate(backbone.layers)
        if hasattr(backbone.get_submodule(name), 'linear_conv')
    }
    return by_stride(backbone, blocks, dilated=True)


def _efficientnet(backbone: nn.Module) -> list[Stage]:
    # The first and the last layer are plain convolutions.
    blocks = {
        i: children(backbone, f'layers.{i}')
        for i, layer in enumerate(backbone.layers)
        if isinstance(layer, nn.Sequential) and not hasattr(layer, 'activate')
    }
    return by_stride(backbone, blocks)


def _mobilevit(backbone: nn.Module) -> list[Stage]:
    count = len(backbone.layers)
    return by_stride(backbone, {i: children(backbone, f'layers.{i}') for i in range(count)})


def _mobilevit_channels(block: nn.Module) -> int:
    if hasattr(block, 'conv_proj'):
        return (block.conv_fusion or block.conv_proj).out_channels
    return inverted_channels(block)


def _vgg(backbone: nn.Module) -> list[Stage]:
    # A stage ends before its pooling. The classifier, where there is one, reads the last.
    blocks = backbone.stage_blocks
    reached = len(blocks) if backbone.num_classes > 0 else max(backbone.out_indices) + 1
    starts = [start for start, _ in backbone.range_sub_modules]
    return [
        Stage(f'stage{i + 1}', tuple(f'features.{j}' for j in range(start, start + blocks[i])))
        for i, start in enumerate(starts[:reached])
    ]


def _before_pooling(backbone: nn.Module) -> list[Stage]:
    # One flat list. The convolutions are the blocks: an activation has no weights, which tell a
    # prompt its channels, device and dtype.
    stages: list[Stage] = []
    convs: tuple[str, ...] = ()
    for name, layer in backbone.features.named_children():
        if isinstance(layer, nn.Conv2d):
            convs += (f'features.{name}',)
        elif isinstance(layer, nn.MaxPool2d | nn.AvgPool2d):
            stages.append(Stage(f'stage{len(stages) + 1}', convs))
            convs = ()
    return [*stages, Stage(f'stage{len(stages) + 1}', convs)] if convs else stages


def _classifier(backbone: nn.Module) -> list[str]:
    return ['classifier'] if backbone.num_classes > 0 else []


def _ssd_vgg(backbone: nn.Module) -> list[Stage]:
    # One flat list; what it returns comes from the activations of `out_feature_indices`.
    features, read = backbone.features, set(backbone.out_feature_indices)
    end, since, stages = max(read), 0, []
    for i in range(end + 1):
        pools = i < end and isinstance(features[i + 1], nn.MaxPool2d)
        if i == end or i in read or (pools and features[i + 1].stride != 1):
            acts = [j for j in range(since, i + 1) if isinstance(features[j], nn.ReLU)]
            stages.append(Stage(f'features.{i}', tuple(f'features.{j}' for j in acts)))
            since = i + 1
    return stages


def _densenet(backbone: nn.Module) -> list[Stage]:
    # The transition's convolution halves the channels before its pooling halves the map.
    stages = []
    for i in range(max(backbone.out_indices) + 1):
        blocks = (f'stages.{i}',)
        if hasattr(backbone.transitions[i], 'conv'):
            blocks += (f'transitions.{i}.conv',)
        stages.append(Stage(f'stages.{i}', blocks))
    return stages


def _densenet_channels(block: nn.Module) -> int:
    if isinstance(block, nn.Conv2d):
        return block.out_channels
    last = block.block[-1]
    return last.norm1.num_features + last.conv2.out_channels


def _hrnet(backbone: nn.Module) -> list[Stage]:
    # A module's fusion returns a list of maps from shared layers: prompts go before it, one a
    # resolution.
    stages = containers(backbone, ['layer1'])
    for name in ('stage2', 'stage3', 'stage4'):
        modules = backbone.get_submodule(name)
        for branch in range(modules[0].num_branches):
            lists = [f'{name}.{m}.branches.{branch}' for m in range(len(modules))]
            stages.append(Stage(f'{name}.branch{branch}', children(backbone, *lists)))
    return stages


def _inception(backbone: nn.Module) -> list[Stage]:
    groups: dict[str, list[str]] = {}
    for name, _ in backbone.named_children():
        if name.startswith('Mixed_'):
            groups.setdefault(name[:7], []).append(name)
    return [Stage(name, tuple(blocks)) for name, blocks in groups.items()]


def _named_stages(backbone: nn.Module) -> list[Stage]:
    return containers(backbone, backbone.stages[: max(backbone.out_indices) + 1])


def _whole_stages(backbone: nn.Module) -> list[Stage]:
    # A stage is one block that splits and joins channels.
    names = [f'stages.{i}' for i in range(max(backbone.out_indices) + 1)]
    return [Stage(name, (name,)) for name in names]


def _shufflenet(backbone: nn.Module) -> list[Stage]:
    # The last 1x1 convolution of V2 is no stage.
    count = sum(isinstance(layer, nn.Sequential) for layer in backbone.layers)
    last = min(max(backbone.out_indices) + 1, count)
    return containers(backbone, [f'layers.{i}' for i in range(last)])


def _shufflenet_v1_channels(block: nn.Module) -> int:
    joined = block.in_channels if block.combine == 'concat' else 0
    return block.out_channels + joined


def _van(backbone: nn.Module) -> list[Stage]:
    return containers(backbone, [f'blocks{i + 1}' for i in range(max(backbone.out_indices) + 1)])


def _network(backbone: nn.Module) -> list[Stage]:
    # Stages and down-sampling layers in turn.
    used = list(backbone.network)[: max(backbone.out_indices) + 1]
    names = [f'network.{i}' for i, m in enumerate(used) if isinstance(m, nn.Sequential)]
    return containers(backbone, names)


def _edgenext_channels(block: nn.Module) -> int:
    last = block.pointwise_conv2
    return getattr(last, 'out_features', None) or last.out_channels


def _repmlp(backbone: nn.Module) -> list[Stage]:
    # The class spells `out_indice`.
    return containers(backbone, [f'stages.{i}' for i in range(max(backbone.out_indice) + 1)])


def _pyramid_vig(backbone: nn.Module) -> list[Stage]:
    # A block is a plain Sequential of a graph network and a feed-forward one, its last layer.
    return [
        Stage(
            f'stages.{i}',
            tuple(
                f'stages.{i}.{name}.1'
                for name, block in backbone.stages[i].named_children()
                if hasattr(block[1], 'fc2')
            ),
        )
        for i in range(max(backbone.out_indices) + 1)
    ]


def _efficientformer(backbone: nn.Module) -> list[Stage]:
    return [
        Stage(
            f'network.{i}',
            tuple(
                f'network.{i}.{name}'
                for name, block in backbone.network[i].named_children()
                if hasattr(block, 'token_mixer')
            ),
        )
        for i in range(max(backbone.out_indices) + 1)
    ]


def _efficientformer_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    return Maps() if isinstance(block.mlp.fc1, nn.Conv2d) else TokensOfGrid()


def _efficientformer_channels(block: nn.Module) -> int:
    first = block.mlp.fc1
    return getattr(first, 'in_features', None) or first.in_channels


def _cspdarknet(backbone: nn.Module) -> list[Stage]:
    used = backbone.layers[: max(backbone.out_indices) + 1]
    return containers(backbone, used if 0 in backbone.out_indices else used[1:])


def _cspdarknet_channels(block: nn.Module) -> int:
    """Of a CSPLayer, an SPPBottleneck, or a plain or separable convolution."""
    for name in ('final_conv', 'conv2', 'pointwise_conv'):
        block = getattr(block, name, block)
    return block.conv.out_channels


def _darknet(backbone: nn.Module) -> list[Stage]:
    used = backbone.cr_blocks[: max(backbone.out_indices) + 1]
    stem = [Stage(used[0], (used[0],))] if 0 in backbone.out_indices else []
    return [*stem, *containers(backbone, used[1:])]


def _hrnet_extra() -> dict:
    """Widths of the smallest network of this design."""
    basic = dict(block='BASIC', num_modules=1)
    return dict(
        stage1=dict(
            num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(8,)
        ),
        stage2=dict(basic, num_branches=2, num_blocks=(1,) * 2, num_channels=(8, 16)),
        stage3=dict(basic, num_branches=3, num_blocks=(1,) * 3, num_channels=(8, 16, 24)),
        stage4=dict(basic, num_branches=4, num_blocks=(1,) * 4, num_channels=(8, 16, 24, 32)),
    )


_WIDTHS, _DEPTHS = [8, 16, 24, 32], [1, 1, 2, 1]
_HRNET = dict(type='HRNet', extra=_hrnet_extra())
_POOLFORMER = dict(layers=[1, 1, 1, 1], embed_dims=_WIDTHS)
_REPVGG = dict(num_blocks=_DEPTHS, width_factor=[0.125] * 4, group_layer_map=None, se_cfg=None)
_MOBILEONE = dict(
    num_blocks=_DEPTHS,
    width_factor=[0.125] * 4,
    num_conv_branches=[2, 1, 1, 1],
    num_se_blocks=[0, 0, 1, 1],
)
_HORNET = dict(
    base_dim=16,
    depths=_DEPTHS,
    orders=[2, 3, 4, 5],
    dw_cfg=[
        dict(type='DW', kernel_size=7),
        dict(type='DW', kernel_size=7),
        dict(type='GF', h=14, w=8),
        dict(type='GF', h=7, w=4),
    ],
)
_MOBILEVIT = [
    ['mobilenetv2', 8, 1, 1, 2],
    ['mobilenetv2', 8, 2, 1, 2],
    ['mobilevit', 16, 2, 16, 32, 1, 2],
    ['mobilevit', 24, 2, 16, 32, 1, 2],
    ['mobilevit', 32, 2, 16, 32, 1, 2],
]
_EFFICIENTFORMER = dict(
    layers=[1, 1, 1, 2],
    embed_dims=[16, 16, 32, 32],
    downsamples=[False, True, True, True],
    vit_num=1,
)
_REPLKNET = dict(
    large_kernel_sizes=[13, 9, 7, 5],
    layers=[1, 1, 1, 1],
    channels=_WIDTHS,
    small_kernel=5,
    dw_ratio=1,
)

MAPS: tuple[Family, ...] = (
    Family(
        'ResNet',
        split=_resnet,
        channels=residual_channels,
        layout=Maps(),
        examples=dict(
            mmdet=dict(type='ResNet', depth=18, base_channels=8, norm_eval=False),
            mmseg=dict(type='ResNetV1c', depth=50, base_channels=8, stem_channels=8),
            mmpretrain=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
        ),
    ),
    Family(
        'TridentResNet',
        split=_trident,
        channels=residual_channels,
        layout=Maps(),
        forks=_trident_forks,
        examples=dict(
            mmdet=dict(
                type='TridentResNet',
                depth=50,
                base_channels=8,
                num_stages=3,
                strides=(1, 2, 2),
                dilations=(1, 1, 1),
                out_indices=(2,),
                trident_dilations=(1, 2, 3),
                num_branch=3,
                test_branch_idx=1,
            ),
        ),
    ),
    Family(
        'MobileNetV2',
        split=_mobilenet_v2,
        channels=inverted_channels,
        layout=Maps(),
        examples=dict(
            mmdet=dict(type='MobileNetV2', widen_factor=0.25),
            mmseg=dict(type='MobileNetV2', widen_factor=0.25, out_indices=(1, 2, 4, 6)),
            mmpretrain=dict(type='MobileNetV2', widen_factor=0.25),
        ),
    ),
    Family(
        'MobileNetV3',
        split=_mobilenet_v3,
        channels=inverted_channels,
        layout=Maps(),
        examples=dict(
            mmseg=dict(type='MobileNetV3', arch='small'),
            mmpretrain=dict(type='MobileNetV3', arch='small_050'),
        ),
    ),
    Family(
        'EfficientNet',
        split=_efficientnet,
        channels=inverted_channels,
        layout=Maps(),
        examples=dict(
            mmdet=dict(type='EfficientNet', arch='b0', out_indices=(3, 4, 5)),
            mmpretrain=dict(type='EfficientNet', arch='b0'),
        ),
    ),
    Family(
        'EfficientNetV2',
        split=_efficientnet,
        channels=inverted_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='EfficientNetV2', arch='b0')),
    ),
    Family(
        'MobileViT',
        split=_mobilevit,
        channels=_mobilevit_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='MobileViT', arch=_MOBILEVIT)),
    ),
    Family(
        'ConvNeXt',
        split=stage_lists(),
        channels=lambda block: block.depthwise_conv.in_channels,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='ConvNeXt',
                arch=dict(depths=_DEPTHS, channels=[8, 16, 32, 64]),
                drop_path_rate=0.1,
            ),
        ),
    ),
    Family(
        'HRNet',
        split=_hrnet,
        channels=residual_channels,
        layout=Maps(),
        examples=dict(mmdet=_HRNET, mmseg=_HRNET, mmpretrain=_HRNET),
    ),
    Family(
        'VGG',
        split=_vgg,
        channels=out_channels,
        layout=Maps(),
        head=_classifier,
        examples=dict(mmpretrain=dict(type='VGG', depth=11)),
    ),
    Family(
        'SSDVGG',
        split=_ssd_vgg,
        layout=Maps(),
        examples=dict(mmdet=dict(type='SSDVGG', depth=11, out_feature_indices=(14, 24))),
    ),
    Family(
        'AlexNet',
        split=_before_pooling,
        channels=out_channels,
        layout=Maps(),
        head=_classifier,
        examples=dict(mmpretrain=dict(type='AlexNet')),
    ),
    Family(
        'LeNet5',
        split=_before_pooling,
        channels=out_channels,
        layout=Maps(),
        head=_classifier,
        image=(1, 32, 32),
        examples=dict(mmpretrain=dict(type='LeNet5', num_classes=4)),
    ),
    Family(
        'DenseNet',
        split=_densenet,
        channels=_densenet_channels,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='DenseNet', arch=dict(growth_rate=8, depths=_DEPTHS, init_channels=8)
            ),
        ),
    ),
    Family(
        'InceptionV3',
        split=_inception,
        layout=Maps(),
        head=lambda backbone: ['fc', *(['AuxLogits'] if backbone.aux_logits else [])],
        forks=lambda backbone: [''],  # The auxiliary classifier runs while training only.
        image=(3, 75, 107),
        examples=dict(mmpretrain=dict(type='InceptionV3', num_classes=4)),
    ),
    Family(
        'MobileOne',
        split=_named_stages,
        channels=out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='MobileOne', arch=_MOBILEONE, out_indices=(3,))),
    ),
    Family(
        'RepVGG',
        split=_named_stages,
        channels=out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='RepVGG', arch=_REPVGG, out_indices=(3,))),
    ),
    Family(
        'RepLKNet',
        split=stage_lists(blocks='.blocks'),
        channels=lambda block: block.pw2.conv.out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='RepLKNet', arch=_REPLKNET)),
    ),
    Family(
        'RepMLPNet',
        split=_repmlp,
        channels=lambda block: block.norm1.num_features,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='RepMLPNet',
                arch=dict(channels=_WIDTHS, depths=_DEPTHS, sharesets_nums=[1, 4, 4, 4]),
                img_size=(64, 96),
            ),
        ),
    ),
    Family(
        'ShuffleNetV1',
        split=_shufflenet,
        channels=_shufflenet_v1_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='ShuffleNetV1', groups=2, widen_factor=0.25)),
    ),
    Family(
        'ShuffleNetV2',
        split=_shufflenet,
        channels=lambda block: 2 * block.branch2[-1].out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='ShuffleNetV2', widen_factor=0.5)),
    ),
    Family(
        'CSPNet',
        split=_whole_stages,
        channels=lambda block: block.final_conv.out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='CSPResNet', depth=50)),
    ),
    Family(
        'CSPDarknet',
        split=_cspdarknet,
        channels=_cspdarknet_channels,
        layout=Maps(),
        examples=dict(mmdet=dict(type='CSPDarknet', deepen_factor=0.1, widen_factor=0.125)),
    ),
    Family(
        'CSPNeXt',
        split=_cspdarknet,
        channels=_cspdarknet_channels,
        layout=Maps(),
        examples=dict(mmdet=dict(type='CSPNeXt', deepen_factor=0.1, widen_factor=0.125)),
    ),
    Family(
        'Darknet',
        split=_darknet,
        layout=Maps(),
        examples=dict(mmdet=dict(type='Darknet')),
    ),
    Family(
        'ConvMixer',
        split=plain('stages', '.3'),  # The last layer of a plain Sequential, a batch norm.
        channels=lambda block: block.num_features,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='ConvMixer', arch=dict(embed_dims=16, depth=4, patch_size=7, kernel_size=5)
            ),
        ),
    ),
    Family(
        'HorNet',
        split=stage_lists(),
        channels=out_channels,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='HorNet', arch=_HORNET)),
    ),
    Family(
        'VAN',
        split=_van,
        channels=out_channels,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='VAN', arch=dict(embed_dims=_WIDTHS, depths=_DEPTHS, ffn_ratios=[2] * 4)
            ),
        ),
    ),
    Family(
        'EdgeNeXt',
        split=stage_lists(),
        channels=_edgenext_channels,
        layout=Maps(),
        examples=dict(
            mmpretrain=dict(
                type='EdgeNeXt',
                arch=dict(channels=_WIDTHS, depths=_DEPTHS, num_heads=[4, 4, 4, 4]),
            ),
        ),
    ),
    Family(
        'PoolFormer',
        split=_network,
        channels=default_scale,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='PoolFormer', arch=_POOLFORMER)),
    ),
    Family(
        'RIFormer',
        split=_network,
        channels=default_scale,
        layout=Maps(),
        examples=dict(mmpretrain=dict(type='RIFormer', arch=_POOLFORMER)),
    ),
    Family(
        'Vig',
        split=plain('blocks', '.1'),  # The feed-forward network of a plain Sequential.
        channels=lambda block: block.fc2[0].out_channels,
        layout=Maps(),
        image=(3, 224, 224),
        examples=dict(mmpretrain=dict(type='Vig', arch='tiny')),
    ),
    Family(
        'PyramidVig',
        split=_pyramid_vig,
        channels=lambda block: block.fc2[0].out_channels,
        layout=Maps(),
        image=(3, 224, 224),
        examples=dict(mmpretrain=dict(type='PyramidVig', arch='tiny')),
    ),
    Family(
        'EfficientFormer',
        split=_efficientformer,
        channels=_efficientformer_channels,
        layout=_efficientformer_layout,
        image=(3, 224, 224),
        examples=dict(mmpretrain=dict(type='EfficientFormer', arch=_EFFICIENTFORMER)),
    ),
)
