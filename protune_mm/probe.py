"""Find the channels of stages the table does not know, by one forward pass on fake tensors."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from .features import EXPECTED, Site, unexpected_output

PROBE_SIZE = 224
"""Side of the probe image, in pixels: every backbone with a native size accepts it or says so."""


def probe_channels(module: nn.Module, sites: list[Site]) -> dict[str, int]:
    """Channels of the outputs of some blocks.

    Fake tensors carry shapes only, so the pass costs no memory and changes no weight or
    statistic. The image has 3 channels.

    Args:
        module: the backbone, unchanged afterwards.
        sites: where to look.

    Returns:
        dict[str, int]: dotted name of a block to the channels C of its output.

    Raises:
        TypeError: a block yields something other than a map or tokens, or never runs.
        ValueError: the backbone cannot run on a 3-channel image of :data:`PROBE_SIZE` pixels.
    """
    outputs: dict[str, object] = {}
    handles = [
        module.get_submodule(site.block).register_forward_hook(
            lambda _m, _i, out, name=site.block: outputs.__setitem__(name, out)
        )
        for site in sites
    ]
    modes = {m: m.training for m in module.modules()}
    fake = FakeTensorMode()
    state = itertools.chain(module.named_parameters(), module.named_buffers())
    # On the CPU, whatever the device of the weights: fake CUDA tensors need a CUDA device.
    ghost = {name: fake.from_tensor(t.detach().to('meta')).to('cpu') for name, t in state}
    try:
        for m in modes:
            m.training = False
        with fake, torch.no_grad():
            image = torch.empty(1, 3, PROBE_SIZE, PROBE_SIZE)
            functional_call(module, ghost, (image,))
    except Exception as error:
        raise ValueError(
            f'{type(module).__name__} failed on a probe image of shape '
            f'{(1, 3, PROBE_SIZE, PROBE_SIZE)}, so the channels of its stages cannot be found: '
            f'{error}'
        ) from error
    finally:
        for m, mode in modes.items():
            m.training = mode
        for handle in handles:
            handle.remove()
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
        channels[site.block] = out.shape[1] if out.ndim == 4 else out.shape[2]
    return channels
