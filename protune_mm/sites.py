"""Where prompts go in a backbone."""

from __future__ import annotations

import difflib
import inspect
import logging
from dataclasses import replace

import torch
from mmengine.logging import print_log
from torch import nn

from .features import (
    Beside,
    Item,
    LastMaps,
    Layout,
    Maps,
    NormOutput,
    Rows,
    Site,
    Tokens,
    TokensOfGrid,
    Unknown,
)
from .inside import inside_sites
from .probe import PROBE_SIZE, probe_channels, probe_layers, probe_reach, with_checkpoints
from .prompt_config import AFFINE, own_options, prompt_class, prompt_config, refuse_after_stages
from .prompted import PromptedBlock
from .prompts.scale_shift import ScaleShift
from .stages import Family, Stage, find_family, is_theirs, known_families
from .subclass import stock_type
from .tuned import Options


def stage_table(module: nn.Module, named: bool = False) -> list[Stage]:
    """The stages of a backbone by the stage table; none where the table does not know it.

    Args:
        module: the backbone.
        named: stages are named, so that a class from outside the libraries need not fit the row
            of its parent.

    Raises:
        ValueError: a class from outside the libraries lacks what the row of its parent reads.
    """
    family = find_family(stock_type(module))
    if family is None:
        return []
    try:
        return family.split(module)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if is_theirs(stock_type(module)):
            raise
        if named:
            return []
        raise ValueError(
            f'{type(module).__name__} is a {family.name}, but not in its stages ({error}): name '
            "them, stages=['layer1', ...]"
        ) from error


def _no_stages(module: nn.Module, family: Family | None) -> str:
    """Why a backbone has no stages, and what to do."""
    if family is None:
        return (
            f'is of no known backbone family ({known_families()}): name its stages, '
            "stages=['layer1', ...], or add a row: docs/add_a_backbone.md"
        )
    key, _ = family.unread(module)
    if key:
        return (
            f'has no stage that {key}={getattr(module, key)} reads: choose later outputs, or '
            "policy='head-only'"
        )
    return (
        "tells no stages: name its stages, stages=['layer1', ...], or add a row: "
        'docs/add_a_backbone.md'
    )


def choose_sites(module: nn.Module, options: Options) -> list[Site]:
    """Where prompts go, in the order of the forward pass."""
    family = find_family(stock_type(module))
    table = stage_table(module, named=isinstance(options.stages, list | tuple))
    if not table and not isinstance(options.stages, list | tuple):
        raise ValueError(f'{type(module).__name__} {_no_stages(module, family)}')
    if table and options.stages in (None, 'blocks', 'inside'):
        key, unread = family.unread(module)
        if unread:
            names = ', '.join(unread) if len(unread) < 5 else f'{unread[0]} to {unread[-1]}'
            print_log(
                f'{type(module).__name__}: no prompt after {names}: {key}={getattr(module, key)} '
                'reads nothing from there',
                logger='current',
            )
    if options.prompt['last'] == 'series' and options.prompt.get('init_mode') == 'principal':
        raise ValueError(
            "prompt.init_mode='principal' adds nothing at first, and prompt.last='series' would "
            "replace the last stage's output by that: use last='residual', or another init_mode"
        )
    kind = prompt_class(options.prompt)
    where = getattr(kind, 'where', 'stages')
    if options.stages == 'inside' and where != 'stages':
        raise ValueError(
            f"stages='inside': prompt.type='{options.prompt['type']}' has places of its own: leave "
            "stages=None, or 'blocks'"
        )
    if where == 'layers':
        return _layer_sites(module, family, table, options)
    if options.stages == 'inside':
        return inside_sites(module, family, table, options)
    wanted = 'blocks' if where == 'blocks' and options.stages is None else options.stages
    chosen = _choose(module, table, wanted)
    last_block = table[-1].blocks[-1] if table else chosen[-1][1]
    reachable = {block for stage in table for block in stage.blocks}
    sites = []
    for name, path in chosen:
        block = module.get_submodule(path)
        if isinstance(block, PromptedBlock):
            raise ValueError(
                f"'{path}' has a prompt already: {type(module).__name__} shares it with a backbone "
                'that is Pro-tuned; Pro-tune one of them'
            )
        if hasattr(block, 'prompt'):
            raise ValueError(f"'{path}' has an attribute 'prompt' already: choose another block")
        # What a user's own class adds is in no table.
        known = path in reachable
        if table and not known and is_theirs(stock_type(module)):
            raise ValueError(
                f"stage '{name}' of {type(module).__name__} is none whose output reaches what the "
                f'backbone returns: choose from {", ".join(stage.name for stage in table)}, or '
                'a block of these'
            )
        site = Site(
            name=name,
            block=path,
            channels=family.channels(block) if known and family.channels else 0,
            layout=family.layout_of(module, block) if known else Unknown(),
            series=options.prompt['last'] == 'series' and path == last_block,
            plain=options.prompt['features'] == 'plain' and path != last_block,
        )
        if known:
            read = path == last_block and family.reads_extra(module)
            site = replace(
                site,
                embedding=family.embedding_of(module),
                extra=family.count_extra(module, block),
                extra_tokens=options.prompt['extra_tokens'] if read else 'keep',
            )
        sites.append(site)
    if options.prompt['last'] == 'series' and not any(site.series for site in sites):
        print_log(
            f"prompt.last='series' has no effect: no prompt at '{last_block}', the last block",
            logger='current',
            level=logging.WARNING,
        )
    unknown = [site for site in sites if site.channels == 0]
    if unknown:
        native = (family.native(module) if table else None) or PROBE_SIZE
        found = probe_channels(module, unknown, native)
        sites = [replace(s, channels=found.get(s.block, s.channels)) for s in sites]
    return sites


