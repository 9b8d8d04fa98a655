"""Where prompts go that sit inside blocks, ``stages='inside'``."""

from __future__ import annotations

import torch
from mmengine.logging import print_log
from torch import nn

from .features import Inside, Item, LastMaps, Layout, Maps, Site, Tokens, TokensOfGrid
from .norms import NORMS
from .probe import PROBE_SIZE, probe_layers, with_checkpoints
from .prompt_config import refuse_after_stages
from .prompts.base import feedforward
from .stages import Family, Stage
from .tuned import Options


def inside_sites(
    module: nn.Module, family: Family, table: list[Stage], options: Options
) -> list[Site]:
    """Where the prompts go: one in each block that has a hidden layer.

    Raises:
        ValueError: an option is for prompts after stages, no block has such a layer, or blocks are
            computed again in backward or change their layers.
    """
    refuse_after_stages(options.prompt, ' is for prompts after stages, not inside')
    kind = type(module).__name__
    if with_checkpoints(module):
        # What is computed again there knows neither the grid of tokens nor the chosen prompts.
        raise ValueError(
            f"stages='inside': {kind} has with_cp=True, which computes blocks again in "
            "backward: use with_cp=False, or 'blocks'"
        )
    for layer in module.modules():
        if hasattr(layer, 'switch_to_deploy'):
            raise ValueError(
                f"stages='inside': the branches of {kind} become one layer when it is deployed, "
                "without the prompts inside: use 'blocks'"
            )
    found: dict[str, str] = {}
    seen: set[nn.Module] = set()
    for block in (block for stage in table for block in stage.blocks):
        layer = hidden_layer(module.get_submodule(block))
        path = f'{block}.{layer}'.rstrip('.')
        if layer is not None and module.get_submodule(path) not in seen:
            seen.add(module.get_submodule(path))
            found[path] = block
    try:
        shapes = probe_layers(module, list(found), family.native(module) or PROBE_SIZE)
    except ValueError:  # It takes other images only.
        shapes = dict.fromkeys(found, (None, None))
    sites, without = [], sorted(set(found) - set(shapes))
    for path, (_, returned) in shapes.items():
        block, layer = module.get_submodule(found[path]), module.get_submodule(path)
        layout = _layout(family, module, block, layer, returned)
        extra = family.count_extra(module, block) if isinstance(layout, Tokens) else 0
        # A block of class attention computes on the class token alone.
        if layout is None or (extra and returned and returned[1] <= extra):
            without.append(path)
            continue
        sites.append(
            Site(
                name=path,
                block=path,
                channels=_width(layer) or layer.weight.numel(),
                layout=Inside(layout),
                embedding=family.embedding_of(module),
                extra=extra,
                extra_tokens=options.prompt['extra_tokens'] if extra else 'keep',
            )
        )
    if not sites:
        raise ValueError(
            f"stages='inside' finds no hidden layer in the blocks of {kind} that returns a map or "
            "tokens: use 'blocks'"
        )
    if without:
        print_log(
            f'{kind}: no prompt at {", ".join(without)}: it returns neither a map nor '
            'the tokens of the image',
            logger='current',
        )
    return sites


def hidden_layer(block: nn.Module) -> str | None:
    """Dotted name of the layer of a block whose output its nonlinearity takes.

    That is the widest layer, if it is wider than what the block returns (the expansion of an
    inverted residual, the first layer of a feed-forward network), else the first one; with the
    norm that follows it. None: there is no linear layer or convolution.
    """
    for name in reversed(feedforward(block)):
        inside = block.get_submodule(name)
        # Squeeze-and-excitation weighs channels: it returns no map.
        layers = [
            (n, m) for n, m in inside.named_modules() if _width(m) and 'se' not in n.split('.')
        ]
        if layers:
            break
    else:
        return None
    last = _width(layers[-1][1])
    wider = [(n, m) for n, m in layers if _width(m) > last]
    path, layer = max(wider, key=lambda found: _width(found[1])) if wider else layers[0]
    leaves = [(n, m) for n, m in inside.named_modules() if not any(m.children())]
    after = next((i + 1 for i, (n, _) in enumerate(leaves) if n == path), len(leaves))
    if after < len(leaves):
        norm_path, norm = leaves[after]
        weight = getattr(norm, 'weight', None)
        if isinstance(norm, NORMS) and weight is not None and weight.numel() == _width(layer):
            path = norm_path
    return f'{name}.{path}'.strip('.')


def _width(layer: nn.Module) -> int:
    """Channels that a linear layer or convolution returns; 0: it is none."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    return layer.out_features if isinstance(layer, nn.Linear) else 0


def _layout(
    family: Family,
    module: nn.Module,
    block: nn.Module,
    layer: nn.Module,
    returned: torch.Size | None,
) -> Layout | None:
    """Layout of what a layer returns; None: it is neither a map nor the block's tokens.

    Without a shape the layer and the layout of the block tell.
    """
    last = isinstance(layer, nn.Linear | nn.LayerNorm)
    if len(returned or ()) == 4:
        return LastMaps() if last else Maps()
    if returned is None and not last:
        # A batch norm of vectors: of tokens in one long row.
        return None if isinstance(layer, nn.BatchNorm1d) else Maps()
    layout = family.layout_of(module, block)
    if isinstance(layout, Item):
        # Inside a block that changes the grid it is another one.
        layout = layout.layout if layout.grid_index is None else None
    if len(returned or (0, 0, 0)) != 3 or not isinstance(layout, Tokens):
        return None
    # Inside a block nobody hands the grid on.
    return layout if isinstance(layout, TokensOfGrid) else Tokens(grid_argument=False)
