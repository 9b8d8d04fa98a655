"""FSDP: the frozen weights, and all others, are split between the GPUs of a training.

Through mmengine's FlexibleRunner, whose strategy wraps the model. What it holds then are parts of
weights under other names, so whatever asks what is frozen, tuned or saved asks a twin of the model
without data, see :func:`protune_mm.tuned.unwrapped`.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    ShardingStrategy,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP  # noqa: N817

from .checkpoints import note_origin
from .identity import KEY, fingerprint, identifying
from .loading import check_weights, origin_told
from .optim import check_warmup, wrap_constructor
from .prompted import PromptedBlock
from .prompts.convs import fixed_layers
from .registry import STRATEGIES
from .report import parameter_line
from .tuned import (
    backbones,
    frozen_keys,
    frozen_modules,
    frozen_tensors,
    prompts,
    unwrapped,
    whole_name,
)

NO_CHECKPOINTING = (
    'activation_checkpointing: use with_cp=True of the backbone, which knows of prompts'
)


@STRATEGIES.register_module()
class ProTuneFSDPStrategy(FSDPStrategy):
    """mmengine's FSDPStrategy for a model with Pro-tuned backbones.

    Units of FSDP are the prompts, the blocks, the rest of each backbone, and what is around it. So
    no unit has both frozen and trained weights: frozen ones are gathered for a block and let go,
    and have no gradient to keep. Checkpoints are those of a training without FSDP, without frozen
    weights, but for the state of the optimizer, which FSDP writes by name.

    Args:
        min_size: parameters of a block from which on it is a unit of its own. Default 100000.
        model_wrapper: as for FSDPStrategy; ``auto_wrap_policy`` is ours unless it names one.
        **kwargs: as for FSDPStrategy; ``state_dict_cfg`` is ``'full'``.

    Raises:
        ValueError: another ``state_dict_cfg``, or ``activation_checkpointing``.
    """

    def __init__(
        self, *, min_size: int = 100_000, model_wrapper: dict | None = None, **kwargs: Any
    ) -> None:
        if kwargs.get('activation_checkpointing') is not None:
            raise ValueError(NO_CHECKPOINTING)
        if kwargs.setdefault('state_dict_cfg', 'full') != 'full':
            raise ValueError(
                f"state_dict_cfg='{kwargs['state_dict_cfg']}': a checkpoint without frozen weights "
                "is one file, state_dict_cfg='full'"
            )
        super().__init__(model_wrapper=model_wrapper, **kwargs)
        self.min_size = min_size
        self._initialized = False

    def _setup_distributed(
        self, launcher: str = 'pytorch', backend: str = 'nccl', **kwargs: Any
    ) -> None:
        """Over gloo where there is no CUDA device."""
        if launcher == 'pytorch' and not torch.cuda.is_available():
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group('gloo')
            return
        super()._setup_distributed(launcher, backend, **kwargs)

    def build_param_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """Build the schedules, of which a warm-up of prompts allows those that multiply only."""
        built = super().build_param_scheduler(*args, **kwargs)
        check_warmup(built)
        return built

    def prepare(
        self, model: nn.Module | dict, *, optim_wrapper: Any = None, **kwargs: Any
    ) -> tuple:
        """Build, initialize and wrap the model, whose names an optimizer's rules see unwrapped."""
        if not self._prepared and isinstance(optim_wrapper, dict):
            self.dispatch_kwargs.update(kwargs.get('dispatch_kwargs') or {})
            model = self._init_model_weights(self.build_model(model))
            wrapped = wrap_constructor(optim_wrapper) if backbones(model) else optim_wrapper
            optim_wrapper = super().build_optim_wrapper(wrapped, model)
        return super().prepare(model, optim_wrapper=optim_wrapper, **kwargs)

    def _init_model_weights(self, model: nn.Module) -> nn.Module:
        if self._initialized:
            return model
        self._initialized = True
        return super()._init_model_weights(model)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        twin = twin_of(model)
        self.logger.info(parameter_line(model))
        self._start_without_data(model)
        wrapper = dict(self.model_wrapper or {})
        wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        wrapper.setdefault('use_orig_params', True)
        if 'auto_wrap_policy' not in wrapper:
            units = {id(unit) for unit in frozen_units(model, self.min_size)}
            wrapper['auto_wrap_policy'] = lambda module, recurse, **_: (
                recurse or id(module) in units
            )
        if torch.cuda.is_available():
            device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
        else:
            device = torch.device('cpu')
        model.data_preprocessor.to(device)
        sharded = MODEL_WRAPPERS.build(wrapper, default_args=dict(module=model, device_id=device))
        if device.type == 'cpu':
            # What is on the CPU cannot be moved there: PyTorch would read memory that it has freed.
            self.state_dict_config = FullStateDictConfig()
            self.optim_state_dict_config = FullOptimStateDictConfig()
        with _state_dict_warnings():
            FSDP.set_state_dict_type(
                sharded, self.state_dict_type, self.state_dict_config, self.optim_state_dict_config
            )
        # Not as an attribute of the module, which would be sharded, moved and saved with it.
        sharded.__dict__['protune_twin'] = twin
        return sharded

    def _start_without_data(self, model: nn.Module) -> None:
        """What a forward pass writes into weights that FSDP has gathered is lost after it.

        Buffers, such as a first convolution that stays as it starts, are whole on every process.
        """
        waiting = [
            prompt
            for prompt in prompts(model).values()
            if getattr(prompt, 'waits', False) and not fixed_layers(prompt)
        ]
        for prompt in waiting:
            prompt.waits = False
        if waiting:
            self.logger.warning(
                "prompt.init_mode='principal' needs whole weights in the first step: under FSDP "
                'the first convolution of a prompt starts at random; that of '
                "prompt='principal', which has fixed_down=True, does not"
            )

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> Any:
        """Let an optimizer that was built for the whole weights train their parts."""
        if not isinstance(optim_wrapper, BaseOptimWrapper):
            return super().build_optim_wrapper(optim_wrapper, model)
        parts = {whole_name(name): p for name, p in model.named_parameters()}
        for group in optim_wrapper.optimizer.param_groups:
            group['params'] = [parts[self.id_to_name[id(p)]] for p in group['params']]
        if getattr(optim_wrapper, 'clip_func', None) is nn.utils.clip_grad_norm_:
            # Of its part alone each process would know another norm.
            optim_wrapper.clip_func = partial(_clip_grad_norm, model)
        return optim_wrapper

    def optim_state_dict(self) -> dict:
        """State of the optimizer by the names of whole weights, on the first process."""
        with _state_dict_warnings():
            state = FSDP.optim_state_dict(self.model, self.optim_wrapper.optimizer)
        more = {k: v for k, v in self.optim_wrapper.state_dict().items() if k not in STATE}
        return {**state, **more}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Give each process its part of the state."""
        more = {k: v for k, v in state_dict.items() if k not in STATE}
        state = {k: state_dict[k] for k in STATE}
        if not all(isinstance(name, str) for name in state['state']):
            raise ValueError(
                'the checkpoint cannot be resumed with FSDP: the state of its optimizer is that of '
                'a training without; start anew from its weights with load_from'
            )
        with _state_dict_warnings():
            state = FSDP.optim_state_dict_to_load(self.model, self.optim_wrapper.optimizer, state)
        self.optim_wrapper.load_state_dict({**state, **more})

    def model_state_dict(self) -> dict:
        """Whole weights, on the first process."""
        with _state_dict_warnings():
            return super().model_state_dict()

    def load_checkpoint(self, filename: str, *, callback: Any = None, **kwargs: Any) -> dict:
        """Load a checkpoint; where it holds frozen weights, they are the base from now on."""
        frozen: set[str] = set()

        def look(checkpoint: dict) -> None:
            note_origin(self.model, checkpoint, filename)
            frozen.update(frozen_keys(unwrapped(self.model)) & checkpoint['state_dict'].keys())
            if callback is not None:
                callback(checkpoint)

        checkpoint = super().load_checkpoint(filename, callback=look, **kwargs)
        if frozen:
            found = fingerprints(self.model)
            for name, backbone in backbones(unwrapped(self.model)).items():
                backbone._protune.pin_fingerprint(backbone, found[name])
        return checkpoint

    def load_model_state_dict(
        self, state_dict: dict, *, strict: bool = False, revise_keys: Any = ()
    ) -> None:
        """Load what a checkpoint holds, and log what does not fit, as mmengine does.

        Raises:
            RuntimeError: with ``strict``, something does not fit.
        """
        for pattern, replacement in revise_keys:
            state_dict = {re.sub(pattern, replacement, k): v for k, v in state_dict.items()}
        mine = unwrapped(self.model).state_dict()
        state, wrong = {}, []
        for key, value in state_dict.items():
            if f'.{KEY}.' in f'.{key}':
                continue
            if key not in mine:
                wrong.append(f'unexpected key: {key}')
            elif value.shape != mine[key].shape:
                shapes = f'{tuple(value.shape)}, here {tuple(mine[key].shape)}'
                wrong.append(f'size mismatch for {key}: {shapes}')
            elif not value.is_meta:  # A hook has filled in what stays as it is.
                state[key] = value
        wrong += [f'missing key: {key}' for key in mine if key not in state_dict]
        if wrong:
            told = 'The model and the checkpoint do not match exactly\n' + '\n'.join(wrong)
            if strict:
                raise RuntimeError(told)
            self.logger.warning(told)
        with _state_dict_warnings(), origin_told():
            self.model.load_state_dict(state, strict=False)


def _clip_grad_norm(
    model: FSDP, _: Any, max_norm: float, norm_type: float = 2.0, **kwargs: Any
) -> torch.Tensor:
    return model.clip_grad_norm_(max_norm, norm_type)


STATE = ('state', 'param_groups')


@contextlib.contextmanager
def _state_dict_warnings() -> Iterator[None]:
    """mmengine uses FSDP.state_dict_type, which PyTorch has begun to replace."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.*state_dict_type', FutureWarning)
        warnings.filterwarnings('ignore', '.*ShardedTensor', UserWarning)
        yield