def affine_sites(module: nn.Module, options: Options) -> list[Site]:
    """Where the scales and shifts are that ``affine=True`` adds."""
    if prompt_class(options.prompt) is ScaleShift:
        raise ValueError(f"affine=True adds prompts of type '{AFFINE['type']}': choose another")
    config = prompt_config(AFFINE)
    own = replace(options, prompt=config, stages=None)
    table = stage_table(module)
    return [
        replace(site, config=config)
        for site in _layer_sites(module, find_family(stock_type(module)), table, own)
    ]


def _layer_sites(
    module: nn.Module, family: Family | None, table: list[Stage], options: Options
) -> list[Site]:
    """Where prompts go that run beside layers inside blocks."""
    kind, name = prompt_class(options.prompt), options.prompt['type']
    if not table:
        raise ValueError(
            f"prompt.type='{name}' needs to know the blocks of {type(module).__name__}: add a row, "
            'add_family in docs/add_a_backbone.md'
        )
    refuse_after_stages(options.prompt, f": prompt.type='{name}' runs beside layers")
    blocks = _blocks(module, table, options.stages)
    found = {}
    for block in blocks:
        for layer in kind.layers(module.get_submodule(block), **own_options(options.prompt)):
            found[f'{block}.{layer}'.rstrip('.')] = block
    for key, missing in kind.unmatched(found, **own_options(options.prompt)).items():
        all_layers = (path for block in blocks for path in kind.layers(module.get_submodule(block)))
        names = ', '.join(dict.fromkeys(path.rpartition('.')[2] for path in all_layers)) or 'none'
        raise ValueError(
            f"prompt.{key}: no layer in the blocks of {type(module).__name__} that '{name}' can be "
            f"beside is named '{missing}': there are {names}"
        )
    native = family.native(module) or PROBE_SIZE
    if kind.reads == 'output':
        if options.stages is None and not family.unread(module)[1]:
            # All of it reaches the output, stem and last norm as well.
            found = dict.fromkeys(kind.layers(module))
        return _norm_sites(module, list(found), native, name)
    shapes = probe_layers(module, list(found), native) if found else {}
    sites, without = [], []
    for path, (given, returned) in shapes.items():
        layer, block = module.get_submodule(path), module.get_submodule(found[path])
        layout, extra = _layer_layout(module, family, block, layer, given)
        if len(given) == 4 and isinstance(layout, Tokens | Unknown):
            # A block of tokens may have maps inside, and of timm's nobody has told.
            kinds = (type(m) for m in layer.modules() if isinstance(m, nn.Linear | nn.Conv2d))
            last = issubclass(next(kinds, nn.Conv2d), nn.Linear)
            layout, extra = LastMaps() if last else Maps(), 0
        elif isinstance(layout, Unknown) and kind.pointwise:
            layout, extra = Rows(), 0
        asks = type(layout) is Tokens and not layout.grid_argument
        if asks and with_checkpoints(module):
            raise ValueError(
                f"prompt.type='{name}' beside '{path}': {type(module).__name__} has with_cp=True, "
                'which computes blocks again in backward, where no grid of tokens is known: use '
                'with_cp=False'
            )
        axis = 1 if isinstance(layout, Maps) else -1
        height = {Maps: 2, LastMaps: 1}.get(type(layout))
        larger = height is not None and returned[height] > given[height]
        if larger and not isinstance(layer, nn.Conv2d):
            without.append(f'{path} (it enlarges its map)')
            continue
        if extra and given[1] <= extra:  # As class attention does.
            without.append(f'{path} (it computes on class tokens alone)')
            continue
        if given[0] != 1 and isinstance(layout, Tokens):  # Of one image: as TNT's inner blocks do.
            without.append(f'{path} (it computes inside each patch)')
            continue
        geometry = dict(out_channels=returned[axis])
        if isinstance(layer, nn.Conv2d):
            names = ('kernel_size', 'stride', 'padding', 'dilation')
            geometry |= {key: getattr(layer, key) for key in names}
            for same in type(layer).__mro__:  # Of mmcv, and of timm.
                if same.__name__ in ('Conv2dAdaptivePadding', 'Conv2dSame'):
                    geometry['conv_type'] = same
            if layer.padding_mode != 'zeros':
                geometry['padding_mode'] = layer.padding_mode
        elif height is not None:
            stride = geometry['stride'] = -(-given[height] // returned[height])
            if -(-given[height] // stride) != returned[height]:  # As unpadded layers make of 35 17.
                without.append(f'{path} (its map is no whole part of what it reads)')
                continue
        sites.append(
            Site(
                name=path,
                block=path,
                channels=given[axis],
                layout=Beside(layout),
                embedding=family.embedding_of(module),
                extra=extra,
                geometry=_taken(kind, geometry),
            )
        )
    if not sites:
        raise ValueError(
            f"prompt.type='{name}' finds no layer in the blocks of {type(module).__name__}"
        )
    if without:
        print_log(
            f"prompt.type='{name}': none beside {', '.join(without)} of {type(module).__name__}",
            logger='current',
        )
    return sites


def _norm_sites(module: nn.Module, paths: list[str], native: tuple, name: str) -> list[Site]:
    """Where prompts go that read what a norm returns, if the backbone's output depends on it."""
    if not paths:
        raise ValueError(
            f"prompt.type='{name}' finds no norm in the blocks of {type(module).__name__}"
        )
    try:
        reached = probe_reach(module, paths, native)
    except ValueError:  # It takes other images only.
        reached = paths
    without = [path for path in paths if path not in reached]
    if without:
        print_log(
            f"prompt.type='{name}': none after {', '.join(without)} of {type(module).__name__}: "
            'what it returns does not depend on them',
            logger='current',
        )
    return [
        Site(
            name=path,
            block=path,
            channels=module.get_submodule(path).weight.numel(),
            layout=_norm_layout(module.get_submodule(path)),
        )
        for path in paths
        if path in reached
    ]


def _norm_layout(norm: nn.Module) -> NormOutput:
    plain = isinstance(norm, nn.LayerNorm)
    return NormOutput(first=not plain, named=plain and '2d' in stock_type(norm).__name__)


def _taken(kind: type, geometry: dict) -> dict:
    """What of a layer's geometry a prompt type wants to know."""
    return {k: v for k, v in geometry.items() if k in inspect.signature(kind).parameters}


def _layer_layout(
    module: nn.Module, family: Family, block: nn.Module, layer: nn.Module, given: torch.Size
) -> tuple[Layout, int]:
    """Layout of what a layer reads, and how many extra tokens it has."""
    if isinstance(layer, nn.Conv2d):
        return Maps(), 0
    if isinstance(layer, nn.Linear):
        return Rows(), 0
    layout = family.layout_of(module, block)
    layout = layout.layout if isinstance(layout, Item) else layout
    if layer is block or not isinstance(layout, Tokens) or isinstance(layout, TokensOfGrid):
        return layout, family.count_extra(module, block)
    # Inside a block nobody hands the grid on.
    return Tokens(grid_argument=False), family.count_extra(module, block)


def _blocks(module: nn.Module, table: list[Stage], stages: str | list[str] | None) -> list[str]:
    """The blocks of all stages, or of those named."""
    if stages in (None, 'blocks'):
        return [block for stage in table for block in stage.blocks]
    by_name = {stage.name: stage.blocks for stage in table}
    chosen = []
    for name, path in _choose(module, table, stages):
        chosen += by_name.get(name, (path,))
    return chosen


def _choose(
    module: nn.Module, table: list[Stage], stages: str | list[str] | None
) -> list[tuple[str, str]]:
    """Pairs of stage name and the dotted name of the block that carries its prompt."""
    if stages is None:
        return [(stage.name, stage.blocks[-1]) for stage in table]
    if stages == 'blocks':
        return [(path, path) for stage in table for path in stage.blocks]
    if not isinstance(stages, list | tuple) or not stages:
        raise ValueError(
            f'stages={stages!r} is unknown: use None for every stage, '
            "'blocks' for every block, 'inside' for inside every block, or a list of names such as "
            "['layer1']"
        )
    by_name = {stage.name: stage.blocks[-1] for stage in table}
    modules = dict(module.named_modules())
    chosen = []
    for name in stages:
        if name not in by_name and (name not in modules or name == ''):
            known = list(by_name) or [n for n, _ in module.named_children()]
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f" (did you mean '{near[0]}'?)" if near else ''
            raise ValueError(
                f"{type(module).__name__} has no stage '{name}'{hint}: it has {', '.join(known)}"
            )
        path = by_name.get(name) or _last_block(name, modules[name])
        if path in {p for _, p in chosen}:
            raise ValueError(f"stages={list(stages)} names block '{path}' twice")
        chosen.append((name, path))
    return chosen


def _last_block(name: str, module: nn.Module) -> str:
    """Descend from containers to the last module that runs: a container would run a prompt."""
    path = name
    while isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        plain = next(
            kind.forward
            for kind in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
            if isinstance(module, kind)
        )
        if type(module).forward is not plain:
            raise ValueError(
                f"stage '{name}': {type(module).__name__} is a container with a forward of its "
                'own; name its last block instead'
            )
        children = list(module.named_children())
        if not children:
            raise ValueError(f"stage '{name}' is empty: no block can carry a prompt")
        path = f'{path}.{children[-1][0]}'
        module = children[-1][1]
    return path
