"""The one step of Pro-tuning: add prompts to a backbone and freeze the rest."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from dataclasses import replace

import torch
from mmengine.config import ConfigDict
from mmengine.logging import print_log
from torch import nn

from .features import (
    Beside,
    Item,
    LastMaps,
    Layout,
    Maps,
    NormOutput,
    PatchGrid,
    PatchMaps,
    Rows,
    Site,
    TellsGrid,
    Tokens,
    TokensOfGrid,
    Unknown,
)
from .frozen import Options, PromptedBlock, ProTunedBackbone, freeze
from .lean import lean_options, make_lean
from .policies import blocks_of, check_policy, keeps_lean_layers, parameters_of
from .probe import PROBE_SIZE, probe_channels, probe_layers
from .prompts.scale_shift import ScaleShift
from .registry import PROMPTS
from .stages import Family, Stage, find_family, is_theirs, known_families, refusal
from .subclass import add_mixin, stock_type

DEFAULT_PROMPT = dict(type='ProTuningBlock', ratio=8, last='residual', extra_tokens='map')
PLACED = dict(
    last=('residual', 'series'), extra_tokens=('map', 'mean'), features=('prompted', 'plain')
)
"""What of a prompt's config says how it is placed, and the choices, the default first."""
AFFINE = dict(type='ScaleShift')
NAMED_PROMPTS = {'paper': dict(type='ProTuningBlock', last='series')}


def protune(
    module: nn.Module,
    *,
    stages: str | list[str] | None = None,
    prompt: str | dict | None = None,
    lean: bool | str | dict = True,
    policy: str = 'prompts',
    affine: bool = False,
    require_weights: bool = False,
    weights_given: bool = True,
    base_checkpoint: str | None = None,
) -> nn.Module:
    """Freeze a backbone exactly and add a trainable prompt block after its stages.

    The module is changed in place and keeps its class name, its parameter names and its
    ``state_dict`` keys; new are only the parameters below modules named ``prompt``.

    Args:
        module: a backbone that returns maps or tokens.
        stages: where prompts go. None: after every stage of the stage table. ``'blocks'``: after
            every block. Else names of stages or of submodules, such as
            ``['layer1', 'layer4']``; needed for a backbone the table does not know.
        prompt: config of the prompt block, any part of
            ``dict(type='ProTuningBlock', ratio=8, last='residual', extra_tokens='map',
            features='prompted')``, or
            ``'paper'``. ``last='series'`` (the paper's form) lets the prompt of the last stage
            replace that stage's output; ``'residual'`` adds it. ``extra_tokens`` says what the
            class token receives where a head reads nothing else: ``'map'``, a prompt of its own,
            or ``'mean'``, the mean of the patches' prompt. ``features='plain'`` gives a neck the
            outputs of all stages but the last as they are before their prompt, which the next
            stage alone then reads; for backbones that return these maps themselves.
        lean: frozen layers keep for backward only what their input's gradient needs. True or
            ``'memory'``: least memory; ``'time'``: least time; False: stock layers. Or any part
            of ``dict(prefer='memory', dtype=None, channels_last=None)``, see
            :class:`protune_mm.lean.LeanOptions`.
        policy: ``'prompts'``. For comparison: ``'head-only'``: freeze, no prompts; ``'full'``:
            leave the module as it is; ``'bias'`` (BitFit), ``'norm'`` or ``'last-K'``, such as
            ``'last-2'``: freeze all but biases, norms or the last K blocks; these run stock
            layers.
        affine: beside the prompts, a scale and a shift of channels after every norm inside the
            blocks, see :class:`protune_mm.prompts.ScaleShift`. Default False. It adds a percent of
            parameters and keeps what the norms return for backward.
        require_weights: a frozen backbone without loaded weights is an error, not a warning.
        weights_given: the module holds its pre-trained weights already. Default True: they are
            kept, also by ``init_weights``, and not asked for.
        base_checkpoint: path or address of the pre-trained weights, for a checkpoint of prompts
            that is loaded before these weights are there. Default None: ``init_cfg`` of the
            backbone, else what the checkpoint names, if that is a model zoo.

    Returns:
        The same module.

    Raises:
        ValueError: unknown family without ``stages``, unknown stage, prompt type or option, a
            ratio that leaves no channel, or a module that is Pro-tuned already with other
            options.
        TypeError: a named stage yields something other than a map or tokens.

    Source: arXiv 2207.14381, Figure 2.
    """
    stages = list(stages) if isinstance(stages, tuple) else stages
    lean_as = lean_options(lean) if keeps_lean_layers(policy) else None
    options = Options(stages, _prompt_config(prompt), lean_as, policy, require_weights, affine)
    check_policy(policy)
    if isinstance(module, ProTunedBackbone):
        if module._protune.options == options:
            return module
        raise ValueError(
            f'this {type(module).__name__} is Pro-tuned already, with {module._protune.options}; '
            f'it cannot be Pro-tuned again with {options}: build the stock backbone anew'
        )
    reason = refusal(stock_type(module))
    if reason and policy != 'full':
        raise ValueError(f'{type(module).__name__} cannot be Pro-tuned: {reason}')
    inner = next((n for n, m in module.named_modules() if isinstance(m, ProTunedBackbone)), None)
    if inner is not None:
        raise ValueError(f"submodule '{inner}' is Pro-tuned already: Pro-tune one level only")
    if policy == 'full':
        return module
    sites = _sites(module, options) if policy == 'prompts' else []
    if affine and policy == 'prompts':
        taken = {site.block for site in sites}
        sites += [site for site in _affine_sites(module, options) if site.block not in taken]
    parameters = parameters_of(policy, module)
    blocks = blocks_of(policy, module, stage_table(module, named=not policy.startswith('last')))
    # Everything that can fail on bad input is done before the module is touched.
    prompts = _build_prompts(module, sites, options, _names_ratio(prompt))
    likes = [_home(module.get_submodule(site.block), module) for site in sites]
    # Some stock layers prepare what evaluation needs when they are told of it.
    mode = module.training
    module.train(False)
    if lean_as is not None:
        # Before the prompts: a prompted layer runs its lean form, then its prompt.
        make_lean(module, lean_as, {module.get_submodule(site.block) for site in sites})
    for site, block, home in zip(sites, prompts, likes, strict=True):
        block.lean = lean_as is not None
        _attach(module, site, block.to(**home))
    freeze(module, options, weights_given, mode, blocks, parameters)
    module._protune.base_checkpoint = base_checkpoint
    module._protune.placed = placed_options(options, sites)
    return module


