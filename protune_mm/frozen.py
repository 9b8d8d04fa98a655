"""How a backbone is and stays frozen, exactly, but for what trains in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from .base_weights import provide
from .identity import Identity
from .lean import forget, inputs_channels_last, link, to_stock
from .loading import (
    after_load,
    check_tuned,
    check_weights,
    give_back,
    known_base,
    loads_pretrained,
    without_prompts,
)
from .prompted import PromptedBlock, choice, plain_maps, sets_of
from .stages import find_family
from .subclass import add_mixin, stock_type
from .tuned import (
    Options,
    State,
    forks,
    frozen_keys,
    frozen_tensors,
    prompts,
    trained_blocks,
    trained_modules,
)
from .weights import LoadRecord


class ProTunedBackbone:
    """Mixin for a backbone whose every parameter and buffer is frozen, but for its prompts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stock backbone; the first call says loudly when it has no weights."""
        if not self._protune.loads.checked:
            check_places(self)
            check_weights(self)
        elif not torch.compiler.is_compiling():
            _check_carriers(self)
        if '_protune_pairs' in self.__dict__ and '_protune_linked' not in self.__dict__:
            link(self)
        state = self._protune
        lean = None if state.contiguous else state.options.lean
        changed = lean and inputs_channels_last(lean.channels_last, args, kwargs)
        if not changed:
            return self._protune_forward(*args, **kwargs)
        try:
            return to_stock(self._protune_forward(*changed[0], **changed[1]))
        except RuntimeError as error:
            if 'view size is not compatible' not in str(error):
                raise
            print_log(
                f'{type(self).__name__} runs on contiguous maps from now on, as with '
                'lean=dict(channels_last=False): its forward takes a `view` of a map that only '
                'contiguous memory allows',
                logger='current',
            )
            state.contiguous = True
        return self._protune_forward(*args, **kwargs)

    def _protune_forward(self, *args: Any, **kwargs: Any) -> Any:
        sets, chosen = sets_of.get(self), choice.get()
        if sets is None or chosen is not None:
            if chosen is not None:
                chosen.begin(self)  # Also when a forward pass is begun again.
            return self._protune_run(*args, **kwargs)
        # A forward pass keeps the set that it begins with.
        token = choice.set(sets.chosen())
        try:
            return self._protune_run(*args, **kwargs)
        finally:
            choice.reset(token)

    def _protune_run(self, *args: Any, **kwargs: Any) -> Any:
        if self._protune.options.prompt['features'] == 'prompted':
            return super().forward(*args, **kwargs)
        token = plain_maps.set([])
        try:
            return _show_plain(self, super().forward(*args, **kwargs), plain_maps.get())
        finally:
            plain_maps.reset(token)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of the prompts; the frozen part stays in evaluation mode.

        Stock ``train`` methods freeze ``layer1...N`` with all they contain and put batch norms
        in evaluation mode, prompts included, so the prompts are set after it. Prompts that were
        frozen from outside (a teacher's) stay so.
        """
        check_places(self)
        trained = trained_modules(self).values()
        wanted = {p: p.requires_grad for p in _trained_parameters(self)}
        super().train(False)
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
        for module in trained:
            module.train(mode)
        if self in sets_of:
            sets_of[self].train(mode)
        if getattr(self, 'norm_eval', False):
            # What the stock backbone asks for holds for its own blocks that train, too.
            for block in trained_blocks(self).values():
                for layer in block.modules():
                    if isinstance(layer, _BatchNorm):
                        layer.train(False)
        for module in forks(self):
            module.training = mode
        # Weights written past autograd's version counter, as an EMA swap does, count from here. Not
        # where a training goes on: mmengine's IterBasedTrainLoop calls this before every step, and
        # whoever swaps weights in a training validates in between.
        if not (mode and self._protune.mode):
            forget(self)
        self._protune.mode = mode
        return self

    def init_weights(self) -> None:
        """Run the stock initialization without the prompts, then give them their own start, once.

        Stock rules reach everything below the backbone, and would draw random numbers for
        prompts: the neck and head of one seed start as they do in the stock model.
        """
        # Weights that came with the module are not to be overwritten by a random start.
        keep = self._protune.loads.given and not loads_pretrained(self)
        if hasattr(super(), 'init_weights') and not keep:
            before, self._protune.initializing = self._protune.initializing, True
            try:
                with without_prompts(self):
                    super().init_weights()
            finally:
                self._protune.initializing = before
        # Rules of a model around it have been here before, too.
        self._protune.loads.forget_redrawn(dict(frozen_tensors(self)))
        if not self._protune.initialized:
            starting = prompts(self).values()
            # The neck and head of a seed start as without prompts, on a GPU as well.
            cuda = {p.device for prompt in starting for p in prompt.parameters() if p.is_cuda}
            with torch.random.fork_rng(devices=list(cuda)):
                for prompt in starting:
                    prompt.init_weights()
            self._protune.initialized = True

    def protune_fingerprint(self) -> str:
        """32 hexadecimal digits that stand for every bit of the frozen weights."""
        return self._protune.find_fingerprint(self)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: dict, *args: Any
    ) -> None:
        told = Identity.pop(state_dict, prefix)
        if told is not None:
            if '_protune_taken' in self.__dict__:
                # `init_cfg` names a file with prompts: they are part of what it initializes.
                give_back(self)
                self._protune.initialized = True
            check_tuned(self, told, state_dict, prefix)
            if any(prefix + key not in state_dict for key in frozen_keys(self)):
                provide(self, told)
        self._protune.told = told
        self._protune.before = '' if told else known_base(self)
        self._protune.loads.prefix = prefix
        # mmpretrain's Swin converts old checkpoints only if `self.__class__ is SwinTransformer`.
        cls = self.__class__
        self.__class__ = stock_type(self)
        try:
            self._load_from_state_dict(state_dict, prefix, metadata, *args)
        finally:
            self.__class__ = cls
        # After the stock method, which may have resized position embeddings in `state_dict`.
        self._protune.loads.misshapen = {
            name
            for name, tensor in frozen_tensors(self)
            if getattr(state_dict.get(prefix + name), 'shape', tensor.shape) != tensor.shape
        }


