"""The documents tell the truth: their diffs work, their paths exist."""

import re
import textwrap

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, DefaultScope

import protune_mm
from protune_mm import stages
from protune_mm.registry import PROMPTS
from protune_mm.stages import maps
from tests.conftest import ROOT, flat, image

DOCS = [ROOT / 'README.md', *sorted((ROOT / 'docs').rglob('*.md'))]


def added(document, start, stop=None):
    """Lines a document's diff adds, from the line after ``start`` on."""
    text = (ROOT / 'docs' / document).read_text()
    body = text[text.index(start) + len(start) :]
    body = body[: body.index(stop)] if stop else body
    return '\n'.join(line[1:] for line in body.splitlines() if re.match(r'\+(?!\+\+)', line))


def test_the_prompt_of_the_document_works():
    code = added(
        'add_a_prompt.md', '+++ b/protune_mm/prompts/channel.py', '--- a/protune_mm/prompts'
    )
    scope = {'__name__': 'protune_mm.prompts.channel', '__package__': 'protune_mm.prompts'}
    exec(compile(code, 'channel.py', 'exec'), scope)
    try:
        tuned = MODELS.build(
            dict(
                type='protune_mm.ProTuned',
                base='mmdet.ResNet',
                depth=18,
                prompt=dict(type='ChannelPrompt'),
            )
        )
        sum(o.mean() for o in flat(tuned(image()))).backward()
        assert all(p.grad is not None for p in protune_mm.tuned_parameters(tuned).values())
        assert len(protune_mm.tuned_parameters(tuned)) == 4
    finally:
        PROMPTS._module_dict.pop('ChannelPrompt')


@pytest.mark.parametrize('document', ['add_a_prompt.md', 'add_a_backbone.md'])
def test_the_diff_of_the_document_fits(document):
    """What a diff leaves or takes away is in the file, line by line."""
    text = (ROOT / 'docs' / document).read_text()
    hunks = 0
    for name, hunk in re.findall(r'^\+\+\+ b/(\S+)\n@@.*\n((?:(?!--- )[ +-].*\n|\n)*)', text, re.M):
        old = [line[1:] for line in hunk.split('\n') if line[:1] in (' ', '-')]
        if old:
            hunks += 1
            assert '\n'.join(old) in (ROOT / name).read_text(), name
    assert hunks


def test_the_backbone_row_of_the_document_works(monkeypatch):
    code = added('add_a_backbone.md', 'MAPS: tuple[Family, ...] = (', "'ResNet',")
    scope = dict(vars(maps))
    row = eval(code.strip().rstrip(','), scope)
    monkeypatch.setattr(stages, 'FAMILIES', (*stages.FAMILIES, row))
    config = dict(row.examples['mmpretrain'])
    kind = f'mmpretrain.{config.pop("type")}'
    torch.manual_seed(0)
    stock = MODELS.build(dict(type=kind, **config))
    stock.eval()
    stock.requires_grad_(False)
    tuned = dict(type='protune_mm.ProTuned', base=kind, lean=False, **config)
    tuned = MODELS.build(tuned).eval()
    tuned.load_state_dict(stock.state_dict())
    for a, b in zip(flat(stock(image())), flat(tuned(image())), strict=True):
        assert torch.equal(a, b)
    assert len(protune_mm.tuned_parameters(tuned)) == 24