def twin_of(model: nn.Module) -> nn.Module:
    """A copy of a model without data, that knows the fingerprints of the model's backbones.

    Raises:
        RuntimeError: a backbone has no weights. They cannot be fetched once they are sharded.
    """
    for name, backbone in backbones(model).items():
        loads = backbone._protune.loads
        if not loads.checked:
            check_weights(backbone)
        if loads.problem(backbone, dict(frozen_tensors(backbone))) is not None:
            raise RuntimeError(
                f"'{name}' has no pre-trained weights when FSDP splits them: name them in the "
                'config, backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=...))'
            )
    empty: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        meta = torch.empty_like(tensor, device='meta')
        parameter = isinstance(tensor, nn.Parameter)
        empty[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if parameter else meta
    twin = copy.deepcopy(model, empty)
    for name, backbone in backbones(model).items():
        copied = backbones(twin)[name]
        copied._protune.pin_fingerprint(copied, backbone.protune_fingerprint())
    return twin


def frozen_units(model: nn.Module, min_size: int) -> Iterator[nn.Module]:
    """Modules of which each is a unit of FSDP.

    Args:
        model: with whole weights.
        min_size: parameters of a block from which on it is one.
    """
    for backbone in backbones(model).values():
        yield backbone
        yield from prompts(backbone).values()
        frozen = {id(module) for _, module in frozen_modules(backbone)}
        for parent in backbone.modules():
            if not isinstance(parent, nn.Sequential | nn.ModuleList):
                continue
            for block in parent:
                large = sum(p.numel() for p in block.parameters()) >= min_size
                unit = large or isinstance(block, PromptedBlock)
                # A list is never run itself.
                if unit and id(block) in frozen and not isinstance(block, nn.ModuleList):
                    yield block


def fingerprints(model: nn.Module) -> dict[str, str]:
    """Fingerprint of the frozen weights of each backbone of a model that FSDP has split.

    Whole weights are gathered on the CPU of the first process, which tells the others.
    """
    found: dict[str, str] = {}
    # PyTorch moves only what is split, and only to where it is not.
    split = model.sharding_strategy is not ShardingStrategy.NO_SHARD
    offload = torch.cuda.is_available() and split
    with FSDP.summon_full_params(model, writeback=False, rank0_only=True, offload_to_cpu=offload):
        for name, backbone in backbones(model).items() if is_main_process() else ():
            tensors = identifying(backbone, frozen_tensors(backbone))
            # Copies: NumPy, which reads the bytes, would keep FSDP from letting the memory go.
            whole = [(whole_name(key), tensor.clone()) for key, tensor in tensors]
            found[whole_name(name)] = fingerprint(whole)
    told = [found]
    broadcast_object_list(told)
    return told[0]
