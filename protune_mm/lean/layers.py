"""Lean forms of the stock layers, by exact type.

Each is a mixin over the stock class, so parameters, names, checkpoints and ``isinstance`` stay
as they are. A layer that is not frozen any more (``requires_grad`` switched on again) or not in
evaluation mode runs as stock.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .derived import cast, derived, tracing
from .functions import FrozenConv2d, FrozenNorm, frozen_conv2d
from .masks import is_channels_last, to_channels_last
from .products import frozen_linear
from .rebuild import Kept, Recipe, attach, recipe_of


@dataclass(frozen=True)
class LeanOptions:
    """How frozen layers run.

    Attributes:
        prefer: ``'memory'``: least memory; recompute what costs less than a forward pass.
            ``'time'``: least time; recompute nothing.
        dtype: hold the weights of frozen convolutions and linear layers in this dtype, such as
            ``'bfloat16'``, the one that autocast uses. None: as they are.
        channels_last: run on channels-last maps inside the backbone; what it returns is laid
            out as stock. None: on the CPU, where it saves time. True: on GPUs too; the weights
            are held so as well.
    """

    prefer: str = 'memory'
    dtype: str | None = None
    channels_last: bool | None = None


def keeps(x: Tensor) -> bool:
    """Whether an operation on ``x`` keeps tensors for backward."""
    return x.requires_grad and torch.is_grad_enabled()


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which autocast would run a convolution or linear layer on ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def dtype_of_weights(module: nn.Module, x: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype in which a frozen layer computes: autocast's, else that of its weights.

    Weights that are held in autocast's dtype (:attr:`LeanOptions.dtype`) follow their input
    outside of autocast.
    """
    if not x.is_floating_point():
        return weight.dtype
    if module._protune_lean.dtype:
        return compute_dtype(x)
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return compute_dtype(x) if autocast else weight.dtype


