"""Which stock layer has which lean form, and the step that gives it to a frozen backbone."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import fields

import torch
from mmengine.logging import print_log
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..probe import run_on_ghost
from ..subclass import add_mixin, stock_type
from .activations import GATES, LeanActivation, LeanSmooth, LeanSwish
from .attention import (
    LeanMultiheadAttention,
    LeanShiftWindowMSA,
    LeanTorchAttention,
    LeanWindowMSA,
)
from .layers import (
    LeanBatchNorm,
    LeanConv2d,
    LeanConv2dAdaptivePadding,
    LeanGroupNorm,
    LeanLayerNorm,
    LeanLayerNorm2d,
    LeanLinear,
    LeanOptions,
)
from .layout import give_contiguous

TORCH: dict[type, type] = {
    nn.Conv2d: LeanConv2d,
    nn.BatchNorm2d: LeanBatchNorm,
    nn.Linear: LeanLinear,
    nn.LayerNorm: LeanLayerNorm,
    nn.GroupNorm: LeanGroupNorm,
    nn.GELU: LeanSmooth,
    nn.SiLU: LeanSmooth,
    **dict.fromkeys(GATES, LeanActivation),
}
LIBRARIES: dict[str, type] = {
    'mmcv.cnn.bricks.wrappers.Conv2d': LeanConv2d,
    'mmcv.cnn.bricks.conv2d_adaptive_padding.Conv2dAdaptivePadding': LeanConv2dAdaptivePadding,
    'mmcv.cnn.bricks.swish.Swish': LeanSwish,
    'mmengine.model.utils._BatchNormXd': LeanBatchNorm,
    'mmcv.cnn.bricks.wrappers.Linear': LeanLinear,
    'mmcv.cnn.bricks.transformer.MultiheadAttention': LeanTorchAttention,
    'mmpretrain.models.utils.norm.LayerNorm2d': LeanLayerNorm2d,
    'mmpretrain.models.utils.attention.MultiheadAttention': LeanMultiheadAttention,
    'mmpretrain.models.utils.attention.WindowMSA': LeanWindowMSA,
    'mmpretrain.models.utils.attention.ShiftWindowMSA': LeanShiftWindowMSA,
    'mmdet.models.backbones.swin.ShiftWindowMSA': LeanShiftWindowMSA,
    'mmseg.models.backbones.swin.ShiftWindowMSA': LeanShiftWindowMSA,
    'mmdet.models.backbones.swin.WindowMSA': LeanWindowMSA,
    'mmseg.models.backbones.swin.WindowMSA': LeanWindowMSA,
}
"""Full name of a class of the libraries, which may not be installed, to its lean form."""


PREFERENCES = ('memory', 'time')


def lean_options(lean: bool | str | dict) -> LeanOptions | None:
    """Read the option ``lean`` of a config.

    Args:
        lean: False for stock layers; True or ``'memory'``, ``'time'``; or any part of
            ``dict(prefer='memory', dtype=None, channels_last=None)``.

    Returns:
        LeanOptions, or None for stock layers.

    Raises:
        ValueError: anything else.
    """
    if lean is False or lean is None:
        return None
    given = {} if lean is True else {'prefer': lean} if isinstance(lean, str) else lean
    names = [field.name for field in fields(LeanOptions)]
    if not isinstance(given, dict) or set(given) - set(names):
        raise ValueError(
            f"lean={lean!r} is unknown: use True, False, 'memory', 'time' or a dict of "
            f'{", ".join(names)}'
        )
    options = LeanOptions(**given)
    if options.prefer not in PREFERENCES:
        raise ValueError(
            f'lean.prefer={options.prefer!r} is unknown: use one of {", ".join(PREFERENCES)}'
        )
    if options.channels_last not in (None, True, False):
        raise ValueError(
            f'lean.channels_last={options.channels_last!r} is unknown: use True, False or None'
        )
    if options.dtype not in (None, 'float16', 'bfloat16', 'float32'):
        raise ValueError(
            f"lean.dtype={options.dtype!r} is unknown: use 'float16', 'bfloat16', 'float32' or None"
        )
    return options


def lean_form(kind: type) -> type | None:
    """The mixin for a stock layer class; None for one that runs as stock."""
    if kind in TORCH:
        return TORCH[kind]
    return LIBRARIES.get(f'{kind.__module__}.{kind.__qualname__}')


def make_lean(
    backbone: nn.Module, options: LeanOptions, prompted: Collection[nn.Module] = ()
) -> None:
    """Give every layer that is known by exact type its lean form.

    Parameters, buffers, their names and ``state_dict`` stay as they are; a layer is lean while
    it is frozen.

    Args:
        backbone: changed in place; all of it is about to be frozen.
        options: how the layers run.
        prompted: blocks that are about to carry a prompt; nothing is folded across one.
    """
    pairs = foldable(backbone)
    for block in prompted:  # The prompt reads what is between the two.
        inside = set(block.modules())
        pairs = [pair for pair in pairs if not (pair[0] in inside and pair[1] not in inside)]
    for module in list(backbone.modules()):
        if options.channels_last is not False:
            give_contiguous(module)
        form = lean_form(stock_type(module))
        if form is None or (form is LeanActivation and getattr(module, 'negative_slope', 0) < 0):
            continue
        add_mixin(module, form)
        module._protune_lean = options
        if options.dtype and issubclass(form, (LeanConv2d, LeanLinear)):
            module.to(getattr(torch, options.dtype))
    names = {module: name for name, module in backbone.named_modules()}
    backbone.__dict__['_protune_pairs'] = [(names[conv], names[norm]) for conv, norm in pairs]
    link(backbone)


def link(backbone: nn.Module) -> None:
    """Tell each convolution which batch norm it computes along with itself, and the other way.

    Copies of a backbone have no such links, because a copy of one layer alone must not have them;
    a copy links itself at its first forward pass.
    """
    for pair in backbone.__dict__['_protune_pairs']:
        try:
            conv, norm = map(backbone.get_submodule, pair)
        except AttributeError:  # Somebody has changed the structure before copying it.
            continue
        if isinstance(conv, LeanConv2d) and isinstance(norm, LeanBatchNorm):
            split = (path.rpartition('.') for path in pair)
            places = [(backbone.get_submodule(parent), name) for parent, _, name in split]
            # Past __setattr__, which would register a submodule and change names.
            conv.__dict__['_protune_norm'] = (norm, *places)
            conv.__dict__['_protune_pending'] = set()
            norm.__dict__['_protune_conv'] = conv
    backbone.__dict__['_protune_linked'] = True


def hold_in_float32(backbone: nn.Module, options: LeanOptions) -> None:
    """Undo :attr:`LeanOptions.dtype`: hold the weights of lean layers in float32.

    Args:
        backbone: changed in place.
        options: what its lean layers follow from now on.
    """
    for module in backbone.modules():
        if '_protune_lean' in module.__dict__:
            module._protune_lean = options
            if isinstance(module, LeanConv2d | LeanLinear):
                module.to(torch.float32)


def foldable(backbone: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a convolution and the batch norm that is all its output feeds.

    Found by one forward pass on fake tensors, so no backbone has to declare them. Empty where
    the backbone cannot run on the probe image: then a batch norm is a scale and a shift.
    """
    norms = [m for m in backbone.modules() if lean_form(stock_type(m)) is LeanBatchNorm]
    if not norms:
        return []
    uses = _Uses(backbone)
    try:
        out = run_on_ghost(backbone, watch=uses)
    except ValueError as error:
        print_log(f'batch norms are not folded: {error}', logger='current', level=logging.DEBUG)
        return []
    finally:
        uses.remove()
    return uses.pairs(out)


