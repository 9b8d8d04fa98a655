"""What prompt types may say about their place; a plain module with none of it sits after stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mmengine.model import BaseModule
from torch import nn

FEEDFORWARD = ('ffn', 'mlp')
"""Names that the libraries give the feed-forward network of a Transformer block."""


class Prompt(BaseModule):
    """A prompt type that knows where it belongs.

    Attributes:
        where: ``'stages'``: after the last block of every stage. ``'blocks'``: after every block.
            ``'layers'``: beside layers inside every block; its output is added to the layer's, so
            it has that shape. Its constructor is given what it names of the layer's
            ``out_channels``, ``stride``, ``kernel_size``, ``padding``, ``dilation``, ``conv_type``
            and ``padding_mode``.
        reads: of a type beside layers: ``'input'`` or ``'output'`` of the layer.
        mergeable: what it computes is a change of that layer's weights.
        pointwise: each pixel or token stands for itself, so that no grid of them is needed.
    """

    where = 'stages'
    reads = 'input'
    mergeable = False
    pointwise = False

    @classmethod
    def layers(cls, block: nn.Module, **options: object) -> list[str]:
        """Dotted names, inside a block, of the layers beside which the type runs.

        Args:
            block: a block of a stage.
            **options: of the prompt, as a config gives them.

        Returns:
            list[str]: ``''`` is the block itself.
        """
        raise NotImplementedError

    @classmethod
    def unmatched(cls, found: Iterable[str], **options: object) -> dict[str, str]:
        """What of the options names a layer that no block has.

        Args:
            found: dotted names of the layers of all blocks.
            **options: of the prompt, as a config gives them.

        Returns:
            dict[str, str]: option to the name, empty where there is none.
        """
        return {}

    def merge_into(self, layer: nn.Module) -> None:
        """Add what the prompt computes to the weights of the layer beside which it runs.

        Only for types that are ``mergeable``.
        """
        raise NotImplementedError


def check_count(name: str, value: object, of: str = 'channels') -> None:
    """Refuse an option that counts something and is no whole number from 1 on.

    Raises:
        ValueError: it is none.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f'{name}={value!r} is no number of {of}: use 1 or more')


def feedforward(block: nn.Module) -> list[str]:
    """The feed-forward networks of a block; the block itself where it has none."""
    return list(outermost(block, lambda name, _: name in FEEDFORWARD)) or ['']


def outermost(block: nn.Module, wanted: object, path: str = '') -> Iterator[str]:
    """Dotted names of the modules that are wanted, none inside another; '' is the block itself.

    Args:
        block: where to look.
        wanted: takes the own name of a module and the module, and says whether it is.
        path: dotted name of ``block``. Default: it is what names are relative to.
    """
    if wanted(path.rpartition('.')[2], block):
        yield path
        return
    for name, child in block.named_children():
        yield from outermost(child, wanted, f'{path}.{name}'.lstrip('.'))