def placed_options(options: Options, sites: list[Site]) -> dict:
    """What decides what prompts compute besides their weights, as a checkpoint keeps it.

    Args:
        options: how the backbone is Pro-tuned.
        sites: where its prompts are.

    Returns:
        dict: of plain values: policy, names of the prompted blocks, and the prompt's options with
        their defaults, but for those that only choose its start.
    """
    placed = dict(policy=options.policy, affine=options.affine)
    if options.lean is not None and options.lean.dtype:
        placed['lean.dtype'] = options.lean.dtype
    if sites:
        cls = _prompt_class(options.prompt)
        placed['blocks'] = [site.block for site in sites if site.config is None]
        placed['prompt.type'] = cls.__name__
        own = {
            name: parameter.default
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        own |= {key: value for key, value in options.prompt.items() if key != 'type'}
        for key in own.keys() - set(getattr(cls, 'start_only', ('zero_init',))):
            placed[f'prompt.{key}'] = own[key]
    return json.loads(json.dumps(placed, sort_keys=True, default=str))


def _prompt_config(prompt: str | dict | None) -> dict:
    if isinstance(prompt, str):
        if prompt not in NAMED_PROMPTS:
            raise ValueError(
                f"prompt='{prompt}' is unknown: use {', '.join(map(repr, NAMED_PROMPTS))} or a "
                "dict such as dict(type='ProTuningBlock', ratio=8)"
            )
        prompt = NAMED_PROMPTS[prompt]
    given = ConfigDict(prompt or {}).to_dict()
    if given.get('type', DEFAULT_PROMPT['type']) == DEFAULT_PROMPT['type']:
        given = {**DEFAULT_PROMPT, **given}
    config = {**{key: choices[0] for key, choices in PLACED.items()}, **given}
    for key, choices in PLACED.items():
        if config[key] not in choices:
            raise ValueError(
                f"prompt.{key}='{config[key]}' is unknown: use one of {', '.join(choices)}"
            )
    return config


SHARE = 0.08
"""Part of a backbone's parameters that prompts after its stages have at most by default."""
RATIOS = (8, 12, 16, 24, 32, 48, 64)


def _names_ratio(prompt: str | dict | None) -> bool:
    """Whether the user chose how wide prompts are, by the ratio or by another prompt type."""
    return isinstance(prompt, dict) and ('ratio' in prompt or 'type' in prompt)


def _build_prompts(
    module: nn.Module, sites: list[Site], options: Options, ratio_given: bool
) -> list[nn.Module]:
    """Prompts for all sites; narrower than the default ratio where they would be too large."""
    if ratio_given or options.stages is not None:
        return [_build_prompt(site, options.prompt) for site in sites]
    budget = SHARE * sum(p.numel() for p in module.parameters())
    for ratio in RATIOS:
        # At least one channel each.
        built = [
            _build_prompt(site, {**options.prompt, 'ratio': min(ratio, site.channels)})
            for site in sites
        ]
        size = sum(p.numel() for prompt in built for p in prompt.parameters())
        if size <= budget:
            break
    if ratio != options.prompt['ratio']:
        print_log(
            f'{type(module).__name__}: prompts have ratio {ratio}, so that they stay within '
            f'{SHARE:.0%} of its parameters; prompt=dict(ratio={options.prompt["ratio"]}) for more',
            logger='current',
        )
    return built


def _build_prompt(site: Site, config: dict) -> nn.Module:
    config = site.config or config
    options = {**_own_options(config), **site.geometry}
    cls = _prompt_class(config)
    if site.series:
        # A prompt that replaces the output and starts at zero would erase it.
        options['zero_init'] = False
    try:
        # Prompts draw their start from a copy of the random state, so that the neck and head
        # of the same seed start as they do in the stock model.
        with torch.random.fork_rng(devices=[]):
            return cls(channels=site.channels, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"prompt of stage '{site.name}': {error}") from error


def _own_options(config: dict) -> dict:
    """What of a prompt's config the prompt type itself takes."""
    return {k: v for k, v in config.items() if k != 'type' and k not in PLACED}


def _prompt_class(config: dict) -> type[nn.Module]:
    kind = config['type']
    cls = PROMPTS.get(kind.removeprefix('protune_mm.')) if isinstance(kind, str) else kind
    if cls is None:
        PROMPTS.import_from_location()
        raise ValueError(
            f"prompt.type='{kind}' is unknown: known are {', '.join(PROMPTS.module_dict)}; add "
            'your own with protune_mm.registry.PROMPTS'
        )
    return cls


def _home(block: nn.Module, module: nn.Module) -> dict:
    """Device and dtype of a block's weights, for its prompt; else of the backbone's first."""
    like = next(block.parameters(), next(module.parameters(), None))
    if like is None:
        return {}
    return dict(device=like.device, dtype=like.dtype if like.is_floating_point() else None)


def _attach(module: nn.Module, site: Site, prompt: nn.Module) -> None:
    block = module.get_submodule(site.block)
    add_mixin(block, PromptedBlock)
    block.prompt = prompt
    block._protune_site = site
    layout = site.layout.layout if isinstance(site.layout, Item) else site.layout
    if isinstance(layout, Beside):
        layout = layout.layout
        around = _block_with_grid(module, site)
        if isinstance(layout, Tokens) and around is not None:
            block_layout, block = around
            add_mixin(block, TellsGrid)
            block._protune_grid = block_layout
    needs_grid = isinstance(layout, Unknown | PatchMaps) or (
        isinstance(layout, Tokens) and not layout.grid_argument
    )
    embedding = dict(module.named_modules()).get(site.embedding)
    if needs_grid and isinstance(embedding, nn.Module) and not isinstance(embedding, PatchGrid):
        add_mixin(embedding, PatchGrid)


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


def _sites(module: nn.Module, options: Options) -> list[Site]:
    """Where prompts go, in the order of the forward pass."""
    family = find_family(stock_type(module))
    table = stage_table(module, named=isinstance(options.stages, list | tuple))
    if not table and not isinstance(options.stages, list | tuple):
        raise ValueError(f'{type(module).__name__} {_no_stages(module, family)}')
    if table and options.stages in (None, 'blocks'):
        key, unread = family.unread(module)
        if unread:
            names = ', '.join(unread) if len(unread) < 5 else f'{unread[0]} to {unread[-1]}'
            print_log(
                f'{type(module).__name__}: no prompt after {names}: {key}={getattr(module, key)} '
                'reads nothing from there',
                logger='current',
            )
    kind = _prompt_class(options.prompt)
    where = getattr(kind, 'where', 'stages')
    if where == 'layers':
        return _layer_sites(module, family, table, options)
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


def _affine_sites(module: nn.Module, options: Options) -> list[Site]:
    """Where the scales and shifts are that ``affine=True`` adds."""
    if _prompt_class(options.prompt) is ScaleShift:
        raise ValueError(f"affine=True adds prompts of type '{AFFINE['type']}': choose another")
    config = _prompt_config(AFFINE)
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
    kind, name = _prompt_class(options.prompt), options.prompt['type']
    if not table:
        raise ValueError(
            f"prompt.type='{name}' needs to know the blocks of {type(module).__name__}: add a row, "
            'see docs/add_a_backbone.md'
        )
    for key, choice in (('last', 'series'), ('features', 'plain')):
        if options.prompt[key] == choice:
            raise ValueError(f"prompt.{key}='{choice}': prompt.type='{name}' runs beside layers")
    blocks = _blocks(module, table, options.stages)
    found = {}
    for block in blocks:
        for layer in kind.layers(module.get_submodule(block), **_own_options(options.prompt)):
            found[f'{block}.{layer}'.rstrip('.')] = block
    native = family.native(module) or PROBE_SIZE
    if kind.reads == 'output':
        if options.stages is None and not family.unread(module)[1]:
            # All of it reaches the output, stem and last norm as well.
            found = dict.fromkeys(kind.layers(module))
        return _norm_sites(module, list(found), native, name)
    shapes = probe_layers(module, list(found), native) if found else {}
    sites = []
    for path, (given, returned) in shapes.items():
        layer, block = module.get_submodule(path), module.get_submodule(found[path])
        layout, extra = _layer_layout(module, family, block, layer, given)
        axis = 1 if isinstance(layout, Maps) else -1
        geometry = dict(out_channels=returned[axis])
        if isinstance(layer, nn.Conv2d):
            names = ('kernel_size', 'stride', 'padding', 'dilation')
            geometry |= {key: getattr(layer, key) for key in names}
        elif isinstance(layout, Maps | LastMaps):
            height = 2 if isinstance(layout, Maps) else 1
            geometry['stride'] = -(-given[height] // returned[height])
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
    return sites


def _norm_sites(module: nn.Module, paths: list[str], native: tuple, name: str) -> list[Site]:
    """Where prompts go that read what a norm returns; a norm that never runs has none."""
    if not paths:
        raise ValueError(
            f"prompt.type='{name}' finds no norm in the blocks of {type(module).__name__}"
        )
    try:
        runs = probe_layers(module, paths, native)
    except ValueError:  # It takes other images only.
        runs = paths
    return [
        Site(
            name=path,
            block=path,
            channels=module.get_submodule(path).weight.numel(),
            layout=NormOutput(first=not isinstance(module.get_submodule(path), nn.LayerNorm)),
        )
        for path in paths
        if path in runs
    ]


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


def _block_with_grid(module: nn.Module, site: Site) -> tuple[Layout, nn.Module] | None:
    """Layout and block around a layer, where the block receives the grid as an argument."""
    family = find_family(stock_type(module))
    for stage in family.split(module):
        for path in stage.blocks:
            if site.block.startswith(f'{path}.'):
                block = module.get_submodule(path)
                layout = family.layout_of(module, block)
                known = isinstance(layout, Tokens) and not isinstance(layout, TokensOfGrid)
                wanted = known and layout.grid_argument and not isinstance(block, TellsGrid)
                return (layout, block) if wanted else None
    return None


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
    if isinstance(stages, str) or not stages:
        raise ValueError(
            f'stages={stages!r} is unknown: use None for every stage, '
            "'blocks' for every block, or a list of names such as ['layer1']"
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
