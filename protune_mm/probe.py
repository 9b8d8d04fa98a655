"""Find the channels of stages the table does not know, by one forward pass on fake tensors."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .features import EXPECTED, Site, unexpected_output

PROBE_SIZE = 224
"""Side of the probe image, in pixels: every backbone with a native size accepts it or says so."""


def probe_channels(module: nn.Module, sites: list[Site]) -> dict[str, int]:
    """Channels of the outputs of some blocks.

    Fake tensors carry shapes only, so the pass costs no memory and changes no weight or
    statistic. Blocks that name the argument count: 1 in, the image; 3 channels are assumed.

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
    with FakeTensorMode(allow_non_fake_inputs=True):
        # The copy holds fake weights: the deep copy runs under the mode.
        ghost = copy.deepcopy(module).eval()
        handles = [
            ghost.get_submodule(site.block).register_forward_hook(
                lambda _m, _i, out, name=site.block: outputs.__setitem__(name, out)
            )
            for site in sites
        ]
        image = torch.empty(1, 3, PROBE_SIZE, PROBE_SIZE)
        try:
            with torch.no_grad():
                ghost(image)
        except Exception as error:
            raise ValueError(
                f'{type(module).__name__} failed on a probe image of shape {tuple(image.shape)}, '
                f'so the channels of its stages cannot be found: {error}'
            ) from error
        finally:
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
