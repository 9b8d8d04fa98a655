"""Rows of wrappers around the backbones of another library."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..features import Layout, Tokens, TokensOfGrid, Unknown
from .family import Family, Stage, children, even_ends


def _features(backbone: nn.Module) -> tuple[str, nn.Module, list[dict], Sequence[int] | None]:
    """Prefix and network of a timm model, what it says of its features, and which are read."""
    prefix, net = 'timm_model', backbone.timm_model
    read = getattr(net, 'out_indices', None)
    if type(net).__name__ == 'FeatureGetterNet':
        prefix, net = 'timm_model.model', net.model
    info = getattr(net, 'feature_info', [])
    if not isinstance(info, list):
        read, info = info.out_indices, info.info
    return prefix, net, info, read


_ODD = {
    'Hiera': 'keeps its tokens in the order of its mask units',
    'NaFlexVit': 'takes patches of any grid',
    'PoolingVisionTransformer': 'hands maps and class tokens on as pairs',
    'SelecSls': 'hands lists of maps on',
    'TNT': 'hands pixels and patches on as pairs',
    'VOLO': 'returns channels last from its blocks',
    'VisionTransformerSAM': 'returns channels last from its blocks',
}
"""Networks of timm between whose blocks goes something that a prompt cannot take; and what."""


def _timm(backbone: nn.Module) -> list[Stage]:
    prefix, net, info, read = _features(backbone)
    kind = type(net).__name__
    if kind in _ODD:
        raise ValueError(
            f"TIMMBackbone: {kind} {_ODD[kind]}, so prompts have no place: use policy='head-only'"
        )
    modules = dict(net.named_modules())
    last = len(info) - 1 if read is None else max((i % len(info) for i in read), default=-1)
    # timm flattens the containers of some networks whose features it returns.
    paths = [next((n for n in _spellings(item) if n in modules), '') for item in info[: last + 1]]
    if not paths or '' in paths:
        return []
    if len(info) > 1 and len({item['reduction'] for item in info}) == 1:
        # A plain Transformer calls every block a feature.
        return [
            Stage(paths[end], tuple(f'{prefix}.{p}' for p in paths[start : end + 1]))
            for start, end in even_ends(last + 1, read)
        ]
    # What is finer than stride 4 belongs to the stem, unless a neck reads it.
    deep = [i for i in range(last + 1) if info[i]['reduction'] >= 4 or i in (read or [last])]
    stages = [Stage(paths[i], _blocks(backbone, f'{prefix}.{paths[i]}')) for i in deep]
    # A container with a forward of its own (DenseNet's) would run a prompt as one of its layers.
    ends = [backbone.get_submodule(stage.blocks[-1]) for stage in stages]
    containers = nn.Sequential | nn.ModuleDict | nn.ModuleList
    return [] if any(isinstance(end, containers) for end in ends) else stages


def _spellings(item: dict) -> tuple[str, str]:
    return item['module'], item['module'].replace('.', '_')


def _blocks(backbone: nn.Module, path: str) -> tuple[str, ...]:
    """The children of a module that runs one after the other; else the module itself."""
    module = backbone.get_submodule(path)
    names = children(backbone, path)
    # RegNet's stage is no Sequential, but runs its children like one.
    if not names or not (type(module) is nn.Sequential or type(module).__name__ == 'RegStage'):
        return (path,)
    last = backbone.get_submodule(names[-1])
    return _blocks(backbone, names[-1]) if type(last) is nn.Sequential else names


def _timm_layout(backbone: nn.Module, block: nn.Module) -> Layout:
    _, net, _, _ = _features(backbone)
    knows = hasattr(getattr(net, 'patch_embed', None), 'patch_size')
    return Unknown(
        channels_last=str(getattr(net, 'output_fmt', '')).endswith('NHWC'),
        tokens=Tokens(grid_argument=False) if knows else TokensOfGrid(),
    )


def _timm_embedding(backbone: nn.Module) -> str:
    return f'{_features(backbone)[0]}.patch_embed'


def _timm_extra(backbone: nn.Module, block: nn.Module) -> int:
    return getattr(_features(backbone)[1], 'num_prefix_tokens', 0)


def _timm_reads_extra(backbone: nn.Module) -> bool:
    # Distilled nets hand on the mean of the class and the distillation token.
    return hasattr(backbone.timm_model, 'head_dist')


def _timm_size(backbone: nn.Module) -> tuple[int, int] | None:
    net = _features(backbone)[1]
    size = getattr(getattr(net, 'patch_embed', None), 'img_size', None)
    if size is None and getattr(net, 'default_cfg', None):
        size = net.default_cfg['input_size'][1:]
    return size


_FEATURES_ONLY = dict(
    type='TIMMBackbone', model_name='resnet10t', features_only=True, out_indices=(1, 2, 4)
)


WRAPPED: tuple[Family, ...] = (
    Family(
        'TIMMBackbone',
        split=_timm,
        layout=_timm_layout,
        count_extra=_timm_extra,
        reads_extra=_timm_reads_extra,
        embedding=_timm_embedding,
        native=_timm_size,
        # mmseg's fetches weights unless told not to.
        examples=dict(mmseg=dict(_FEATURES_ONLY, pretrained=False), mmpretrain=_FEATURES_ONLY),
        requires='timm',
    ),
)
