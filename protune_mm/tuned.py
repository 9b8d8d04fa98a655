"""What of a model's backbones trains and what is frozen.

:func:`tuned_parameters` is the one definition of "tuned"; freezing, optimizer, guard and reports
all use it. A backbone is frozen when it carries a :class:`State`: so it is, too, while it wears its
stock class to load a checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from .identity import Identity, fingerprint, identifying
from .lean import LeanOptions
from .prompted import PromptedBlock
from .stages import find_family
from .subclass import stock_type
from .weights import LoadRecord


@dataclass(frozen=True)
class Options:
    """How a backbone was Pro-tuned; equal options make :func:`protune_mm.protune` idempotent."""

    stages: str | list[str] | None
    prompt: dict
    lean: LeanOptions | None
    policy: str
    require_weights: bool
    affine: bool = False


@dataclass
class State:
    """What a Pro-tuned backbone knows about itself.

    Attributes:
        options: how it was Pro-tuned.
        head: names of its submodules that are a classifier, which trains.
        blocks: names of the blocks that a policy other than prompts trains.
        parameters: names of the single parameters that a policy other than prompts trains.
        loads: which frozen tensors have received weights.
        initialized: its prompts have been given their start by ``init_weights``.
        initializing: its ``init_weights`` is running, and may load what ``init_cfg`` names.
        fetching: address of the base that is being loaded for a checkpoint of prompts.
        contiguous: it runs on contiguous maps: its forward cannot run on others, or nobody has
            looked whether it can.
        base_checkpoint: where its user says that its base lies, for checkpoints without it.
        origin: where its base came from, where that is known from loading; see
            :class:`protune_mm.identity.Identity`.
        placed: what decides what its prompts compute, as checkpoints keep it.
        places: number of layers and blocks that carry a prompt.
        told: what the checkpoint that is being loaded says of its base.
        before: fingerprint that its base has while other weights are being loaded.
        fingerprint: of its frozen weights, behind what it was computed for.
        mode: the mode that ``train`` has set last.
        follows: a hook averages its weights with those of a student.
        carriers: parent, name in it and layer of all that carries a prompt, as it was last seen.
    """

    options: Options
    head: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()
    loads: LoadRecord = field(default_factory=LoadRecord)
    initialized: bool = False
    initializing: bool = False
    fetching: str = ''
    contiguous: bool = False
    base_checkpoint: str | None = None
    origin: dict = field(default_factory=dict)
    placed: dict = field(default_factory=dict)
    places: int = 0
    told: Identity | None = None
    before: str = ''
    fingerprint: tuple = ()
    mode: bool = False
    follows: bool = False
    carriers: list[tuple[nn.Module, str, nn.Module]] | None = None

    def find_fingerprint(self, backbone: nn.Module) -> str:
        """The fingerprint of a backbone's frozen weights, computed where they have changed."""
        found = list(identifying(backbone, frozen_tensors(backbone)))
        now = _stamp(found)
        if not self.fingerprint or self.fingerprint[0] != now:
            self.fingerprint = (now, fingerprint(found))
        return self.fingerprint[1]

    def pin_fingerprint(self, backbone: nn.Module, known: str) -> None:
        """Note the fingerprint of a backbone's frozen weights as they are now."""
        self.fingerprint = (_stamp(identifying(backbone, frozen_tensors(backbone))), known)


def is_frozen_backbone(module: nn.Module) -> bool:
    """Whether a module is itself a backbone that is frozen but for what trains in it."""
    return isinstance(module.__dict__.get('_protune'), State)


def backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Dotted name to each frozen backbone (Pro-tuned or head-only) inside a model."""
    return {n: m for n, m in model.named_modules() if is_frozen_backbone(m)}


def prompts(model: nn.Module) -> dict[str, nn.Module]:
    """All prompt modules of a model, in the order of its modules.

    Args:
        model: any module; Pro-tuned backbones are found inside it.

    Returns:
        dict[str, nn.Module]: dotted name inside ``model`` to prompt module.
    """
    return {
        f'{name}.prompt'.lstrip('.'): module.prompt
        for name, module in model.named_modules()
        if isinstance(module, PromptedBlock) and 'prompt' in module._modules
    }


def prompt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all prompts of a model, in the order of its modules."""
    return {
        f'{name}.{key}': parameter
        for name, prompt in prompts(model).items()
        for key, parameter in prompt.named_parameters()
    }