def _show_plain(backbone: nn.Module, out: Any, plain: list[tuple[Tensor, Tensor]]) -> Any:
    """What a backbone returns, with the maps of its stages as they are before their prompt.

    Args:
        backbone: a :class:`ProTunedBackbone` with ``features='plain'``.
        out: what it returns.
        plain: prompted and plain output of the blocks at the end of all stages but the last.

    Raises:
        RuntimeError: it returns none of these outputs itself, but what it computes from them.
    """
    replaced = 0

    def replace(x: Any) -> Any:
        nonlocal replaced
        for prompted, before in plain:
            if x is prompted:
                replaced += 1
                return before
        return x

    shown = tree_map(replace, out)
    if plain and not replaced:
        raise RuntimeError(
            f"prompt.features='plain': {type(backbone).__name__} returns no output of a stage "
            "before the last as it is: use features='prompted'"
        )
    return shown


def _trained_parameters(backbone: nn.Module) -> Iterator[nn.Parameter]:
    for module in trained_modules(backbone).values():
        yield from module.parameters()
    for name in backbone._protune.parameters:
        yield backbone.get_parameter(name)


def freeze(
    module: nn.Module,
    options: Options,
    weights_given: bool,
    mode: bool,
    blocks: tuple[str, ...] = (),
    parameters: frozenset[str] = frozenset(),
) -> None:
    """Make a backbone with its prompts attached a :class:`ProTunedBackbone`.

    Args:
        module: the backbone.
        options: how it was Pro-tuned.
        weights_given: it holds its pre-trained weights already.
        mode: whether its prompts are in training mode.
        blocks: names of blocks that train.
        parameters: names of single parameters that train.
    """
    add_mixin(module, ProTunedBackbone)
    family = find_family(stock_type(module))
    head = tuple(family.head(module)) if family else ()
    module._protune = State(options, head, blocks, parameters, LoadRecord(given=weights_given))
    if family is None:
        # A user's own may call operations that read memory as if it were contiguous: it is asked
        # for by lean=dict(channels_last=True).
        module._protune.contiguous = options.lean is not None and options.lean.channels_last is None
    module.requires_grad_(False)
    for parameter in _trained_parameters(module):
        parameter.requires_grad_(parameter.is_floating_point())
    module.train(mode)
    if weights_given:
        module._protune.loads.watch(dict(frozen_tensors(module)))
    module.register_load_state_dict_post_hook(after_load)


def _check_carriers(module: nn.Module) -> None:
    """Look whether the layers with prompts are where they were, at the cost of a few look-ups.

    Raises:
        RuntimeError: one of them was replaced, see :func:`check_places`.
    """
    state = module._protune
    if state.carriers is None:
        state.carriers = [
            (parent, name, child)
            for parent in module.modules()
            for name, child in parent.named_children()
            if isinstance(child, PromptedBlock)
        ]
    if any(parent._modules.get(name) is not child for parent, name, child in state.carriers):
        check_places(module)  # What is wrapped now, as FSDP does, is still there.
        state.carriers = None


def check_places(module: nn.Module) -> None:
    """Refuse a backbone that has lost prompts with the layers that carried them.

    Args:
        module: a :class:`ProTunedBackbone`.

    Raises:
        RuntimeError: one of these layers was replaced.
    """
    left = sum(isinstance(m, PromptedBlock) for m in module.modules())
    if left < module._protune.places:
        raise RuntimeError(
            f'{type(module).__name__} has {left} of its {module._protune.places} prompts left: '
            'layers that carried one were replaced, by a conversion to synchronized batch norms '
            "(sync_bn) or by fusing norms, say; prompts after stages (stages=None or 'blocks') sit "
            'on none of these'
        )