def anchors(path):
    """What links to headings of a document are called, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', DOCS, ids=lambda p: p.name)
def test_links_and_paths_exist(path):
    text = path.read_text()
    for link, anchor in re.findall(r'\]\(([^)#:]*)#?([^)#:]*)\)', text):
        target = path.parent / link if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f'{link}#{anchor}'
    if path.name == 'coverage.md':
        return  # It quotes messages with paths of other projects.
    for name in re.findall(r'`?((?:tools|configs|tests|docs|protune_mm)/[\w./-]+\.\w+)', text):
        if name != 'protune_mm/prompts/channel.py':  # Added by the diff of add_a_prompt.md.
            assert (ROOT / name).exists(), name


def blocks(document, word):
    """The Python of a document that has a word."""
    text = (ROOT / document).read_text()
    # In a list they are indented.
    every = [
        textwrap.dedent(code)
        for _, code in re.findall(r'^( *)```python\n(.*?)^\1```', text, re.M | re.S)
    ]
    found = [code for code in every if word in code]
    assert found, (document, word)
    return found


def test_the_configs_of_the_guide_train_what_it_says(tmp_path):
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    folder = tmp_path / 'mine'
    folder.mkdir()
    (warmup,) = blocks('docs/choosing.md', 'PromptWarmup')
    schedulers = {}
    exec(warmup, schedulers)
    for i, code in enumerate(blocks('docs/choosing.md', 'backbone=dict(')):
        path = folder / f'config{i}.py'
        path.write_text(code)
        cfg = protune_mm.load_config(path)
        assert cfg.runner_type == 'protune_mm.ProTuneRunner'
        assert cfg.optim_wrapper.optimizer.type == 'AdamW'
        # The weights are elsewhere; that they are asked for is what counts.
        assert cfg.model.backbone.pop('init_cfg').checkpoint
        cfg.model.backbone.require_weights = False
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            tuned = MODELS.build(cfg.model.backbone)
            optimizer = build_optim_wrapper(
                tuned,
                {**cfg.optim_wrapper, 'constructor': 'protune_mm.ProTuneOptimWrapperConstructor'},
            )
        for scheduler in schedulers['param_scheduler']:
            PARAM_SCHEDULERS.build({**scheduler, 'optimizer': optimizer})
        tuned(image())  # The first batch, which the start reads.
        sum(o.mean() for o in flat(tuned(image()))).backward()
        prompts = protune_mm.tuned_parameters(tuned)
        # Blocks of MobileNetV2; two convolutions with biases train.
        assert len(prompts) == 17 * 4
        assert all(p.grad is not None for p in prompts.values())


def test_the_configs_of_the_readme_train_their_prompts(tmp_path):
    codes = blocks('README.md', '_base_ = ')
    assert len(codes) == 3
    for i, code in enumerate(codes):
        path = tmp_path / f'config{i}.py'
        path.write_text(code)
        cfg = protune_mm.load_config(path)
        cfg.model.backbone.pop('init_cfg', None)  # The weights are elsewhere.
        cfg.model.backbone.require_weights = False
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            tuned = MODELS.build(cfg.model.backbone)
        # None at a rate for a training from scratch: MobileNetV2's is 0.045 for 256 images.
        assert cfg.optim_wrapper.optimizer.lr <= 0.02
        tuned(image())
        sum(o.mean() for o in flat(tuned(image()))).backward()
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
        prompts = protune_mm.tuned_parameters(tuned)
        assert prompts
        assert trained == set(prompts)
        assert all(p.grad is not None for p in prompts.values())


def test_the_data_sets_of_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')

    def load(word):
        (code,) = blocks('docs/choosing.md', word)
        path = tmp_path / 'mine.py'
        path.write_text(code)
        return protune_mm.load_config(path)

    few = load('protune_mm.FewLabels').train_dataloader.dataset
    assert (few.type, few.fraction, few.dataset.type) == (
        'protune_mm.FewLabels',
        0.1,
        'CocoDataset',
    )
    assert few.dataset.pipeline[-1].type == 'PackDetInputs'
    for name in ('common daisy', 'roses', 'weeds'):
        folder = tmp_path / 'data/other' / name
        folder.mkdir(parents=True)
        cv2.imwrite(str(folder / 'a.jpg'), np.zeros((40, 40, 3), np.uint8))
    cfg = load('protune_mm.ClassMap')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        mapped = DATASETS.build(cfg.test_dataloader.dataset)
        Evaluator(cfg.test_evaluator)
    assert [mapped[i]['data_samples'].gt_label.item() for i in range(len(mapped))] == [0, 2]


def test_the_study_of_the_guide_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from study_parts.plan import Study

    (code,) = blocks('docs/choosing.md', 'methods = ')
    path = tmp_path / 'my_study.py'
    path.write_text(code)
    assert len(Study(str(path)).runs()) == 4 * 3 * 3