def cast_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The input in the dtype of the weights; what is no floating point stays, and is refused."""
    casts = x.dtype != dtype and x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
    return x.to(dtype) if casts else x


def without_casts(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which autocast casts nothing, for what it would run in its own dtype.

    That is convolutions, linear layers and attention: where ``x`` has this dtype already, autocast
    stays on, which is cheaper. Their weights must be of the dtype of ``x``.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.get_autocast_dtype(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


def is_frozen(module: nn.Module) -> bool:
    """Whether no parameter of a layer itself is trained, and it is in evaluation mode."""
    if module.training or 'parametrizations' in module._modules:
        return False
    for parameter in module._parameters.values():  # A loop: this runs at every layer and step.
        if parameter is not None and parameter.requires_grad:
            return False
    return True


class LeanConv2d:
    """Mixin for :class:`torch.nn.Conv2d`: keeps its weight only, with batch norm folded in."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.Conv2d`; shapes as there."""
        if not is_frozen(self) or x.numel() == 0 or x.dim() != 4:
            return super().forward(x)
        folds = '_protune_norm' in self.__dict__ and not tracing()
        norm = folded_norm(self) if folds else None
        out = self._lean_forward(x, norm)
        if norm is not None:
            # So that the norm knows that it has been computed, or that this went elsewhere.
            out._protune_normed_by = (norm, version_of(out))
            self.__dict__['_protune_pending'].add(threading.get_ident())
        return out

    def _lean_forward(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        dtype = dtype_of_weights(self, x, self.weight)
        last = self._protune_lean.channels_last and x.is_cuda and is_channels_last(x)
        weight, bias = self._lean_weights(norm, dtype, last)
        x, padding = self._padded(cast_input(x, dtype))
        geometry = (self.stride, padding, self.dilation, self.groups)
        with without_casts(x):
            if tracing():
                return F.conv2d(x, weight, bias, *geometry)
            if keeps(x):
                return FrozenConv2d.apply(x, weight, bias, geometry)
            return frozen_conv2d(x, weight, bias, geometry)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input, padded where the convolution cannot, and what the convolution pads."""
        if self.padding_mode == 'zeros' and not isinstance(self.padding, str):
            return x, self.padding
        mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
        if any(self._reversed_padding_repeated_twice):
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        return x, (0, 0)

    def _lean_weights(self, norm: nn.Module | None, dtype: torch.dtype, last: bool) -> tuple:
        if norm is None and self.weight.dtype == dtype and not last:
            return self.weight, self.bias

        def make() -> tuple:
            if norm is None:
                weight, bias = cast(dtype, self.weight, self.bias)
            else:
                scale, shift = affine(norm)
                weight = self.weight.double() * scale[:, None, None, None]
                bias = shift if self.bias is None else shift + self.bias.double() * scale
                weight, bias = cast(dtype, weight, bias)
            return (to_channels_last(weight) if last else weight), bias

        sources = (self.weight, self.bias, *(norm_tensors(norm) if norm else ()))
        return derived(self, 'weights', sources, make, (dtype, last, norm and norm.eps))


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; nobody counts in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def folded_norm(conv: nn.Module) -> nn.Module | None:
    """The batch norm that a convolution computes along with itself.

    None where somebody looks at, changes or replaces what is between them: then each computes
    its own part.
    """
    norm, *places = conv.__dict__['_protune_norm']
    if getattr(conv, '_is_replica', False):  # nn.DataParallel's; the norm is not this replica's.
        return None
    for module, (parent, name) in zip((conv, norm), places, strict=True):
        if (
            parent._modules.get(name) is not module
            or 'forward' in module.__dict__
            or module._compiled_call_impl is not None
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return None
    if conv._forward_hooks or norm._forward_pre_hooks or any(_GLOBAL_BACKWARD_HOOKS):
        return None
    return norm if is_frozen(norm) else None


# They wrap tensors between layers, as a module's own backward hooks do.
_GLOBAL_BACKWARD_HOOKS = (
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


class LeanConv2dAdaptivePadding(LeanConv2d):
    """Mixin for mmcv's ``Conv2dAdaptivePadding``, which pads as TensorFlow's "same" does."""

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        sides = []
        for axis in (1, 0):
            size, stride = x.shape[2 + axis], self.stride[axis]
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            missing = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
            sides += [missing // 2, missing - missing // 2]
        return (F.pad(x, sides) if any(sides) else x), self.padding


def norm_tensors(norm: nn.Module) -> tuple:
    """Mean, variance, weight and bias: what an evaluation-mode batch norm follows from."""
    weights, statistics = norm._parameters, norm._buffers  # Faster than attributes.
    return (
        statistics['running_mean'],
        statistics['running_var'],
        weights['weight'],
        weights['bias'],
    )


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation mode, in float64, one a channel."""
    mean, var, weight, bias = (None if t is None else t.double() for t in norm_tensors(norm))
    scale = torch.rsqrt(var + norm.eps)
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias


class LeanBatchNorm:
    """Mixin for batch norm: part of the convolution before it, or a scale and a shift."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.BatchNorm2d`; shapes as there."""
        if tracing():
            return super().forward(x)
        conv = self.__dict__.get('_protune_conv')
        if conv is not None and self._is_done(conv, x):
            return x
        if not is_frozen(self) or self.running_mean is None or x.shape[1] != self.num_features:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = derived(
            self, 'affine', norm_tensors(self), lambda: cast(wide, *affine(self)), (wide, self.eps)
        )
        column = (-1, *[1] * (x.dim() - 2))
        # Only the scale is kept: nobody asks for its gradient, so the input is not needed.
        return torch.addcmul(shift.view(column), x.to(wide), scale.view(column)).to(x.dtype)

    def _is_done(self, conv: nn.Module, x: Tensor) -> bool:
        """Whether the convolution before has computed this norm.

        Raises:
            RuntimeError: it has, but something else came here.
        """
        norm, version = getattr(x, '_protune_normed_by', (None, None))
        pending, thread = conv.__dict__['_protune_pending'], threading.get_ident()
        done = norm is self and version == version_of(x)
        if not done and thread in pending:
            pending.discard(thread)
            raise RuntimeError(
                f'a frozen {type(self).__name__} was computed along with the convolution before '
                'it, but then got another tensor than that convolution returned, or one changed '
                'in place: change neither, or use lean=False'
            )
        pending.discard(thread)
        return done


CHEAP = 150
"""Multiplications for each number rebuilt that ``prefer='time'`` allows outside attention."""


def pays(module: nn.Module, recipe: Recipe, tensors: list[Tensor], limit: float = CHEAP) -> bool:
    """Whether to rebuild tensors rather than keep them.

    Args:
        module: the lean layer that would keep them.
        recipe: how to rebuild them.
        tensors: what it makes.
        limit: multiplications for each number rebuilt that ``prefer='time'`` allows.
    """
    numbers = sum(t.numel() for t in tensors)
    if recipe.kept >= sum(t.numel() * t.element_size() for t in tensors):
        return False
    return module._protune_lean.prefer == 'memory' or recipe.cost <= limit * numbers


def linear(
    module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, name: str = 'weights'
) -> Tensor:
    """Apply a frozen linear layer that casts its weights once and whose output can be rebuilt.

    Args:
        module: who keeps the cast weights.
        x: (..., C_in).
        weight: (C_out, C_in).
        bias: (C_out), or None.
        name: tells the linear layers of one module apart.
    """
    dtype = dtype_of_weights(module, x, weight)
    if weight.dtype != dtype:
        stock = (weight, bias)
        weight, bias = derived(module, name, stock, lambda: cast(dtype, *stock), (dtype,))
    given = cast_input(x, dtype)
    with without_casts(given):
        if tracing():
            return F.linear(given, weight, bias)
        out = frozen_linear(given, weight, bias)
    if not keeps(x):
        return out
    before = recipe_of(x)
    base = None if before else Kept(x)
    kept_weight, kept_bias = Kept(weight), None if bias is None else Kept(bias)

    def make() -> list[Tensor]:
        source = before.take(0) if before else base.get()
        constants = kept_weight.get(), None if kept_bias is None else kept_bias.get()
        return [frozen_linear(source.to(dtype), *constants)]

    kept = before.kept if before else x.numel() * x.element_size()
    cost = out.numel() * weight.shape[1] + (before.cost if before else 0)
    return attach(out, Recipe(make, kept, cost))


class LeanLinear:
    """Mixin for :class:`torch.nn.Linear`: weights cast once; its output can be rebuilt."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.Linear`; shapes as there."""
        if not is_frozen(self) or x.numel() == 0:
            return super().forward(x)
        return linear(self, x, self.weight, self.bias)


def widens(x: Tensor) -> bool:
    """Whether autocast runs a normalization of ``x`` in float32; on the CPU it does not."""
    kind = x.device.type
    small = x.dtype in (torch.float16, torch.bfloat16)
    return small and kind != 'cpu' and torch.is_autocast_enabled(kind)


def layer_norm(module: nn.Module, x: Tensor) -> Tensor:
    """Apply a frozen layer norm that keeps its input in the input's own dtype."""
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    wide = torch.float32 if widens(x) else x.dtype
    if wide != x.dtype:
        out = FrozenNorm.apply(x, weight, bias, 0, shape, eps)
    else:
        out = F.layer_norm(x, shape, weight, bias, eps)
    base = Kept(x)
    constants = [None if t is None else Kept(t) for t in (weight, bias)]

    def make() -> list[Tensor]:
        given = (None if t is None else t.get() for t in constants)
        return [F.layer_norm(base.get().to(wide), shape, *given, eps)]

    # The norm keeps its input whatever becomes of its output: the recipe keeps nothing more.
    return attach(out, Recipe(make, 0, x.numel()))


class LeanLayerNorm:
    """Mixin for :class:`torch.nn.LayerNorm`: keeps its input in the input's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.LayerNorm`; shapes as there."""
        if not is_frozen(self) or not keeps(x) or tracing():
            return super().forward(x)
        return layer_norm(self, x)


class LeanLayerNorm2d:
    """Mixin for mmpretrain's ``LayerNorm2d``: as :class:`LeanLayerNorm`, on maps."""

    def forward(self, x: Tensor, data_format: str = 'channel_first') -> Tensor:
        """See mmpretrain's ``LayerNorm2d``; shapes as there."""
        if not is_frozen(self) or not keeps(x) or tracing() or data_format != 'channel_last':
            return super().forward(x, data_format)
        return layer_norm(self, x)


class LeanGroupNorm:
    """Mixin for :class:`torch.nn.GroupNorm`: keeps its input in the input's own dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """See :class:`torch.nn.GroupNorm`; shapes as there."""
        if not is_frozen(self) or not keeps(x) or not widens(x) or tracing():
            return super().forward(x)
        return FrozenNorm.apply(x, self.weight, self.bias, self.num_groups, (), self.eps)
