"""Every row of the stage table, in every library that has it: exact start, freeze, gradients."""

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

import protune_mm
from protune_mm.frozen import frozen_tensors, heads, prompts
from protune_mm.stages import FAMILIES
from tests.conftest import EVERY, build_protuned, build_stock, flat, move_prompts

every = pytest.mark.parametrize(('library', 'family'), EVERY)


@pytest.fixture(autouse=True)
def scope(request):
    """Some backbones build their layers through the default scope."""
    params = getattr(request.node, 'callspec', None)
    with DefaultScope.overwrite_default_scope(params.params['library'] if params else 'mmdet'):
        yield


def pictures(family, batch=2):
    return torch.randn(batch, *family.image, generator=torch.Generator().manual_seed(1))


def pair(library, family, lean, dtype=torch.float32):
    """A frozen stock backbone and a Pro-tuned one with the same weights, none of them zero."""
    torch.manual_seed(0)
    stock = build_stock(library, family)
    stock.requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in stock.state_dict().items():
        if not tensor.is_floating_point() or 'relative_coords' in name:
            continue
        if name.endswith('running_var'):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.abs().max() < 1e-3 or not torch.isfinite(tensor).all() or tensor.ndim > 1:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
    tuned = build_protuned(library, family, lean=lean)
    tuned.load_state_dict(stock.state_dict(), strict=family.name != 'SwinTransformerV2')
    stock.train(False)
    return stock.to(dtype), tuned.to(dtype).eval()


def outputs(backbone, x):
    torch.manual_seed(0)  # mmpretrain's reversible ViT seeds the generator itself.
    return flat(backbone(x))


@every
def test_the_start_is_that_of_the_stock_backbone(library, family):
    x = pictures(family)
    with torch.no_grad():
        for lean in (False, True):
            stock, tuned = pair(library, family, lean)
            expected, got = outputs(stock, x), outputs(tuned, x)
            assert [o.shape for o in expected] == [o.shape for o in got]
            for a, b in zip(expected, got, strict=True):
                assert torch.isfinite(a).all()
                if lean is False:
                    assert torch.equal(a, b)
                elif family.name not in DISCONTINUOUS:
                    assert (a - b).abs().max() <= 1e-4 * a.abs().max()  # float32


DISCONTINUOUS = ('Vig', 'PyramidVig')
"""They link nearest neighbours: rounding changes which, and so the output."""


@every
def test_gradient_reaches_every_prompt_and_nothing_frozen(library, family):
    _, tuned = pair(library, family, True)
    move_prompts(tuned)
    tuned.train()
    before = {name: tensor.clone() for name, tensor in frozen_tensors(tuned)}
    sum(o.square().sum() for o in outputs(tuned, pictures(family)) if o.requires_grad).backward()
    trained = {f'{n}.{k}' for n, m in heads(tuned).items() for k, _ in m.named_parameters()}
    trained |= set(protune_mm.tuned_parameters(tuned))
    unread = UNREAD.get(family.name, ())
    for name, parameter in tuned.named_parameters():
        reached = parameter.grad is not None and parameter.grad.abs().max() > 0
        assert reached == (name in trained and not name.startswith(unread)), name
    for name, tensor in frozen_tensors(tuned):
        assert torch.equal(tensor, before[name]), name


UNREAD = {'AlexNet': ('classifier',)}
"""Classifiers that the examples do not have or use."""


@every
def test_channels_are_what_the_blocks_yield(library, family):
    tuned = build_protuned(library, family)
    seen = {}
    for name, prompt in prompts(tuned).items():
        prompt.register_forward_hook(
            lambda _m, i, _o, name=name: seen.update({name: i[0].shape[1]})
        )
    with torch.no_grad():
        tuned(pictures(family, 1))
    assert len(prompts(tuned)) >= 3
    for name in prompts(tuned):
        site = tuned.get_submodule(name.removesuffix('.prompt'))._protune_site
        assert seen[name] == site.channels, name


@every
def test_stages_have_blocks_of_their_own(library, family):
    backbone = build_stock(library, family)
    blocks = [block for stage in family.split(backbone) for block in stage.blocks]
    assert len(set(blocks)) == len(blocks)
    for block in blocks:
        # It would run a child named `prompt`.
        assert type(backbone.get_submodule(block)) not in (nn.Sequential, nn.ModuleList), block


@every
def test_lean_layers_compute_the_same(library, family):
    # Two make a position embedding in float32, whatever their dtype.
    dtype, tolerance = (torch.float64, 1e-9)
    if family.name in ('EdgeNeXt', 'XCiT'):
        dtype, tolerance = torch.float32, 1e-3
    x = pictures(family).to(dtype)
    results = []
    for lean in (False, True):
        _, tuned = pair(library, family, lean, dtype)
        move_prompts(tuned)
        tuned.to(dtype).train()
        given = x.clone().requires_grad_()
        found = outputs(tuned, given)
        sum(o.square().sum() for o in found if o.requires_grad).backward()
        grads = [p.grad for p in protune_mm.tuned_parameters(tuned).values()]
        results.append(([o.detach() for o in found], [given.grad, *grads]))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert (a - b).abs().max() <= tolerance * a.abs().max()
    largest = max(g.norm() for g in results[0][1])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert (a - b).norm() <= 10 * tolerance * largest


def test_rows_have_names_and_examples_of_their_own():
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert all(family.examples for family in FAMILIES)
