"""Shapes of a backbone's blocks, by one forward pass on fake tensors."""

from __future__ import annotations

import contextlib
import itertools

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .features import EXPECTED, Site, unexpected_output

PROBE_SIZE = (224, 224)
"""Height and width of the probe image, in pixels: the native size of most backbones."""

OTHER_SIZE = (288, 160)
"""A second size: what changes with it is height or width, not channels."""


def probe_outputs(
    module: nn.Module, names: list[str], size: tuple[int, int] = PROBE_SIZE
) -> dict[str, object]:
    """Outputs of some submodules for one image, as fake tensors.

    Fake tensors carry shapes only, so the pass costs no memory and changes no weight or
    statistic.

    Args:
        module: the backbone, unchanged afterwards.
        names: dotted names of submodules.
        size: height and width of the image, in pixels.

    Returns:
        dict[str, object]: dotted name to output, for the submodules that ran.

    Raises:
        ValueError: the backbone cannot run on such an image.
    """
    outputs: dict[str, object] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: outputs.__setitem__(name, out)
        )
        for name in names
    ]
    try:
        run_on_ghost(module, size)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def probe_layers(
    module: nn.Module, names: list[str], size: tuple[int, int] = PROBE_SIZE
) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Shapes of what some submodules read first and return, for one image.

    Args:
        module: the backbone, unchanged afterwards.
        names: dotted names of submodules.
        size: height and width of the image, in pixels.

    Returns:
        dict: dotted name to the shapes of input and output, for the submodules that are called
        and take and return a tensor.

    Raises:
        ValueError: the backbone cannot run on such an image.
    """
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str, args: tuple, kwargs: dict, out: object) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if isinstance(given, Tensor) and isinstance(out, Tensor):
            shapes[name] = (given.shape, out.shape)

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, args, kwargs, out, name=name: note(name, args, kwargs, out),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        run_on_ghost(module, size)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def probe_reach(
    module: nn.Module, names: list[str], size: tuple[int, int] = PROBE_SIZE
) -> set[str]:
    """Which submodules' outputs have a part in what the backbone returns.

    Args:
        module: the backbone, unchanged afterwards.
        names: dotted names of submodules that return a tensor.
        size: height and width of the image, in pixels.

    Returns:
        set[str]: dotted names.

    Raises:
        ValueError: the backbone cannot run on such an image, or returns no tensors.
    """
    added: list[tuple[str, Tensor]] = []

    def add(name: str, out: object) -> object:
        if not isinstance(out, Tensor):
            return out
        added.append((name, torch.zeros((), dtype=out.dtype, requires_grad=True)))
        return out + added[-1][1]

    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: add(name, out)
        )
        for name in names
    ]
    # What is computed again in backward has no gradients of single tensors.
    again = with_checkpoints(module)
    try:
        for m in again:
            m.with_cp = False
        outs = run_on_ghost(module, size, watch=torch.enable_grad())
    finally:
        for m in again:
            m.with_cp = True
        for handle in handles:
            handle.remove()
    outs = [out for out in tree_leaves(outs) if isinstance(out, Tensor)]
    if not outs:
        raise ValueError(f'{type(module).__name__} returns no tensors')
    total = sum(out.sum() for out in outs)
    if not total.requires_grad:
        return set()
    grads = torch.autograd.grad(total, [zero for _, zero in added], allow_unused=True)
    return {name for (name, _), grad in zip(added, grads, strict=True) if grad is not None}


def with_checkpoints(module: nn.Module) -> list[nn.Module]:
    """Modules with ``with_cp=True``: blocks that compute again in backward, and what holds them."""
    return [m for m in module.modules() if getattr(m, 'with_cp', False) is True]


def blocks_checkpointed(module: nn.Module) -> str:
    """The option by which a backbone computes whole blocks again, prompts included; '' if none.

    TinyViT, MixMIM and RepLKNet call their blocks through a reentrant checkpoint, which gives
    nothing inside a gradient where the input needs none. Others do so within a block, below its
    prompt.
    """
    if any(getattr(m, 'use_checkpoint', False) is True for m in module.modules()):
        return 'use_checkpoint'
    replk = any(kind.__name__ == 'RepLKNet' for kind in type(module).__mro__)
    return 'with_cp' if replk and with_checkpoints(module) else ''


def run_on_ghost(
    module: nn.Module,
    size: tuple[int, int] = PROBE_SIZE,
    watch: contextlib.AbstractContextManager | None = None,
) -> object:
    """Run a backbone in evaluation mode on a fake image of one size, with fake weights.

    Args:
        module: the backbone, unchanged afterwards.
        size: height and width of the image, in pixels.
        watch: a context to run it in, such as a dispatch mode. There are no gradients unless it
            enables them.

    Returns:
        What the backbone returns, of fake tensors.

    Raises:
        ValueError: the backbone cannot run on such an image.
    """
    # A backbone may keep what it computed, a grid say, which would be fake.
    before = {m: _snapshot(m) for m in module.modules()}
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state = itertools.chain(module.named_parameters(), module.named_buffers())
    # On the CPU, whatever the device of the weights: fake CUDA tensors need a CUDA device.
    ghost = {name: fake.from_tensor(t.detach().to('meta')).to('cpu') for name, t in state}
    dtype = next((t.dtype for t in module.parameters() if t.is_floating_point()), None)
    first = next((m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d)), 3)
    watch = watch or contextlib.nullcontext()

    def run(channels: int) -> object:
        image = torch.empty(1, channels, *size, dtype=dtype)
        return functional_call(module, ghost, (image,))

    try:
        for m in before:
            m.training = False
        with fake, torch.no_grad(), watch:
            try:
                return run(3)
            except Exception as error:
                with contextlib.suppress(Exception):
                    if first != 3:  # Other images than of three channels, perhaps.
                        return run(first)
                raise ValueError(
                    f'{type(module).__name__} failed on a probe image of shape {(1, 3, *size)}, '
                    f'so the shapes of its stages cannot be found: {error}'
                ) from error
    finally:
        for m, (attributes, contents) in before.items():
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for container, items in contents:
                container.clear()
                (container.update if isinstance(container, dict | set) else container.extend)(items)


def _snapshot(module: nn.Module) -> tuple[dict, list]:
    """Attributes of a module, buffers and caches in dicts and lists among them."""
    attributes = dict(module.__dict__)
    containers = [v for v in attributes.values() if isinstance(v, dict | list | set)]
    return attributes, [(container, container.copy()) for container in containers]


def probe_channels(
    module: nn.Module, sites: list[Site], size: tuple[int, int] = PROBE_SIZE
) -> dict[str, int]:
    """Channels of the outputs of some blocks.

    Args:
        module: the backbone, unchanged afterwards.
        sites: where to look.
        size: height and width of the image, in pixels.

    Returns:
        dict[str, int]: dotted name of a block to the channels C of its output.

    Raises:
        TypeError: a block yields something other than a map or tokens (a channels-last map, say),
            or never runs.
        ValueError: see :func:`probe_outputs`.
    """
    names = [site.block for site in sites]
    outputs = probe_outputs(module, names, size)
    try:
        others = probe_outputs(module, names, OTHER_SIZE)
    except ValueError:
        others = {}  # It takes images of one size only.
    channels = {}
    for site in sites:
        if site.block not in outputs:
            raise TypeError(
                f"stage '{site.name}' never runs in {type(module).__name__}.forward: name one "
                'that does'
            )
        out = outputs[site.block]
        if not isinstance(out, Tensor) or out.ndim not in (3, 4):
            raise TypeError(unexpected_output(site.name, out, EXPECTED))
        last = out.ndim == 3 or getattr(site.layout, 'channels_last', False)
        axis = out.ndim - 1 if last else 1
        other = others.get(site.block, out)
        if other.shape[axis] != out.shape[axis]:
            raise TypeError(
                f'{unexpected_output(site.name, out, EXPECTED)}; axis {axis}, the channels, '
                f'changes with the size of the image (to {other.shape[axis]})'
            )
        channels[site.block] = out.shape[axis]
    return channels
