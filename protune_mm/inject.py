"""The one step of Pro-tuning: add prompts to a backbone and freeze the rest."""

from __future__ import annotations

import inspect
import json
import logging

import torch
from mmengine.logging import print_log
from torch import nn

from .features import (
    Beside,
    Item,
    Layout,
    PatchGrid,
    PatchMaps,
    Site,
    TellsGrid,
    Tokens,
    TokensOfGrid,
    Unknown,
)
from .frozen import freeze
from .lean import lean_options, make_lean
from .norms import make_local
from .policies import blocks_of, check_policy, keeps_lean_layers, parameters_of
from .probe import blocks_checkpointed
from .prompt_config import chooses_width, own_options, prompt_class, prompt_config
from .prompted import PromptedBlock
from .sites import affine_sites, choose_sites, stage_table
from .stages import find_family, refusal
from .subclass import add_mixin, stock_type
from .tuned import Options, is_frozen_backbone


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
            every block. ``'inside'``: inside every block, on what its hidden layer returns (the
            expansion of an inverted residual, the first layer of a feed-forward network, else
            the block's first layer), after its norm and before its nonlinearity. Else names of
            stages or of submodules, such as ``['layer1', 'layer4']``; needed for a backbone the
            table does not know.
        prompt: config of the prompt block, any part of
            ``dict(type='ProTuningBlock', ratio=8, last='residual', extra_tokens='map',
            features='prompted')``, or a name: ``'paper'``, or ``'principal'``, for
            ``stages='inside'``: no activation, a scale of 0.7, and a first convolution that is set
            to the principal directions of the first batch and then frozen, or
            ``'principal-trained'``, where it trains on and the scale is 1. ``last='series'`` (the
            paper's form) lets the prompt of the last stage replace that stage's output;
            ``'residual'`` adds it. ``extra_tokens`` says what
            the class token receives where a head reads nothing else: ``'map'``, a prompt of its
            own, or ``'mean'``, the mean of the patches' prompt. ``features='plain'`` gives a neck
            the outputs of all stages but the last as they are before their prompt, which the next
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
            blocks but those that carry a prompt (``stages='inside'``), see
            :class:`protune_mm.prompts.ScaleShift`. Default False. It adds a percent of
            parameters and keeps what the norms return for backward.
        require_weights: a frozen backbone without loaded weights is an error, not a warning.
        weights_given: the module holds its pre-trained weights already. Default True: they are
            kept, also by ``init_weights``, and not asked for.
        base_checkpoint: path or address of the pre-trained weights, for a checkpoint of prompts
            that is loaded before these weights are there. Default None: what the checkpoint
            names, if that is a model zoo, else ``init_cfg`` of the backbone.

    Returns:
        The same module.

    Raises:
        ValueError: unknown family without ``stages``, unknown stage, prompt type or option, a
            ratio that leaves no channel, or a module that is compiled, or Pro-tuned already with
            other options.
        TypeError: a named stage yields something other than a map or tokens, or an option is of
            another type.

    Source: arXiv 2207.14381, Figure 2.
    """
    stages = list(stages) if isinstance(stages, tuple) else stages
    for name, value in dict(affine=affine, require_weights=require_weights).items():
        if not isinstance(value, bool):
            raise TypeError(f'{name}={value!r} is neither True nor False')
    if not isinstance(base_checkpoint, str | None):
        raise TypeError(f'base_checkpoint={base_checkpoint!r} is neither a string nor None')
    lean_as = lean_options(lean) if keeps_lean_layers(policy) else None
    options = Options(stages, prompt_config(prompt), lean_as, policy, require_weights, affine)
    check_policy(policy)
    if is_frozen_backbone(module):
        if module._protune.options == options:
            return module
        raise ValueError(
            f'this {type(module).__name__} is Pro-tuned already, with {module._protune.options}; '
            f'it cannot be Pro-tuned again with {options}: build the stock backbone anew'
        )
    # By its attribute: to import its type takes seconds.
    if isinstance(getattr(module, '_orig_mod', None), nn.Module):
        raise ValueError(
            'the module is compiled already: Pro-tune the network itself, then call torch.compile '
            'on what protune returns'
        )
    reason = refusal(stock_type(module))
    if reason and policy != 'full':
        raise ValueError(f'{type(module).__name__} cannot be Pro-tuned: {reason}')
    inner = next((n for n, m in module.named_modules() if is_frozen_backbone(m)), None)
    if inner is not None:
        raise ValueError(f"submodule '{inner}' is Pro-tuned already: Pro-tune one level only")
    if policy == 'full':
        return module
    again = blocks_checkpointed(module)
    if again and policy != 'head-only':
        raise ValueError(
            f'{type(module).__name__} with {again}=True computes whole blocks again in backward, '
            f'and what trains in them would get no gradient: use {again}=False; frozen layers keep '
            'little for backward'
        )
    sites = choose_sites(module, options) if policy == 'prompts' else []
    if affine and policy == 'prompts':
        taken = {site.block for site in sites}
        sites += [site for site in affine_sites(module, options) if site.block not in taken]
    parameters = parameters_of(policy, module)
    blocks = blocks_of(policy, module, stage_table(module, named=not policy.startswith('last')))
    # Everything that can fail on bad input is done before the module is touched.
    prompts = _build_prompts(module, sites, options, chooses_width(prompt))
    likes = [_home(module.get_submodule(site.block), module) for site in sites]
    # Some stock layers prepare what evaluation needs when they are told of it.
    mode = module.training
    module.train(False)
    if keeps_lean_layers(policy):  # All of it stays frozen.
        make_local(module)
    if lean_as is not None:
        # Before the prompts: a prompted layer runs its lean form, then its prompt.
        make_lean(module, lean_as, {module.get_submodule(site.block) for site in sites})
    for site, block, home in zip(sites, prompts, likes, strict=True):
        block.lean = lean_as is not None
        _attach(module, site, block.to(**home))
    freeze(module, options, weights_given, mode, blocks, parameters)
    module._protune.base_checkpoint = base_checkpoint
    module._protune.placed = placed_options(options, sites)
    module._protune.places = len(sites)
    _warn_of_classifier(module, sites)
    return module


def placed_options(options: Options, sites: list[Site]) -> dict:
    """What decides what prompts compute besides their weights, as a checkpoint keeps it.

    Args:
        options: how the backbone is Pro-tuned.
        sites: where its prompts are.

    Returns:
        dict: of plain values: policy, names of the prompted blocks, and the prompt's options with
        their defaults, but for those that only choose how it starts and trains.
    """
    placed = dict(policy=options.policy, affine=options.affine)
    if options.lean is not None and options.lean.dtype:
        placed['lean.dtype'] = options.lean.dtype
    if sites:
        cls = prompt_class(options.prompt)
        placed['blocks'] = [site.block for site in sites if site.config is None]
        placed['prompt.type'] = cls.__name__
        own = {
            name: parameter.default
            for name, parameter in inspect.signature(cls).parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }
        own |= {key: value for key, value in options.prompt.items() if key != 'type'}
        for key in own.keys() - set(getattr(cls, 'training_only', ('zero_init',))):
            placed[f'prompt.{key}'] = own[key]
    return json.loads(json.dumps(placed, sort_keys=True, default=str))


def _warn_of_classifier(module: nn.Module, sites: list[Site]) -> None:
    """Say that the classifier at the end of a network of no known family is frozen, too."""
    if not sites or find_family(stock_type(module)):
        return
    name, last = list(module.named_children())[-1]
    leaves = [m for m in last.modules() if not list(m.children())]
    carries = any(f'{site.block}.'.startswith(f'{name}.') for site in sites)
    if isinstance(leaves[-1], nn.Linear) and not carries:
        print_log(
            f"'{name}' of {type(module).__name__} looks like a classifier, and is frozen, too: "
            'Pro-tune the network without it, and put what trains behind it',
            logger='current',
            level=logging.WARNING,
        )


SHARE = 0.08
"""Part of a backbone's parameters that prompts after its stages, or inside its blocks, have at most
where the user chose no width; what is fixed in them is not counted."""
RATIOS = (8, 12, 16, 24, 32, 48, 64)
"""Of the first that keeps to it."""


def _build_prompts(
    module: nn.Module, sites: list[Site], options: Options, width_given: bool
) -> list[nn.Module]:
    """Prompts for all sites; narrower than the default ratio where they would be too large."""
    if width_given or options.stages not in (None, 'inside'):
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
    options = {**own_options(config), **site.geometry}
    cls = prompt_class(config)
    if site.series:
        # A prompt that replaces the output and starts at zero would erase it.
        options['zero_init'] = False
    try:
        # Prompts draw their start from a copy of the random state, so that the neck and head
        # of the same seed start as they do in the stock model.
        with torch.random.fork_rng(devices=[]):
            return cls(channels=site.channels, **options)
    except (TypeError, ValueError, AssertionError, KeyError, RuntimeError) as error:
        # An assertion may say nothing.
        told = str(error) or f'{type(error).__name__} of {own_options(config)}'
        raise ValueError(f"prompt of stage '{site.name}': {told}") from error


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
