"""Start, gradients, freeze, lean layers and size of every distinct backbone."""

from __future__ import annotations

import copy
import traceback

import torch
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.config import config_backbones
from protune_mm.stages import refusal
from protune_mm.tuned import frozen_tensors, heads

from .here import adapt
from .reading import load, plain, result, scope_name, scope_of, short, structure

LIMIT = 0.08
"""Part of a backbone's parameters that its prompts may have."""
SIZES = ((64, 96), (96, 160), (224, 224), (256, 256), (192, 192), (384, 384), (512, 512), (32, 32))
"""Heights and widths to try, in pixels: not square first, then the native sizes."""


def try_backbone(key: str) -> dict:
    """Start, gradients, freeze, lean layers and size of one distinct backbone."""
    _, file, name = key.split(' ')
    cfg = load(file)
    scope = scope_name(cfg, file)
    config = dict(config_backbones(cfg))[name]
    row = dict(type=plain(config['type']), structure=structure({**config, 'scope': scope}))
    config = dict(config_backbones(adapt(cfg)))[name]
    config.pop('init_cfg', None)
    try:
        with scope_of(scope):
            problem, facts = check(config)
    except Exception as error:
        if 'cannot be Pro-tuned' in str(error):
            return result(key, 'refused', short(error), **row)
        problem, facts = f'{short(error)}\n{traceback.format_exc(limit=-4)}', {}
        if isinstance(error, StockError):
            return result(key, 'stock fails', str(error), **row)
    return result(key, 'failed' if problem else 'ok', problem or '', **row, **facts)


class StockError(Exception):
    """The stock backbone does not run here."""


def stock_backbone(config: dict, scale: float = 1.0) -> nn.Module:
    """The backbone with weights that are the same each time, none of them uninitialized.

    Args:
        config: of the backbone.
        scale: factor on the scales of layers.
    """
    torch.manual_seed(0)
    try:
        backbone = MODELS.build(copy.deepcopy(config))
    except Exception as error:
        raise StockError(short(error)) from error
    draw(backbone, scale)
    backbone.train(False)
    return backbone.requires_grad_(False)


def draw(backbone: nn.Module, scale: float) -> None:
    """Weights, biases, scales and statistics that matter: none at the neutral value of a new layer.

    A new batch norm changes nothing but the scale, and a new layer scale of 1e-6 hides its block:
    mistakes in either would not show.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if parameter.ndim > 1:
            fan = max(1, parameter[0].numel())
            parameter.data.normal_(0, fan**-0.5, generator=generator)
        elif name.endswith('bias'):
            parameter.data.normal_(0, 0.1, generator=generator)
        else:
            parameter.data.uniform_(0.5, 1, generator=generator).mul_(scale)
    for name, buffer in backbone.named_buffers():
        if name.endswith('running_mean'):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith('running_var'):
            buffer.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith('weight_gamma'):  # ConvAWS: the size of weights of which it makes units.
            buffer.fill_(0.02)


def run(backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return flat(backbone(x))


def flat(out: object) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [t for part in out or () for t in flat(part)] if isinstance(out, list | tuple) else []


def picture(backbone: nn.Module, channels: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first image that the stock backbone takes, and what it returns."""
    native = getattr(backbone, 'img_size', None)
    sizes = list(SIZES)
    if native is not None:
        pair = tuple(native) if isinstance(native, list | tuple) else (int(native),) * 2
        sizes.insert(2, pair[-2:])
    errors = []
    for size in sizes:
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                out = run(backbone, x)
            if all(torch.isfinite(o).all() for o in out):
                return x, out
            errors.append('its output is not finite')
        except Exception as error:
            errors.append(short(error))
    raise StockError(f'takes none of the images tried: {errors[0]}')


def check(config: dict) -> tuple[str, dict]:
    """Problems of one backbone ('' for none), and facts about it."""
    try:
        return check_with(config, 1.0)
    except StockError:
        # Gates that multiply, one after the other, leave the range of numbers (MSCAN-L).
        return check_with(config, 0.1)


