"""What a row of the stage table is, and the rules that many rows share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from ..features import Layout


@dataclass(frozen=True)
class Stage:
    """One stage: its name, and the dotted names of its blocks in the order they run."""

    name: str
    blocks: tuple[str, ...]


OUTPUTS = ('out_indices', 'out_indice', 'out_scales')
"""Spellings of the attribute that chooses what a backbone returns."""
MOST_OUTPUTS = 64
"""More than any backbone has."""


def image_size(backbone: nn.Module) -> tuple[int, int] | None:
    """Height and width that a backbone was built for, in pixels; None: it does not say."""
    size = getattr(backbone, 'img_size', None)
    if isinstance(size, int):
        return size, size
    return tuple(size) if size is not None and len(size) == 2 else None


@dataclass(frozen=True)
class Family:
    """One row of the stage table.

    Attributes:
        name: class name of the family's root; subclasses are found through their MRO.
        split: the stages of a backbone whose output reaches what the backbone returns, in order.
        layout: what a block returns; or a function of the backbone and the block that says so.
        examples: a small config for each library that has the family; the tests build them.
        channels: channels of a block's output, from the block. None: one forward pass on fake
            tensors tells.
        count_extra: number of extra tokens (class, distillation) in a block's output.
        reads_extra: whether a backbone returns the extra tokens alone; then they must pass
            through the last prompt, else it gets no gradient.
        embedding: name of the submodule that knows the patch grid, where the blocks do not; or a
            function of the backbone that says so.
        head: names of the submodules that are a classifier rather than a backbone; they train.
        forks: names of the submodules whose ``forward`` has another structure while training
            ('' is the backbone): their ``training`` follows the mode, their children's does not.
        image: channels, height and width of an image that the examples accept.
        native: height and width of images that a backbone accepts, in pixels; None: any. Default:
            what it was built for, where it says so.
        requires: a library that the row's backbones need beyond their own.
    """

    name: str
    split: Callable[[nn.Module], list[Stage]]
    layout: Layout | Callable[[nn.Module, nn.Module], Layout]
    examples: dict[str, dict] = field(default_factory=dict)
    channels: Callable[[nn.Module], int] | None = None
    count_extra: Callable[[nn.Module, nn.Module], int] = lambda backbone, block: 0
    reads_extra: Callable[[nn.Module], bool] = lambda backbone: False
    embedding: str | Callable[[nn.Module], str] = 'patch_embed'
    head: Callable[[nn.Module], list[str]] = lambda backbone: []
    forks: Callable[[nn.Module], list[str]] = lambda backbone: []
    image: tuple[int, int, int] = (3, 64, 96)
    native: Callable[[nn.Module], tuple[int, int] | None] = image_size
    requires: str = ''

    def layout_of(self, backbone: nn.Module, block: nn.Module) -> Layout:
        """What one block returns."""
        return self.layout(backbone, block) if callable(self.layout) else self.layout

    def unread(self, backbone: nn.Module) -> tuple[str, list[str]]:
        """What follows the last stage whose output reaches what a backbone returns.

        Returns:
            tuple: name of the attribute that chooses the outputs ('' where none does), and names
            of the stages that would follow if it chose all.
        """
        key = next((k for k in OUTPUTS if k in vars(backbone)), '')
        if not key:
            return '', []
        read = {block for stage in self.split(backbone) for block in stage.blocks}
        whole = self._whole(backbone, key)
        flat = [block for stage in whole for block in stage.blocks]
        end = max((i for i, block in enumerate(flat) if block in read), default=-1)
        return key, [s.name for s in whole if flat.index(s.blocks[-1]) > end]

    def _whole(self, backbone: nn.Module, key: str) -> list[Stage]:
        """The stages as they were if all outputs were read."""
        chosen = getattr(backbone, key)
        try:
            for count in range(MOST_OUTPUTS, 0, -1):
                setattr(backbone, key, tuple(range(count)))
                # Some rules do not mind that there are fewer stages, some do.
                with contextlib.suppress(AttributeError, IndexError, KeyError):
                    stages = self.split(backbone)
                    for stage in stages:
                        backbone.get_submodule(stage.blocks[-1])
                    return stages
            return []
        finally:
            setattr(backbone, key, chosen)

    def embedding_of(self, backbone: nn.Module) -> str:
        """Dotted name of what knows the patch grid."""
        return self.embedding(backbone) if callable(self.embedding) else self.embedding


def children(backbone: nn.Module, *containers: str) -> tuple[str, ...]:
    """Dotted names of the children of some containers, in order."""
    return tuple(
        f'{container}.{name}'
        for container in containers
        for name, _ in backbone.get_submodule(container).named_children()
    )


def containers(backbone: nn.Module, names: Iterable[str]) -> list[Stage]:
    """A stage for each container, its children the blocks."""
    return [Stage(name, children(backbone, name)) for name in names]


def indices(chosen: int | Iterable[int] | None, count: int) -> list[int]:
    """Sorted indices below ``count`` that ``out_indices`` chooses; None is the last.

    Negative ones count from the end. mmpretrain allows ``count`` itself, which nothing returns.
    """
    if chosen is None:
        return [count - 1]
    chosen = [chosen] if isinstance(chosen, int) else chosen
    found = {i % count if i < 0 else i for i in chosen if i < count}
    return sorted(found) or [count - 1]


def stage_lists(stages: str = 'stages', blocks: str = '') -> Callable[[nn.Module], list[Stage]]:
    """Rule of backbones with a list of stages, each a container or with one in it.

    Args:
        stages: name of the list.
        blocks: what leads from a stage to its container, such as ``'.blocks'``.
    """

    def split(backbone: nn.Module) -> list[Stage]:
        count = len(backbone.get_submodule(stages))
        last = indices(getattr(backbone, 'out_indices', None), count)[-1]
        return [
            Stage(f'{stages}.{i}', children(backbone, f'{stages}.{i}{blocks}'))
            for i in range(last + 1)
        ]

    return split


def even_ends(count: int, chosen: int | Iterable[int] | None) -> list[tuple[int, int]]:
    """First and last index of each stage of a design without stages.

    Stages end at ``out_indices``; where that is one index, at an even split into four.
    """
    ends = indices(chosen, count)
    if len(ends) == 1:
        total = ends[0] + 1
        ends = sorted({round(total * part / 4) - 1 for part in range(1, 5)} - {-1})
    return list(zip([0, *(end + 1 for end in ends)], ends, strict=False))


def plain(layers: str = 'layers', inner: str = '') -> Callable[[nn.Module], list[Stage]]:
    """Rule of designs without stages: a list of equal layers.

    Args:
        layers: name of the list.
        inner: what leads from a layer to the block in it, such as ``'.1'``.
    """

    def split(backbone: nn.Module) -> list[Stage]:
        count = len(backbone.get_submodule(layers))
        ends = even_ends(count, getattr(backbone, 'out_indices', None))
        return [
            Stage(f'{layers}.{end}', tuple(f'{layers}.{i}{inner}' for i in range(start, end + 1)))
            for start, end in ends
        ]

    return split


def by_stride(
    backbone: nn.Module, groups: dict[int, tuple[str, ...]], dilated: bool = False
) -> list[Stage]:
    """Rule of mobile nets: a stage ends where the resolution changes or a neck reads.

    What keeps the stem's resolution belongs to the stem and ends a stage only where a neck reads
    it, as in ResNet, whose first stage ends at stride 4.

    Args:
        backbone: has ``out_indices``.
        groups: index of an output to the dotted names of the blocks that lead to it.
        dilated: a change of dilation counts too: it stands for a stride.
    """
    last_read = max(backbone.out_indices)
    items = [(i, names) for i, names in groups.items() if i <= last_read]
    stages: list[Stage] = []
    since: tuple[str, ...] = ()
    after_stem = False
    for position, (i, names) in enumerate(items):
        since += names
        after_stem |= _geometry(backbone.get_submodule(names[0]))[0] != 1
        last, changes = position + 1 == len(items), False
        if not last:
            stride, dilation = _geometry(backbone.get_submodule(items[position + 1][1][0]))
            here = _geometry(backbone.get_submodule(names[-1]))[1]
            changes = after_stem and (stride != 1 or (dilated and dilation != here))
        if last or i in backbone.out_indices or changes:
            stages.append(Stage(_container(names), since))
            since = ()
    return stages


def _geometry(block: nn.Module) -> tuple[int, int]:
    """Largest stride and dilation of a block's convolutions."""
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    return max(c.stride[0] for c in convs), max(c.dilation[0] for c in convs)


def _container(names: tuple[str, ...]) -> str:
    return names[-1].rpartition('.')[0] or names[-1]


def residual_channels(block: nn.Module) -> int:
    """Channels of a residual block of two or three convolutions."""
    return (getattr(block, 'conv3', None) or block.conv2).out_channels


def inverted_channels(block: nn.Module) -> int:
    """Channels of an inverted residual block."""
    if hasattr(block, 'conv') and isinstance(block.conv, nn.Sequential):
        return block.conv[-1].out_channels
    last = getattr(block, 'linear_conv', None) or getattr(block, 'conv2', None) or block
    return last.out_channels


def out_channels(block: nn.Module) -> int:
    """Channels of a block that says so itself."""
    return block.out_channels


def embed_dims(block: nn.Module) -> int:
    """Channels of a Transformer block."""
    return getattr(block, 'embed_dims', None) or feedforward_dims(block)


def feedforward_dims(block: nn.Module) -> int:
    """Channels of a Transformer block, from its feed-forward network."""
    return (getattr(block, 'ffn', None) or block.mlp).embed_dims


def default_scale(block: nn.Module) -> int:
    """Channels of a block with a scale for each channel."""
    return block.layer_scale_1.numel()
