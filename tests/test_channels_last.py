"""A lean backbone runs on channels-last maps inside, and nobody outside can tell."""

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

import protune_mm
from protune_mm.lean import LeanOptions
from tests.conftest import EXAMPLES, flat, image
from tests.test_lean import assert_same, small, step, trained_like


@pytest.mark.parametrize('choice', [True, False])
@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_outputs_are_laid_out_as_stock(library, family, choice):
    x = image()
    stock = trained_like(library, family, False)
    lean = trained_like(library, family, dict(channels_last=choice))
    for a, b in zip(flat(stock(x)), flat(lean(x)), strict=True):
        assert a.stride() == b.stride()
    assert_same(step(stock, x), step(lean, x), 1e-5)  # float32


@pytest.mark.parametrize(('choice', 'inside'), [(None, True), (True, True), (False, False)])
def test_maps_inside(choice, inside):
    backbone = small(dict(channels_last=choice))
    seen = []
    backbone.layer2[1].conv1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))

    def watch(module, args, out):
        seen.append(out)
        out.register_hook(seen.append)

    backbone.layer2[0].register_forward_hook(watch)
    out = backbone(image())
    sum(o.sum() for o in out).backward()
    assert len(seen) == 3
    assert all(map_.is_contiguous(memory_format=torch.channels_last) == inside for map_ in seen)
    assert backbone.layer2[1].conv1.weight.is_contiguous()


def test_double_precision_stays_contiguous_by_default():
    backbone = small(True).double()
    seen = []
    backbone.layer1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    backbone(image().double())
    assert seen[0].is_contiguous()


@pytest.mark.parametrize('version', ['DCN', 'DCNv2'])
def test_operations_of_mmcv_get_contiguous_maps(version):
    """They read memory as if it were contiguous: DCNv2 is silently wrong on anything else."""
    results = []
    for lean in (False, dict(channels_last=True)):
        torch.manual_seed(0)
        dcn = dict(type=version, deform_groups=1, fallback_on_stride=False)
        backbone = MODELS.build(
            dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=50, base_channels=8,
                 stem_channels=8, dcn=dcn, stage_with_dcn=(False, True, True, True), lean=lean)
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for parameter in backbone.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        with torch.no_grad():  # mmcv has no gradient of them on the CPU.
            results.append(flat(backbone.train()(image(1, 128, 160))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32


def by_keyword(backbone, x):
    return backbone(x=x)


def compiled(backbone, x):
    return torch.compile(backbone, backend='eager')(x)


def traced(backbone, x):
    return torch.jit.trace(backbone, x)(x)


@pytest.mark.filterwarnings('ignore')  # PyTorch's compilers.
@pytest.mark.parametrize('how', [nn.Module.__call__, by_keyword, compiled, traced])
def test_a_detector_pools_the_same_regions(how):
    """RoIAlign reads memory as if it were contiguous."""
    from mmcv.ops import RoIAlign

    boxes = torch.tensor([[0, 4.0, 8.0, 60.0, 50.0], [1, 0.0, 0.0, 30.0, 30.0]])
    pool = RoIAlign(7, spatial_scale=1 / 4)
    x = image()
    with torch.no_grad():
        stock, lean = (
            pool(how(small(choice), x)[0], boxes) for choice in (False, dict(channels_last=True))
        )
    torch.testing.assert_close(stock, lean, rtol=1e-5, atol=1e-5)  # float32


class Viewing(nn.Module):
    """A user's backbone that takes a view which only contiguous maps allow."""

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.one(x)
        rows = x.view(x.shape[0], 8 * x.shape[2], x.shape[3])
        return (self.two(rows.view(x.shape) * 2),)


def test_a_users_own_backbone_has_to_ask(log):
    """It may call operations that read memory as if it were contiguous."""
    seen = []
    backbone = protune_mm.protune(Viewing(), stages=['one', 'two'])
    backbone.two.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    backbone(image())
    assert seen[0].is_contiguous()
    assert 'contiguous maps' not in log.text


def test_a_backbone_that_views_contiguous_memory(log):
    results = []
    for lean in (False, dict(channels_last=True)):
        torch.manual_seed(0)
        backbone = protune_mm.protune(Viewing(), stages=['one', 'two'], lean=lean).train()
        backbone.one.prompt.up.weight.data.fill_(0.1)
        results.append([step(backbone, image()) for _ in range(2)])
    assert log.text.count('runs on contiguous maps from now on') == 1
    for a, b in zip(*results, strict=True):
        assert_same(a, b, 1e-5)  # float32


@pytest.mark.parametrize('choice', ['yes', 2, []])
def test_unknown_choices(choice):
    with pytest.raises(ValueError, match=r'lean\.channels_last=.* is unknown: use True, False or'):
        protune_mm.protune(Viewing(), stages=['one'], lean=dict(channels_last=choice))


def test_the_default():
    assert LeanOptions().channels_last is None