def check_with(config: dict, scale: float) -> tuple[str, dict]:
    """See :func:`check`; with a factor on the scales of layers."""
    stock = stock_backbone(config, scale)
    reason = refusal(type(stock))
    if reason:
        raise ValueError(f'{type(stock).__name__} cannot be Pro-tuned: {reason}')
    keys = set(stock.state_dict())
    total = sum(p.numel() for p in stock.parameters())
    gray = str(config['type']).endswith('LeNet5')
    x, expected = picture(stock, config.get('in_channels', 1 if gray else 3))
    facts = dict(size=list(x.shape[1:]), parameters=total)
    problems = []

    tuned = protune_mm.protune(stock, lean=False)
    with torch.no_grad():
        got = run(tuned.train(False), x)
    if [o.shape for o in got] != [o.shape for o in expected]:
        problems.append('outputs of other shapes than stock')
    elif not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        problems.append('with lean off the start is not that of the stock backbone')
    own = protune_mm.tuned_parameters(tuned)
    if keys & set(own):
        problems.append('a prompt has the name of a stock tensor')
    facts['prompts'] = sum(p.numel() for p in own.values()) / total
    if facts['prompts'] > LIMIT:
        problems.append(f'prompts have {facts["prompts"]:.1%} of the parameters')
    del tuned, stock

    lean = protune_mm.protune(stock_backbone(config, scale), lean=True).train(False)
    with torch.no_grad():
        got = run(lean, x)
    facts['lean_error'] = error = difference(expected, got)
    problems += check_training(lean, x)
    del lean  # Of the largest backbones there is room for one.
    facts['lean_dtype'], limit = 'float32', 1e-5
    if not error <= limit:
        # Rounding, or a mistake? In float64 the two tell themselves apart.
        try:
            facts['lean_error'] = error = double_error(config, scale, x.double())
            facts['lean_dtype'], limit = 'float64', 1e-9
        except RuntimeError:
            facts['lean_dtype'], limit = 'float32 only', 1e-3
    if not error <= limit:
        problems.append(f'lean layers differ by {error:.1e} in {facts["lean_dtype"]}')
    return '; '.join(problems), facts


@torch.no_grad()
def double_error(config: dict, scale: float, x: torch.Tensor) -> float:
    """Difference between lean and stock layers in float64."""
    backbone = stock_backbone(config, scale).double()
    exact = run(backbone, x)
    return difference(exact, run(protune_mm.protune(backbone, lean=True).train(False), x))


def difference(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference, as a part of the largest number of each output; NaN where one has it."""
    parts = [
        (a - b).abs().max() / a.abs().max().clamp_min(1e-30)
        for a, b in zip(expected, got, strict=True)
    ]
    return torch.stack(parts).max().item()  # Python's max passes over NaN.


def check_training(tuned: nn.Module, x: torch.Tensor) -> list[str]:
    """One step with prompts that matter: who got a gradient, and what moved."""
    generator = torch.Generator().manual_seed(2)
    own = protune_mm.tuned_parameters(tuned)
    for parameter in own.values():
        parameter.data.normal_(0, 0.1, generator=generator)
    tuned.train()
    before = {name: tensor.clone() for name, tensor in frozen_tensors(tuned)}
    trained = {f'{n}.{k}' for n, m in heads(tuned).items() for k, _ in m.named_parameters()}
    loss = sum(o.float().square().mean() for o in run(tuned, x) if o.requires_grad)
    loss.backward()
    problems = []
    for name, parameter in tuned.named_parameters():
        if name in own and (parameter.grad is None or not parameter.grad.any()):
            problems.append(f'no gradient at {name}')
        elif name not in own and name not in trained and parameter.grad is not None:
            problems.append(f'a gradient at {name}, which is frozen')
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1).step()
    tuned.train()
    moved = [n for n, t in frozen_tensors(tuned) if not torch.equal(t, before[n])]
    problems += [f'{name} moved' for name in moved]
    return problems[:3]