class _Uses(TorchDispatchMode):
    """Records which operations use the output of each convolution, and in which layer."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.made: dict[int, tuple[nn.Module, torch.Tensor]] = {}
        self.calls: dict[nn.Module, int] = {}
        self.read_by: dict[int, list[nn.Module | None]] = {}
        self.given: dict[nn.Module, list[int]] = {}
        self.current: nn.Module | None = None
        self.handles = list(self._hooks(backbone))

    def _hooks(self, backbone: nn.Module) -> Iterator[object]:
        for module in backbone.modules():
            form = lean_form(stock_type(module))
            if form is not None and issubclass(form, LeanConv2d):
                yield module.register_forward_hook(self._after_conv)
            elif form is LeanBatchNorm:
                yield module.register_forward_pre_hook(self._before_norm)
                yield module.register_forward_hook(self._after_norm)

    def _after_conv(self, conv: nn.Module, args: tuple, out: torch.Tensor) -> None:
        self.calls[conv] = self.calls.get(conv, 0) + 1
        self.made[id(out)] = (conv, out)  # Keeps the tensor alive, so that its id stays its own.

    def _before_norm(self, norm: nn.Module, args: tuple) -> None:
        self.calls[norm] = self.calls.get(norm, 0) + 1
        self.given.setdefault(norm, []).append(id(args[0]))
        self.current = norm

    def _after_norm(self, norm: nn.Module, args: tuple, out: torch.Tensor) -> None:
        self.current = None

    def __torch_dispatch__(
        self, func: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        for leaf in tree_leaves((args, kwargs or {})):
            if id(leaf) in self.made:
                self.read_by.setdefault(id(leaf), []).append(self.current)
        return func(*args, **(kwargs or {}))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def pairs(self, returned: object) -> list[tuple[nn.Module, nn.Module]]:
        """The pairs of which each ran once, and nothing else read what is between them."""
        outputs = {id(leaf) for leaf in tree_leaves(returned)}
        found = []
        for norm, inputs in self.given.items():
            key = inputs[0]
            if len(inputs) != 1 or key not in self.made or key in outputs:
                continue
            conv, _ = self.made[key]
            fits = conv.out_channels == norm.num_features and norm.track_running_stats
            alone = all(reader is norm for reader in self.read_by.get(key, [None]))
            if self.calls[conv] == 1 and alone and fits:
                found.append((conv, norm))
        return found