def tuned_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name to parameter of all that is tuned in a model's backbones: the one definition of it.

    That is their prompts, or what another policy trains instead (biases, say).

    Args:
        model: a backbone or anything that contains one, wrapped (DDP, EMA) or not.

    Returns:
        dict[str, nn.Parameter]: dotted name inside ``model`` to parameter; empty if no prompt.
    """
    tuned = prompt_parameters(model)
    for prefix, backbone in backbones(model).items():
        state = backbone._protune
        if not state.parameters and not state.blocks:
            continue
        for name, parameter in backbone.named_parameters():
            inside = any(name.startswith(f'{block}.') for block in state.blocks)
            if inside or name in state.parameters:
                tuned[f'{prefix}.{name}'.lstrip('.')] = parameter
    return tuned


def tuned_state(backbone: nn.Module) -> dict[str, Tensor]:
    """What of a backbone's ``state_dict`` is not frozen, as the tensors themselves.

    Args:
        backbone: a :class:`protune_mm.frozen.ProTunedBackbone`.
    """
    leave = frozen_keys(backbone)
    state = backbone.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in state.items() if key not in leave}


def heads(backbone: nn.Module) -> dict[str, nn.Module]:
    """Dotted name to each submodule of a backbone that is a classifier, and so trains."""
    return {name: backbone.get_submodule(name) for name in backbone._protune.head}


def trained_modules(backbone: nn.Module) -> dict[str, nn.Module]:
    """Dotted name to each submodule of a backbone that trains: prompts, classifier, blocks."""
    return {**prompts(backbone), **heads(backbone), **trained_blocks(backbone)}


def trained_blocks(backbone: nn.Module) -> dict[str, nn.Module]:
    """Dotted name to each block of a backbone that a policy trains as a whole."""
    return {name: backbone.get_submodule(name) for name in backbone._protune.blocks}


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every frozen parameter and buffer: all that backbones hold but what trains.

    Args:
        model: a backbone or anything that contains one.

    Yields:
        tuple[str, Tensor]: dotted name inside ``model``, and the tensor itself.
    """
    for prefix, backbone in backbones(model).items():
        skip = trained_modules(backbone)
        for module_name, module in backbone.named_modules(prefix=prefix):
            relative = module_name[len(prefix) :].lstrip('.')
            if any(relative == name or relative.startswith(f'{name}.') for name in skip):
                continue
            own = itertools.chain(
                module.named_parameters(recurse=False), module.named_buffers(recurse=False)
            )
            for key, tensor in own:
                if f'{relative}.{key}'.lstrip('.') in backbone._protune.parameters:
                    continue
                yield f'{module_name}.{key}'.lstrip('.'), tensor


def frozen_keys(model: nn.Module) -> set[str]:
    """Keys of a model's ``state_dict`` that are frozen weights of its backbones.

    A tensor that a model registers twice has two keys.
    """
    frozen = {id(tensor) for _, tensor in frozen_tensors(model)}
    state = model.state_dict(keep_vars=True)
    return {key for key, tensor in state.items() if id(tensor) in frozen}


def frozen_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted name and module of every frozen module of a model's backbones."""
    for prefix, backbone in backbones(model).items():
        trained = {id(m) for top in trained_modules(backbone).values() for m in top.modules()}
        for name, module in backbone.named_modules(prefix=prefix):
            if id(module) not in trained:
                yield name, module


def forks(backbone: nn.Module) -> list[nn.Module]:
    """Modules of a backbone that return something else while training; only they know the mode."""
    family = find_family(stock_type(backbone))
    return [backbone.get_submodule(name) for name in family.forks(backbone)] if family else []


def is_teacher(backbone: nn.Module) -> bool:
    """Whether a backbone follows a student: its prompts are frozen from outside, or a hook says so.

    An average of its weights with the student's may round those that are frozen.
    """
    if backbone._protune.follows:
        return True
    tuned = tuned_parameters(backbone).values()
    return bool(tuned) and not any(parameter.requires_grad for parameter in tuned)


def unwrapped(model: nn.Module, twin: bool = True) -> nn.Module:
    """A model without what is around it for distribution or test-time augmentation.

    Args:
        model: wrapped or not.
        twin: of a model that FSDP has split, return its twin without data, which has the names and
            shapes of the whole weights, and not the model that runs. Default True.
    """
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = (twin and model.__dict__.get('protune_twin')) or model.module
    return model


def whole_name(name: str) -> str:
    """A dotted name as it is in the model before FSDP has wrapped it."""
    return '.'.join(part for part in name.split('.') if part not in ('', '_fsdp_wrapped_module'))


def _stamp(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple]:
    """What changes when one of some tensors does."""
    return [
        # In inference mode nobody counts changes, so each look is a new one.
        (name, id(t), t.data_ptr(), object() if t.is_inference() else t._version, t.dtype)
        for name, t in tensors
    ]
