"""Tokens become a map and tokens again without a mixed-up axis, for any input shape."""

import threading

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from protune_mm.features import Maps, Site, Tokens, _grid
from protune_mm.stages import FAMILIES
from protune_mm.tuned import prompts
from tests.conftest import EXAMPLES, build_protuned, flat, image

VIT = next(f for f in FAMILIES if f.name == 'VisionTransformer')
TOKEN_EXAMPLES = [p for p in EXAMPLES if isinstance(p.values[1].layout, Tokens)]


class Spy(nn.Module):
    """A prompt that keeps the map it was given and returns a function of position."""

    def __init__(self, change=lambda x: x):
        super().__init__()
        self.change = change
        self.seen = None

    def forward(self, x):
        self.seen = x.detach().clone()
        return self.change(x)


def coded_tokens(height, width, extra=0, channels=3):
    """Tokens whose channel 0 is their row, channel 1 their column; extra tokens are -1."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    code = torch.stack((rows, columns, torch.zeros_like(rows)), -1).reshape(1, -1, channels).float()
    return torch.cat((torch.full((1, extra, channels), -1.0), code), 1).repeat(2, 1, 1)


@pytest.mark.parametrize('extra', [0, 1, 2, 5])
def test_a_position_coded_map_keeps_rows_and_columns(extra):
    height, width = 4, 7
    spy = Spy()
    site = Site('s', 's', 3, Tokens(grid_argument=True), series=True, extra=extra)
    tokens = coded_tokens(height, width, extra)
    out = site.layout.join(site, spy, tokens, (None, (height, width)), {})
    assert spy.seen.shape == (2, 3, height, width)
    for row in range(height):
        for column in range(width):
            assert spy.seen[0, :2, row, column].tolist() == [row, column]
    assert torch.equal(out, tokens), 'series with an identity prompt gives the tokens back'


def test_a_shift_to_the_right_moves_columns_only():
    site = Site('s', 's', 3, Tokens(grid_argument=True), series=True)
    shift = Spy(lambda x: torch.roll(x, 1, dims=3))
    out = site.layout.join(site, shift, coded_tokens(3, 5), (), {'hw_shape': (3, 5)})
    grid = out[0].reshape(3, 5, 3)
    assert grid[1, :, 0].tolist() == [1, 1, 1, 1, 1]
    assert grid[1, :, 1].tolist() == [4, 0, 1, 2, 3]


def test_extra_tokens_come_first_and_stay_unless_the_head_reads_them_alone():
    tokens = coded_tokens(2, 3, extra=2)
    plus_one = Spy(torch.ones_like)
    for series in (False, True):
        for mode, expected in (
            ('keep', -1.0),
            ('map', 1.0 - (not series)),
            ('mean', 1.0 - (not series)),
        ):
            site = Site('s', 's', 3, Tokens(True), series, extra=2, extra_tokens=mode)
            out = site.layout.join(site, plus_one, tokens, (None, (2, 3)), {})
            assert torch.equal(out[:, :2], torch.full((2, 2, 3), expected)), (series, mode)
            base = torch.zeros_like(tokens[:, 2:]) if series else tokens[:, 2:]
            assert torch.equal(out[:, 2:], base + 1), (series, mode)


@pytest.mark.parametrize(('library', 'family'), TOKEN_EXAMPLES)
def test_the_grid_is_that_of_the_input(library, family):
    tuned = build_protuned(library, family)
    for height, width in ((64, 96), (96, 64), (64, 128)):
        shapes = []
        handles = [
            p.register_forward_hook(lambda _m, i, _o, to=shapes: to.append(i[0].shape[2:]))
            for p in prompts(tuned).values()
        ]
        tuned(image(1, height, width))
        for handle in handles:
            handle.remove()
        patches = [s for s in shapes if s != (1, 1)]
        ratio = {h * width == w * height for h, w in patches}
        assert ratio == {True}, f'{height}x{width} gave {patches}'


@pytest.mark.parametrize(('library', 'family'), TOKEN_EXAMPLES)
def test_a_prompt_at_one_place_shows_at_that_place(library, family):
    """The last prompt, made a delta at one patch, must move the output there and nowhere else."""
    more = dict(final_norm=False) if family is VIT else {}
    if library == 'mmpretrain' and family is VIT:
        more['out_type'] = 'featmap'
    tuned = build_protuned(library, family, **more)
    name = list(prompts(tuned))[-1]
    x = image(1, 64, 96)
    with torch.no_grad():
        before = flat(tuned(x))[-1]
    row, column = 1, 2

    def delta(x):
        out = torch.zeros_like(x)
        out[:, :, row, column] = torch.arange(x.shape[1]).float()
        return out

    tuned.get_submodule(name.removesuffix('.prompt')).prompt = Spy(delta)
    with torch.no_grad():
        moved = (flat(tuned(x))[-1] - before).abs().sum(1)[0]
    assert moved.nonzero().tolist() == [[row, column]]


@pytest.mark.parametrize('extra_tokens', ['map', 'mean'])
def test_a_head_that_reads_the_class_token_gives_the_last_prompt_a_gradient(extra_tokens):
    tuned = build_protuned('mmpretrain', VIT, prompt=dict(extra_tokens=extra_tokens)).train()
    tuned(image())[-1].square().mean().backward()
    last = list(prompts(tuned).values())[-1]
    assert last.up.weight.grad.abs().max() > 0
    assert [tuned.layers[i]._protune_site.extra_tokens for i in range(4)] == [
        'keep', 'keep', 'keep', extra_tokens,
    ]  # fmt: skip


def test_distillation_and_dropped_class_tokens_are_counted():
    arch = dict(embed_dims=32, num_layers=4, num_heads=4, feedforward_channels=64)
    cases = [
        (dict(base='mmpretrain.DistilledVisionTransformer', arch=arch, img_size=64), 2),
        (dict(base='mmpretrain.VisionTransformer', arch=arch, img_size=64), 1),
        (
            dict(
                base='mmpretrain.VisionTransformer',
                arch=arch,
                img_size=64,
                with_cls_token=False,
                out_type='featmap',
            ),
            0,
        ),
        (
            dict(
                base='mmseg.VisionTransformer',
                img_size=64,
                embed_dims=32,
                num_layers=4,
                num_heads=4,
                with_cls_token=False,
            ),
            0,
        ),
    ]
    for config, extra in cases:
        tuned = MODELS.build(dict(type='protune_mm.ProTuned', **config))
        assert tuned.layers[3]._protune_site.extra == extra, config
        tuned(image())


def test_threads_with_different_shapes_do_not_mix():
    tuned = build_protuned('mmseg', VIT)
    shapes = [(64, 96), (96, 64), (64, 64), (32, 128)] * 4
    expected = [flat(tuned(image(1, *s)))[-1] for s in shapes]
    got = [None] * len(shapes)

    def work(i):
        got[i] = flat(tuned(image(1, *shapes[i])))[-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shapes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert torch.equal(a, b), shapes[i]


def test_a_wrong_grid_and_a_missing_one_are_errors():
    site = Site('layers.3', 'layers.3', 3, Tokens(grid_argument=False))
    _grid.set(None)
    with pytest.raises(RuntimeError, match=r"stage 'layers.3': no patch grid"):
        site.layout.join(site, Spy(), coded_tokens(2, 3), (), {})
    _grid.set((2, 4))
    with pytest.raises(RuntimeError, match='6 tokens, but 0 extra tokens and a grid of 2x4'):
        site.layout.join(site, Spy(), coded_tokens(2, 3), (), {})
    _grid.set(None)


def test_an_output_of_the_wrong_kind_is_an_error_that_names_the_stage():
    with pytest.raises(TypeError, match=r"stage 'layer1' yields a tuple"):
        Maps().join(Site('layer1', 'layer1.0', 3, Maps()), Spy(), (torch.zeros(1),), (), {})
    with pytest.raises(TypeError, match=r'yields a tensor of shape \(2, 3\)'):
        Maps().join(Site('layer1', 'layer1.0', 3, Maps()), Spy(), torch.zeros(2, 3), (), {})
