"""tools/study.py: the same steps and grid for all, resumed at any run, picked by validation."""

import importlib
import json
import math
import platform
import shutil
from copy import deepcopy
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from protune_mm.compat import processor, stack_versions
from protune_mm.datasets.rest import check_rest
from protune_mm.optim import wrap_constructor
from tests.conftest import ROOT, run_tool
from tests.small_runs import CLS

STUDY = """
methods = {methods}
lrs = [1e-3, {other}]
seeds = [0]
tasks = dict(
    small=dict(
        config={config!r}, backbone='ResNet', metrics=['accuracy/top1'], fractions={fractions},
        steps=3,
    ),
)
options = dict(ResNet=dict(lora=dict(prompt=dict(rank=1))))
"""


SPLITS = """
train_dataloader['dataset'] = dict(dataset, indices=[0, 1, 2, 3, 9, 10, 11, 12])
val_dataloader['dataset'] = dict(dataset, indices=[4, 5, 13, 14])
test_dataloader = dict(val_dataloader, dataset=dict(dataset, indices=[6, 7, 8, 15, 16, 17]))
"""


@pytest.fixture
def study(tmp_path, pictures):
    config = tmp_path / 'classifier.py'
    for copy in 'xyz':  # Nine images of each of two classes.
        for picture in (pictures / 'classes').glob('*/*.png'):
            folder = tmp_path / 'classes' / picture.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, folder / f'{copy}{picture.name}')
    text = CLS.format(root=str(tmp_path / 'classes'))
    config.write_text(f'{text}{SPLITS}')
    # What a stock config without a test split has.
    (tmp_path / 'one_split.py').write_text(text)

    def write(methods=('lora', 'full'), other=1e-2, fractions=(1.0,), **change):
        text = STUDY.format(
            methods=list(methods), other=other, fractions=list(fractions), config=str(config)
        )
        for old, new in change.items():
            text = text.replace(old, new)
        (tmp_path / 'study.py').write_text(text)
        return tmp_path / 'study.py'

    return write


def run(file, out, *more, check=True):
    return run_tool('tools/study.py', file, '--out', out, '--jobs', 1, *more, check=check)


def rates_in_backbone(cfg, lr):
    """What the optimizer makes of it: the rates of what trains in the backbone, as parts of one."""
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, wrap_constructor(cfg.optim_wrapper))
    return {
        round(group['lr'] / lr, 6)
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
        if any(parameter is p for p in model.backbone.parameters() if p.requires_grad)
    }


def read(out):
    return [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]


KEYS = {
    'method', 'task', 'backbone', 'fraction', 'seed', 'lr', 'steps', 'metric', 'score', 'val_score',
    'diverged', 'trainable_backbone', 'backbone_parameters', 'peak_memory', 'wall_s', 'command',
    'versions', 'setting', 'step_s', 'processor',
}  # fmt: skip


def test_a_study_runs_and_goes_on_where_it_was(study, tmp_path):
    # A rate at which the loss of full fine-tuning is no number after a step or two.
    file, out = study(other=1e30, fractions=(1.0, 0.5)), tmp_path / 'out'
    all_labels = ('--fraction', 1)
    run(file, out, *all_labels)
    rows = read(out)
    assert len(rows) == 4
    assert all(set(row) >= KEYS for row in rows)
    by_run = {(row['method'], row['lr']): row for row in rows}
    assert {row['steps'] for row in rows} == {3}
    lora, full = by_run['lora', 1e-3], by_run['full', 1e-3]
    assert 0 < lora['trainable_backbone'] < 0.02 * lora['backbone_parameters']
    assert full['trainable_backbone'] == full['backbone_parameters'] == lora['backbone_parameters']
    assert 0 < lora['peak_memory'] < full['peak_memory']
    wild = by_run['full', 1e30]
    assert (wild['diverged'], wild['score'], wild['val_score']) == (True, 0.0, 0.0)
    assert not full['diverged']
    text = (out / 'README.md').read_text()
    assert '## small, 100% of the labels' in text
    assert '| 2 (1) |' in text, 'the run that diverged is counted'

    # Cut off in the middle of a line.
    whole = (out / 'results.jsonl').read_text()
    (out / 'results.jsonl').write_text(whole[:-30])
    again = run(file, out, *all_labels)
    assert '[1/1, 0 min left]' in again.stdout
    last = json.loads(whole.splitlines()[-1])
    new = read(out)[-1]
    assert {k: new[k] for k in KEYS - {'wall_s'}} == {k: last[k] for k in KEYS - {'wall_s'}}


@pytest.mark.parametrize(
    ('weight', 'error', 'diverged'),
    [(float('nan'), None, True), (float('nan'), KeyError, True), (0.0, KeyError, False)],
)
def test_weights_that_are_no_numbers_are_a_divergence(
    study, parts, monkeypatch, weight, error, diverged
):
    """After the last step, too, and where something else fails because of them."""

    def break_it(hook, runner, *args, **kwargs):
        if runner.iter == 2:
            next(p for p in runner.model.parameters() if p.requires_grad).data[0] = weight
            if error:
                raise error('a mistake')

    training = parts['training']
    monkeypatch.setattr(training.logging, 'disable', lambda level: None)
    monkeypatch.setattr(training.StopWhenDiverged, 'after_train_iter', break_it)
    file = str(study())
    if not diverged:
        with pytest.raises(KeyError, match='a mistake'):
            training.train(file, 'small lora 1 0.001 0')
        return
    done = training.train(file, 'small lora 1 0.001 0')
    assert done['status'] == 'diverged'
    assert (done['lines'][0]['diverged'], done['lines'][0]['score']) == (True, 0.0)


def test_one_run_by_its_command(study, tmp_path):
    file = study(fractions=(0.5,))
    done = run_tool('tools/study.py', file, '--run', 'small pro-tuning 0.5 0.001 0')
    row = json.loads(done.stdout.strip().splitlines()[-1])
    assert (row['method'], row['fraction'], row['lr']) == ('pro-tuning', 0.5, 1e-3)
    assert row['command'].endswith('--run "small pro-tuning 0.5 0.001 0"')


def test_scenarios(study):
    pytest.importorskip('imagecorruptions', reason='requirements/robustness.txt')
    pytest.importorskip('torchattacks', reason='requirements/robustness.txt')
    more = (
        'long_tail=2, steps=3, scenarios=dict(every=2, severities=[1], attacks=dict(fgsm=[0, 1]), '
        "shifts=dict(grey=[dict(type='RandomGrayscale', prob=1.0, keep_channels=True)]))"
    )
    file = study(**{'steps=3': more})
    done = run_tool('tools/study.py', file, '--run', 'small lora 1 0.001 0')
    rows = {r['metric']: r for r in map(json.loads, done.stdout.strip().splitlines()[-5:])}
    assert set(rows) == {
        'accuracy/top1',
        'shifted, grey',
        '100 - mCE, severity 1',
        'fgsm, 0/255',
        'fgsm, 1/255',
    }
    assert len({row['val_score'] for row in rows.values()}) == 1, 'of clean images'
    assert rows['fgsm, 1/255']['score'] <= rows['fgsm, 0/255']['score']
    assert 0 <= rows['100 - mCE, severity 1']['score'] <= 100


@pytest.mark.parametrize(
    ('change', 'more', 'message'),
    [
        (dict(methods=('lora', 'lorra')), (), "method 'lorra' is unknown: use full, head-only"),
        (dict(seeds='sets'), (), 'has no `seeds`'),
        (dict(classifier='clasifier'), (), "task 'small' has no config"),
        (dict(), ('--method', 'mona'), '--method mona: '),
        (dict(), ('--fraction', '0.5'), 'study.py has 1.0'),
        (dict(), ('--run', 'small lora'), "'small lora' names no run: use"),
        (dict(), ('--run', 'small lora 7 0.1 0'), "'small lora 7 0.1 0' names no run: use"),
        (dict(), ('--run', 'small lora nan 0.1 0'), 'names no run: use'),
        (dict(), ('--run', 'small lorra 1 0.1 0'), 'has the tasks small; methods are full,'),
        (dict(), ('--jobs', '0'), '--jobs 0: at least one run has to go on'),
        (dict(classifier='one_split'), ('--run', 'small lora 1 0.1 0'), 'give them images of'),
        (dict(classifier='one_split'), (), 'give them images of'),
        (
            {'steps=3': 'steps=3, validate_on_rest=True', '[1.0]': '[0.9]'},
            (),
            "task 'small', fraction 0.9, seed 0: fraction=0.9 (rest) leaves none of 8 images",
        ),
        (
            {'steps=3': 'steps=3, scenarios=dict(attacks=dict(autoattack=[1]))'},
            ('--run', 'small lora 1 0.1 0'),
            'autoattack needs at least 4 classes; there are 2',
        ),
        (
            {
                'steps=3': 'steps=3, scenarios=dict(every=2, severities=[1]), cfg_options={'
                "'test_dataloader.dataset': dict(_delete_=True, type='protune_mm.FewLabels', "
                'dataset={})}'
            },
            (),
            'scenarios.every=2 is for a plain test data set, not for protune_mm.FewLabels around',
        ),
        (
            {
                'steps=3': 'steps=3, scenarios=dict(every=2, severities=[1]), '
                "cfg_options={'test_dataloader.dataset.indices': -6}"
            },
            (),
            'scenarios.every=2 cannot count from the end: give the test data set a list in place',
        ),
        (
            {'options = dict(ResNet': 'variants = dict(lora'},
            (),
            "variant 'lora' has the name of a method",
        ),
    ],
)
def test_bad_input(study, tmp_path, change, more, message):
    done = run(study(**change), tmp_path / 'out', *more, check=False)
    assert done.returncode
    assert message in done.stderr
    assert 'Traceback' not in done.stderr
    assert 'runs failed' not in done.stderr, 'told before the first run'
    assert not list((tmp_path / 'out').glob('*'))


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        ('steps=3,', '', "task 'small' has no `steps`: a task has config, backbone, metrics"),
        ('steps=3,', 'steps=1,', "task 'small': steps=1 leaves no step after the warm-up"),
        ('steps=3,', 'steps=3, stepz=4,', "task 'small' has `stepz`, which is unknown"),
        ('steps=3,', 'steps=3, seeds=[],', "task 'small': seeds=[]: use different whole numbers"),
        ('seeds = [0]', 'seeds = [0, 0]', 'study.py: seeds=[0, 0]: use different whole numbers'),
        ('[1.0]', '[1.5]', "task 'small': fraction 1.5 is no part of the labels"),
        ('seeds = [0]', "seeds = [0]; variants = {'my lora': {}}", "'my lora' has a space"),
        ('steps=3,', 'steps=3, lrs=[],', "task 'small': lrs=[] is no grid of learning rates"),
        ('steps=3,', 'steps=3, lrs=[1e-3, 0.001],', 'lrs=[0.001, 0.001] names one twice'),
        ('steps=3,', 'steps=3, lrs=[(1e-3,)],', "task 'small': lrs=[(0.001,)] is no grid of"),
        ('steps=3,', 'steps=3, lrs=[(1e-3, 0)],', "task 'small': lrs=[(0.001, 0)] is no grid of"),
        ('steps=3,', 'steps=3, lrs=[1e-3, (1e-3, 1)],', 'names one twice'),
        ('[1.0]', '[1.0, 1]', 'fractions=[1.0, 1] names one twice'),
        ('steps=3,', 'steps=3, full_lr_mult=0,', "task 'small': full_lr_mult=0 is no factor"),
        ('steps=3,', "steps=3, methods=['lorra'],", "task 'small': method 'lorra' is unknown"),
        ('steps=3,', 'steps=3, options=dict(lorra={}),', "options: method 'lorra' is unknown"),
        ("backbone='ResNet'", "backbone='Resnet'", "options has none for backbone='Resnet'"),
        ('(lora=dict(', '(lorra=dict(', "options of 'ResNet': method 'lorra' is unknown"),
        ('steps=3,', 'steps=3, scenarios=None,', 'scenarios=None: use a dict'),
        ('steps=3,', 'steps=3, scenarios=dict(severity=[3]),', 'scenarios.severity is unknown'),
        ('steps=3,', 'steps=3, scenarios=dict(severities=[6]),', 'severities has 6: use 1 to 5'),
        ('steps=3,', 'steps=3, scenarios=dict(attacks=dict(pgm=[1])),', "'pgm' is unknown"),
        ('steps=3,', 'steps=3, scenarios=dict(attacks=dict(pgd=[2, 1])),', 'do not grow from 0'),
        (
            "metrics=['accuracy/top1']",
            "metrics=['mIoU'], scenarios=dict(attacks=dict(pgd=[1]))",
            'attacks are for classifiers; mIoU is no accuracy',
        ),
        ('steps=3,', 'steps=3, validate_on_rest=True, long_tail=2,', 'without a long tail'),
        ('steps=3,', 'steps=3, lrs=1e-3,', "task 'small': lrs=0.001 is no list: use [0.001]"),
        ('seeds = [0]', 'seeds = 0', 'study.py: seeds=0 is no list: use [0]'),
        ('[1.0]', '1.0', "task 'small': fractions=1.0 is no list: use [1.0]"),
        ("['accuracy/top1']", "'mIoU'", "task 'small': metrics='mIoU' is no list: use ['mIoU']"),
        ("['accuracy/top1']", '[]', "task 'small': metrics=[] names none"),
        ("['accuracy/top1']", "['mIoU', 'mIoU']", "metrics=['mIoU', 'mIoU'] names one twice"),
        ("['accuracy/top1']", "['rmse']", "task 'small': metric 'rmse' is better where it"),
        ('steps=3,', 'steps=3, scenarios=dict(severities=3),', 'severities=3 is no list: use [3]'),
        ('steps=3,', 'steps=3, scenarios=dict(every=0),', 'every=0: use a whole number from 1'),
        ('steps=3,', 'steps=3, scenarios=dict(every=1.5),', 'every=1.5: use a whole number from 1'),
        ('steps=3,', 'steps=3, scenarios=dict(shifts=[1]),', 'shifts=[1]: use a dict by name'),
        (
            'steps=3,',
            "steps=3, scenarios=dict(shifts=dict(g=dict(type='Invert'))),",
            "shifts.g={'type': 'Invert'} is no list",
        ),
    ],
)
def test_bad_tasks(study, tmp_path, old, new, message):
    done = run(study(**{old: new}), tmp_path / 'out', check=False)
    assert message in done.stderr
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ("scenarios=dict(shifts=dict(g=[dict(type='Invrt')]))", 'shifts.g: .*Invrt'),
        ("scenarios=dict(shifts=dict(g=[dict(type='Rotate', angel=3)]))", 'shifts.g: .*angel'),
        ('scenarios=dict(shifts=dict(g=[1]))', 'shifts.g: 1: '),
        (
            "scenarios=dict(severities=[1]), cfg_options={'test_dataloader.dataset.pipeline': []}",
            'has no `pipeline`',
        ),
        (
            "validate_on_rest=True, cfg_options={'val_dataloader.dataset': dict(_delete_=True, "
            "type='ConcatDataset', datasets=[])}",
            'validate_on_rest is for a plain data set, and the val split is ConcatDataset',
        ),
    ],
)
def test_what_the_scenarios_need_is_looked_at_before_the_first_run(study, parts, more, message):
    plan = parts['plan'].Study(str(study(**{'steps=3,': f'steps=3, {more},'})))
    with pytest.raises(ValueError, match=f"task 'small': .*{message}"):
        parts['data_checks'].check_ready(plan, ['small'])


@pytest.mark.parametrize(
    ('scenarios', 'message'),
    [
        ('severities=[2]', 'severities: the first test image: ValueError: an image has 16x20 pix'),
        (
            "shifts=dict(flat=[dict(type='Collect', keys=['depth'])])",
            "shifts.flat: the first test image: KeyError: 'depth'",
        ),
    ],
)
def test_the_first_image_is_changed_as_the_scenarios_ask(
    study, parts, tmp_path, scenarios, message
):
    pytest.importorskip('imagecorruptions', reason='requirements/robustness.txt')
    for picture in (tmp_path / 'classes').glob('*/*.png'):
        cv2.imwrite(str(picture), np.zeros((16, 20, 3), np.uint8))
    change = {'steps=3,': f'steps=3, scenarios=dict({scenarios}),'}
    plan = parts['plan'].Study(str(study(**change)))
    with pytest.raises(ValueError, match=rf"^task 'small', [^:]*: scenarios.{message}"):
        parts['data_checks'].check_data(plan, plan.runs()[:1])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(classifier='one_split'), '18 of 18 images of its val split are in its train split'),
        (
            {'steps=3,': "steps=3, cfg_options={'val_dataloader.dataset.indices': [4, 6, 13]},"},
            '1 of 6 images of its test split are in its val split',
        ),
        (
            {'steps=3,': "steps=3, cfg_options={'train_dataloader.dataset.indices': [4, 13]},"},
            '2 of 4 images of its val split are in its train split',
        ),
    ],
)
def test_no_image_is_in_two_splits(study, parts, change, message):
    check_data = parts['data_checks'].check_data
    plan = parts['plan'].Study(str(study(**change)))
    with pytest.raises(ValueError, match=rf"^task 'small', [^:]+: {message}: give them"):
        check_data(plan, plan.runs()[:1])
    plan = parts['plan'].Study(str(study()))
    check_data(plan, plan.runs()[:1])


def test_an_image_is_the_same_by_another_path(study, parts, tmp_path):
    (tmp_path / 'link').symlink_to(tmp_path / 'classes')
    options = "'val_dataloader.dataset.indices': [0], 'val_dataloader.dataset.data_root': 'LINK'"
    options = options.replace('LINK', str(tmp_path / 'link'))
    plan = parts['plan'].Study(str(study(**{'steps=3,': f'steps=3, cfg_options={{{options}}},'})))
    with pytest.raises(ValueError, match='1 of 1 images of its val split are in its train split'):
        parts['data_checks'].check_data(plan, plan.runs()[:1])


def test_images_that_cannot_be_told_apart_are_an_error(parts):
    image_of = parts['data_checks']._image_of
    assert image_of(dict(img=torch.ones(2, dtype=torch.uint8)), 'val') == b'\1\1'
    with pytest.raises(ValueError, match='of its val split have neither img_path nor img, so'):
        image_of(dict(video_path='a.mp4'), 'val')


def test_a_metric_that_is_not_there_is_no_divergence(study, tmp_path):
    file = study(methods=('head-only',), **{'accuracy/top1': 'accuracy/top7'})
    done = run(file, tmp_path / 'out', check=False)
    told = "error: task 'small': no score accuracy/top7: there are accuracy/top1"
    assert done.stderr.strip().splitlines()[-1].startswith(told)
    assert 'Traceback' not in done.stderr
    assert '[1/2' not in done.stdout, 'the other run would train for nothing'
    assert not (tmp_path / 'out' / 'results.jsonl').exists()


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    names = (
        'cells', 'claim', 'data_checks', 'plan', 'plots', 'report', 'run_config', 'runs',
        'scenarios', 'training',
    )  # fmt: skip
    return {name: importlib.import_module(f'study_parts.{name}') for name in names}


def test_a_detector_that_finds_nothing_has_score_0(parts):
    from mmdet.evaluation import CocoMetric, VOCMetric

    run = parts['plan'].Run('t', 'full', 1.0, 1e-3, 0)
    coco = CocoMetric(metric='bbox')

    def score(found, metric, *metrics):
        return parts['scenarios'].score(found, metric, run, metrics or [coco])

    assert score({}, 'coco/bbox_mAP') == 0
    assert score({'100 - mCE, severity 3': 1.0}, 'coco/bbox_mAP') == 0
    assert score({'coco/bbox_mAP': 0.5}, 'coco/bbox_mAP') == 0.5
    assert score({}, 'coco/AR@100', CocoMetric(metric='proposal')) == 0
    assert score({}, 'lvis/bbox_AP', CocoMetric(metric='bbox', prefix='lvis')) == 0
    # One of the sets of MMDetection's MultiDatasetsEvaluator.
    assert score({'b/coco/bbox_mAP': 0.1}, 'a/coco/bbox_mAP') == 0
    for found in ({'coco/bbox_mAP': 0.5}, {'coco/segm_mAP': float('nan')}):
        with pytest.raises(ValueError, match='no score coco/segm_mAP'):
            score(found, 'coco/segm_mAP')
    with pytest.raises(ValueError, match='no score mIoU'):
        score({}, 'mIoU')
    # Another reason that it is not there.
    for found, metric in (
        ({}, CocoMetric(metric='segm')),
        ({'val/bbox_mAP': 0.5}, CocoMetric(metric='bbox', prefix='val')),
        ({'pascal_voc/mAP': 0.5}, VOCMetric()),
        ({}, CocoMetric(metric='bbox', format_only=True, outfile_prefix='x')),
    ):
        with pytest.raises(ValueError, match='no score coco/bbox_mAP'):
            score(found, 'coco/bbox_mAP', metric)


def test_images_that_are_left_out_do_not_count_as_missed(parts):
    config_of, check = parts['run_config'].config_of, parts['data_checks'].check_evaluators
    tasks = dict(
        config='configs/small/retinanet_protune_mobilenetv2_fruit.py', backbone='B', steps=2,
        metrics=['coco/bbox_mAP'], fractions=[1.0],
    )  # fmt: skip
    where = 'test_dataloader.dataset'
    keys = f'{where}.pipeline.3.meta_keys'

    def config(**options):
        whole = dict(tasks, cfg_options=options)
        plan = Mock(tasks=dict(t=whole), backbone_options=lambda *_: {})
        return config_of(plan, parts['plan'].Run('t', 'full', 1.0, 1e-3, 0), '')

    cfg = config()
    assert cfg.test_evaluator.ann_file.endswith('test.json')
    check(cfg, 1)
    cfg = config(**{f'{where}.indices': [0, 3]})
    assert cfg.test_evaluator.ann_file is None
    check(cfg, 1)
    # The boxes are then those that come with the images.
    for every, options in ((1, {f'{where}.indices': [0, 3]}), (2, {})):
        with pytest.raises(ValueError, match=r"test split .* 'instances' to the meta_keys"):
            check(config(**options, **{keys: ('img_id',)}), every)
    check(config(**{keys: ('img_id',)}), 1)


def test_a_part_of_a_set_whose_rest_validates(parts):
    """As configs/transfer have it: what a study leaves out is inside what they train on."""
    task = dict(
        config='configs/transfer/resnet50_protune_pets.py', backbone='B', steps=2,
        metrics=['accuracy/top1'], fractions=[0.2],
    )  # fmt: skip
    plan = Mock(tasks=dict(t=task), backbone_options=lambda *_: {})
    cfg = parts['run_config'].config_of(plan, parts['plan'].Run('t', 'full', 0.2, 1e-3, 1), '')
    check_rest(cfg.train_dataloader, cfg.val_dataloader)


def test_a_study_refuses_before_the_first_run_what_a_run_would(study, parts, tmp_path):
    (tmp_path / 'parts.py').write_text(
        "_base_ = ['./classifier.py']\n"
        "few = dict(_delete_=True, type='protune_mm.FewLabels', dataset=_base_.dataset)\n"
        'train_dataloader = dict(dataset=dict(few, fraction=0.9, seed=1))\n'
        'val_dataloader = dict(dataset=dict(few, fraction=0.5, rest=True))\n'
    )
    plan = parts['plan'].Study(str(study(classifier='parts')))
    with pytest.raises(ValueError, match=r"^task 'small', .*: val_dataloader has the rest of frac"):
        parts['data_checks'].check_data(plan, plan.runs()[:1])


def test_a_run_begins_anew(study, parts, tmp_path):
    """Whatever its config, perhaps one that a training has left, did."""
    config = tmp_path / 'dumped.py'
    config.write_text("_base_ = ['./classifier.py']\nresume = True\nload_from = 'detector.pth'\n")
    plan = parts['plan'].Study(str(study(classifier='dumped')))
    cfg = parts['run_config'].config_of(plan, plan.runs()[0], '')
    assert (cfg.resume, cfg.load_from) == (False, 'detector.pth')


@pytest.mark.parametrize(
    ('name', 'old', 'new'),
    [
        ('classifier.py', 'topk=(1,)', 'topk=(1, 2)'),  # Of the config.
        ('study.py', 'rank=1', 'rank=2'),
        ('study.py', 'small=', 'large='),
    ],
)
def test_a_study_that_is_changed_while_it_runs_ends(
    study, parts, monkeypatch, tmp_path, name, old, new
):
    training = parts['training']
    monkeypatch.setattr(training.logging, 'disable', lambda level: None)
    file = str(study())
    plan = parts['plan'].Study(file)
    settings = {run.key: plan.setting(run) for run in plan.runs()}
    if name == 'classifier.py':
        training.study_of(file).setting(plan.runs()[0])  # As a run before has left it.
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"task 'small': .*study\.py, or the config .* was"):
        training.train(file, 'small lora 1 0.001 0', settings)


def test_a_part_of_the_labels_is_inside_what_repeats_images(study, parts):
    file = study(classifier='repeated', **{'steps=3': 'steps=3, long_tail=2', '[1.0]': '[0.7]'})
    (file.parent / 'repeated.py').write_text(
        "_base_ = ['./classifier.py']\n"
        'train_dataloader = dict(\n'
        "    dataset=dict(_delete_=True, type='RepeatDataset', times=2,\n"
        '                 dataset=_base_.train_dataloader.dataset))\n'
    )
    plan = parts['plan'].Study(str(file))
    train = parts['run_config'].config_of(plan, plan.runs()[0], '').train_dataloader.dataset
    kinds = [train.type, train.dataset.type, train.dataset.dataset.type]
    assert kinds == ['RepeatDataset', 'protune_mm.FewLabels', 'protune_mm.LongTailed']
    parts['data_checks'].check_data(plan, plan.runs()[:1])


def test_results_of_other_settings_are_none_of_a_study(study, parts):
    Study = parts['plan'].Study
    settings = []
    for change in ({}, {'steps=3': 'steps=4'}, {'rank=1': 'rank=2'}):
        plan = Study(str(study(**change)))
        settings.append({run.method: plan.setting(run) for run in plan.runs()})
    first, steps, rank = settings
    assert first == {r.method: Study(str(study())).setting(r) for r in Study(str(study())).runs()}
    assert steps['lora'] != first['lora']
    assert steps['full'] != first['full']
    assert rank['lora'] != first['lora']
    assert rank['full'] == first['full']


def test_settings_that_come_back_find_their_results(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend('tools')
    from study import StudyResults

    lines = [
        dict(key='one', setting=setting, metric=metric, metrics=2, score=score)
        for setting, score in (('a', 1), ('b', 2))
        for metric in ('top', 'corrupted')
    ]
    lines.append(dict(lines[0], key='two'))
    file = tmp_path / 'results.jsonl'
    file.write_text(''.join(f'{json.dumps(line)}\n' for line in lines))
    for setting, score in (('a', 1), ('b', 2)):
        known = StudyResults(file, 1, dict(one=setting)).known
        assert [line['score'] for line in known['one']['lines']] == [score, score]
        assert capsys.readouterr().out.endswith(': 1 runs not planned ignored\n')
    assert StudyResults(file, 1, dict(one='c', two='a')).known == {}, 'of two a metric is missing'
    assert capsys.readouterr().out.endswith(': 1 runs of other settings ignored\n')


def test_the_rate_of_prompts_and_its_warmup(study, parts):
    line = 'dict(prompt=dict(rank=1), prompt_lr_mult=0.3, prompt_warmup=0.5)'
    change = {'steps=3': 'steps=30', 'dict(prompt=dict(rank=1))': line}
    plan = parts['plan'].Study(str(study(**change)))
    run = plan.runs()[0]
    cfg = parts['run_config'].config_of(plan, run, '')
    assert run.method == 'lora'
    assert cfg.optim_wrapper.paramwise_cfg.prompt_lr_mult == 0.3
    assert cfg.param_scheduler[-1] == dict(type='protune_mm.PromptWarmup', end=15)
    assert cfg.model.backbone.prompt == dict(type='LoRA', rank=1)
    assert not {'prompt_lr_mult', 'prompt_warmup'} & set(cfg.model.backbone)


def test_a_task_has_options_of_its_own(study, parts):
    plain = parts['plan'].Study(str(study()))
    line = 'steps=3, options=dict(lora=dict(prompt_lr_mult=0.3, prompt=dict(scale=0.5))),'
    plan = parts['plan'].Study(str(study(**{'steps=3,': line})))
    assert plan.backbone_options('small', 'lora') == dict(
        prompt=dict(type='LoRA', rank=1, scale=0.5), prompt_lr_mult=0.3
    )
    for old, new in zip(plain.runs(), plan.runs(), strict=True):
        # Results of the methods that the task leaves as they are stay results of this study.
        assert (plain.setting(old) == plan.setting(new)) == (new.method != 'lora')


def test_a_task_has_options_for_a_prompt_with_a_name(study, parts, monkeypatch):
    change = {
        'seeds = [0]': "seeds = [0]\nvariants = dict(mine=dict(prompt='paper'))",
        'steps=3,': 'steps=3, options=dict(mine=dict(prompt=dict(scale=0.5))),',
    }
    plan = parts['plan'].Study(str(study(['mine'], **change)))
    assert plan.backbone_options('small', 'mine') == dict(
        prompt=dict(type='ProTuningBlock', last='series', scale=0.5)
    )
    # What a study says of the backbone comes between.
    change['(lora=dict('] = '(mine=dict(prompt=dict(ratio=4)), lora=dict('
    plan = parts['plan'].Study(str(study(['mine'], **change)))
    assert plan.backbone_options('small', 'mine')['prompt'] == dict(
        type='ProTuningBlock', last='series', ratio=4, scale=0.5
    )
    # What the name stands for is part of the setting.
    plan = parts['plan'].Study(str(study(['mine'], **dict(list(change.items())[:1]))))
    first = plan.setting(plan.runs()[0])
    monkeypatch.setitem(parts['plan'].NAMED_PROMPTS['paper'], 'ratio', 4)
    assert plan.setting(plan.runs()[0]) != first


def test_a_new_option_of_a_prompt_that_is_off_leaves_results(study, parts, monkeypatch):
    variants = {
        'plain': 'dict()',
        'spelled': 'dict(norm_cfg=None, learnable_scale=False, drop_rate=0.0)',
        'linear': 'dict(act_cfg=None)',
        'dropped': 'dict(drop_rate=0.1)',
        # None, the default, is another factor.
        'loud': "dict(type='LoRA')",
        'silent': "dict(type='LoRA', alpha=0)",
    }
    lines = ''.join(f'{k}=dict(prompt={v}),' for k, v in variants.items())
    change = {'seeds = [0]': f'seeds = [0]\nvariants = dict({lines})'}
    plan = parts['plan'].Study(str(study([*variants], **change)))

    def settings():
        return {run.method: plan.setting(run) for run in plan.runs()}

    first = settings()
    assert first['plain'] == first['spelled']
    assert len(set(first.values())) == 5
    block = parts['plan']._defaults

    def more(**options):
        monkeypatch.setattr(parts['plan'], '_defaults', lambda kind: {**block(kind), **options})

    more(brand_new=0.0)
    assert settings() == first
    more(brand_new=0.5)
    assert not set(settings().values()) & set(first.values())
    more(drop_rate=0.1)  # Another default.
    assert settings()['plain'] != first['plain']
    assert settings()['plain'] == settings()['dropped'] != settings()['spelled']


def test_a_setting_tells_the_width_that_the_library_chooses(study, parts):
    names = {
        'auto': "'principal-trained'",
        'spelled': "dict(type='ProTuningBlock', init_mode='principal', act_cfg=None)",
        'wide': "dict(init_mode='principal', act_cfg=None, ratio=8)",
    }
    lines = ''.join(f"{k}=dict(stages='inside', prompt={v})," for k, v in names.items())
    plan = parts['plan'].Study(
        str(study([*names], **{'seeds = [0]': f'seeds = [0]\nvariants = dict({lines})'}))
    )
    settings = {run.method: plan.setting(run) for run in plan.runs()}
    assert settings['auto'] == settings['spelled'] != settings['wide']


def test_a_setting_is_the_same_on_every_machine(parts, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = []
    for folders in ({}, dict(PROTUNE_DATA='/a', PROTUNE_WEIGHTS='/a/weights')):
        for name in ('PROTUNE_DATA', 'PROTUNE_WEIGHTS'):
            monkeypatch.delenv(name, raising=False)
        for name, folder in folders.items():
            monkeypatch.setenv(name, folder)
        plan = parts['plan'].Study('configs/study/cpu.py')
        found.append({run.task: plan.setting(run) for run in plan.runs()})
    assert found[0] == found[1]


def test_a_report_tells_its_whole_command_and_note(study, tmp_path):
    file = study(['full'], **{'seeds = [0]': "seeds = [0]\nnote = 'Of eighteen pictures.'"})
    run(file, tmp_path / 'out')
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert f'    python tools/study.py {file} --out {tmp_path / "out"}\n' in text
    assert '\nOf eighteen pictures.\n' in text


def test_a_document_of_others_is_not_written_over(study, tmp_path):
    (tmp_path / 'README.md').write_text('# My project\n')
    done = run(study(), tmp_path, check=False)
    assert done.stderr.strip().endswith(
        'README.md is there, and this tool has not written it: name another folder by --out'
    )
    assert done.stdout == '', 'told before anything else'
    assert (tmp_path / 'README.md').read_text() == '# My project\n'


def test_a_long_tail_counts_the_images_that_are_left(study, parts):
    plan = parts['plan'].Study(str(study(**{'steps=3': 'steps=3, long_tail=2', '[1.0]': '[0.7]'})))
    cfg = parts['run_config'].config_of(plan, plan.runs()[0], '')
    train = cfg.train_dataloader.dataset
    assert (train.type, train.dataset.type) == ('protune_mm.FewLabels', 'protune_mm.LongTailed')
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert [e.type for e in evaluator][-1] == 'protune_mm.ShotAccuracy'
        assert evaluator[-1].dataset == train


class Plan:
    tasks = dict(t=dict(), more=dict())
    lrs, seeds = [1, 2, 3], [0, 1]

    @classmethod
    def rates_of(cls, task, method=None):
        return [(lr, 1.0) for lr in cls.lrs]

    @classmethod
    def seeds_of(cls, task):
        # `more` has a seed more than `t`.
        return cls.seeds + [2] * (task == 'more')


def test_two_kinds_of_processor_with_one_name_are_told_apart(tmp_path):
    info = tmp_path / 'cpuinfo'
    core = 'processor: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping: 1\n'
    info.write_text(core + core.replace('17', '1'))
    assert processor(str(info)) == 'AMD EPYC (family 25, model 17)'
    info.write_text('model name\t: Cortex\n')
    assert processor(str(info)) == 'Cortex'
    assert processor(str(tmp_path / 'none')) == platform.processor()


def test_a_report_tells_every_machine_and_version(parts):
    rows = [
        dict(key=f'{i // 2}', device='CPU', versions=versions, **more)
        for i, (versions, more) in enumerate(
            [
                (dict(mmcv='1'), {}),
                (dict(mmcv='1'), {}),
                (dict(torch='2', mmcv='1'), dict(processor='A')),
                (dict(torch='2', mmcv='3'), dict(processor='A')),
            ]
        )
    ]
    environments = parts['report'].environments
    assert environments(rows[:2])[0].startswith('Run on a CPU (model not recorded), one thread')
    text = environments(rows)[0]
    assert text.startswith(
        'Run on a CPU (A) (1 run) and on a CPU (model not recorded) (1 run), one'
    )
    assert text.endswith('with torch 2 or unknown, mmcv 1 or 3.')
    assert environments([]) == []


def line(method, lr, seed, val, score, metric='m', share=0.05, task='t'):
    return dict(
        task=task, fraction=1.0, metric=metric, method=method, lr=lr, seed=seed, val_score=val,
        score=score, diverged=False, trainable_backbone=1000 * share, backbone_parameters=1000,
    )  # fmt: skip


def test_the_rate_is_picked_by_validation_over_all_seeds(parts):
    lines = [
        line('a', 1, 0, 50, 90), line('a', 1, 1, 50, 90),
        line('a', 2, 0, 85, 10), line('a', 2, 1, 20, 20),
        # Not all seeds yet: it cannot win.
        line('a', 3, 0, 99, 99),
    ]  # fmt: skip
    # Another metric of the same runs, by which another rate were best.
    lines += [line('a', lr, seed, 100 - 10 * lr, lr, 'n') for lr in (1, 2) for seed in (0, 1)]
    found = parts['cells'].cells(Plan, lines)
    cell = found['t', 1.0, 'm']['a']
    assert (cell['lr'], cell['score'], cell['edge'], cell['complete']) == (2, 15, False, False)
    assert cell['count'] == 5
    assert (found['t', 1.0, 'n']['a']['lr'], found['t', 1.0, 'n']['a']['score']) == (2, 2)


def test_of_rates_with_one_validation_score_the_lowest_counts(parts):
    # As float32 leaves one mean of two scores, in whatever order the runs ended.
    lines = [line('a', 3, 0, 63.98844070, 3), line('a', 2, 0, 63.98844072, 2)]
    lines.append(line('a', 1, 0, 63.9, 1))
    for some in (lines, lines[::-1]):
        cell = parts['cells'].cells(Plan, some)['t', 1.0, 'm']['a']
        assert (cell['lr'], cell['score'], cell['tie']) == (2, 2, True)
    cell = parts['cells'].cells(Plan, lines[1:])['t', 1.0, 'm']['a']
    assert (cell['lr'], cell['tie']) == (2, False)


def test_the_time_of_a_step_is_told_at_equal_rates_and_seeds_on_one_processor(parts, tmp_path):
    # Seeds 1 ran on a machine of half the speed; `b` is best at another rate and lacks one time.
    times = {
        ('head-only', 1, 0): 1.0, ('head-only', 1, 1): 2.0, ('head-only', 2, 0): 1.0,
        ('b', 1, 0): 3.0, ('b', 1, 1): 6.0, ('b', 2, 1): 6.0, ('b', 2, 0): None,
    }  # fmt: skip

    def timed(method, lr, seed, step_s, processor='A'):
        more = dict(step_s=step_s, processor=processor, device='CPU', peak_memory=2**20)
        return dict(line(method, lr, seed, lr, 1), **more)

    lines = [timed(*run, step_s) for run, step_s in times.items()]
    cells, place = parts['cells'].cells, ('t', 1.0, 'm')
    found = cells(Plan, lines)[place]
    assert parts['cells'].base_of(found) == 'head-only'
    assert [found[name]['time'] for name in ('head-only', 'b')] == [1, 3]
    # All of one on another processor: no time of it, also in the picture.
    lines.append(timed('c', 1, 0, 9.0, 'B'))
    found = cells(Plan, lines)[place]
    assert math.isnan(found['c']['time'])
    assert found['b']['time'] == 3
    assert parts['plots'].draw(place, found, tmp_path, 'x', True)
    # Where all have some in common, these count: not the other pairs of `b`.
    lines[-1] = timed('c', 1, 1, 8.0)
    lines[4] = timed('b', 1, 1, 5.0)
    found = cells(Plan, lines)[place]
    assert [found[name]['time'] for name in ('head-only', 'b', 'c')] == [1, 2.5, 4]
    # Results of older versions have no time; one that has is the base.
    older = cells(Plan, [line('head-only', 1, 0, 1, 1), timed('b', 1, 0, 1.0)])[place]
    assert parts['cells'].base_of(older) == 'b'
    assert math.isnan(older['head-only']['time'])


def everywhere(method, score, share, by_seed=1, metric='m'):
    return [
        line(method, lr, seed, score, score + by_seed * seed, metric, share)
        for lr in Plan.lrs for seed in Plan.seeds
    ]  # fmt: skip


def test_the_verdict(parts):
    lines = everywhere('pro-tuning', 70, 0.05) + everywhere('full', 70.5, 1.0)
    lines += everywhere('head-only', 69.5, 0) + everywhere('lora', 67.5, 0.1, by_seed=2)
    lines += everywhere('last-k', 75, 0.2)
    text = parts['claim'].verdict(parts['cells'].cells(Plan, lines))
    row = next(row for row in text if row.startswith('| t, 100%, m'))
    # By 0.5 over head-only, whose seeds spread by 0.71; last-k trains too much to be a rival.
    # To LoRA the seeds differ by 2.5 and 1.5.
    assert row == (
        '| t, 100%, m | 70.50 | -0.50 ± 0.00 **no** | +0.50 ± 0.00 **no** | +2.00 ± 0.50 yes '
        '| lora | 5.0% yes |'
    )
    assert text[-4].endswith('by the first metric of each: -0.50; over all these places: -0.50.')
    assert text[-2].endswith(': -0.50; behind in t with 100% of the labels (-0.50).')
    # The best rival may be one that has not been run.
    told = parts['claim'].verdict(parts['cells'].cells(Plan, lines), ['full', 'mona', 'lorand'])
    assert '(2 not run)' in '\n'.join(told)
    alone = parts['cells'].cells(Plan, [one for one in lines if one['method'] != 'lora'])
    assert '| none (1 not run) |' in '\n'.join(parts['claim'].verdict(alone, ['mona']))
    # A rival with runs missing is none yet; one of the other three: no verdict.
    less = next(one for one in lines if one['method'] == 'lora')
    partly = parts['cells'].cells(Plan, [one for one in lines if one is not less])
    told = '\n'.join(parts['claim'].verdict(partly, ['mona']))
    assert '|  | none (lora lacks runs, 1 not run) |' in told
    for name in ('full', 'head-only', 'pro-tuning'):
        less = next(one for one in lines if one['method'] == name)
        partly = parts['cells'].cells(Plan, [one for one in lines if one is not less])
        assert parts['claim'].verdict(partly) == []


def test_a_table_tells_how_far_one_method_is_ahead(parts, tmp_path):
    class Told(Plan):
        tasks = dict(t=dict(metrics=['coco/m']))
        note, path, results_name, methods = '', 'study.py', 'x.jsonl', []

    more = dict(peak_memory=1, backbone='B', steps=1, key='', device='CPU', versions={})
    best = everywhere('full', 0.5, 1.0, by_seed=0.1, metric='coco/m')
    ours = everywhere('pro-tuning', 0.4, 0.05, by_seed=0.2, metric='coco/m')
    alone = [line('lora', 1, 1, 0.1, 0.1, 'coco/m'), line('mona', 1, 2, 0.1, 0.1, 'coco/m')]

    def column(lines, final):
        """The heads of the columns, and what each method has in the last of them."""
        lines = [line | more for line in lines]
        found = parts['cells'].cells(Told, lines)
        pictures = dict.fromkeys(found, '')
        text = parts['report'].report(Told, found, lines, pictures, [], tmp_path, final)
        table = [row.split(' | ') for row in text[text.index('## t, ') :].split('\n| ')[1:]]
        (at,) = [i for i, name in enumerate(table[0]) if name.endswith(' ahead')]
        return table[0][at], {row[0]: row[at] for row in table[1:]}

    # By test, of a hundred: behind by 10 with one seed, level with the other. Another method has
    # one of the two seeds, and one has neither.
    assert column(best + ours + alone, True) == (
        'pro-tuning ahead',
        {'full': '-5.00 ± 5.00', 'pro-tuning': '', 'lora': '+50.00', 'mona': ''},
    )
    # An ablation has validation scores alone, and where it has no Pro-tuning its first line counts.
    assert column(best + ours, False)[1] == {'full': '-10.00 ± 0.00', 'pro-tuning': ''}
    assert column(best + alone[:1], False) == ('full ahead', {'full': '', 'lora': '+40.00'})


def test_the_means_over_places(parts):
    lines = everywhere('pro-tuning', 70, 0.05) + everywhere('pro-tuning', 40, 0.05, metric='n')
    # Ahead by 10 with both seeds by the first metric, by the other behind by 2 and 4.
    lines += everywhere('full', 60, 1.0) + everywhere('full', 42, 1.0, by_seed=3, metric='n')
    # At one of the two places alone: by 2.5 and 1.5.
    lines += everywhere('lora', 67.5, 0.1, by_seed=2)

    def rows(lines):
        return parts['claim'].together(parts['cells'].cells(Plan, lines))

    assert [row for row in rows(lines) if row.startswith(('| full', '| lora'))] == [
        '| lora | 10.0% | +2.00 ± 0.50 (1) | +2.00 ± 0.50 | 1 of 1 |',
        '| full | 100.0% | +10.00 ± 0.00 (1) | +3.50 ± 0.50 | 1 of 2 |',
    ]
    # A method with runs missing is not compared, nor is Pro-tuning.
    assert not [row for row in rows(lines[:-1]) if row.startswith('| lora')]
    assert rows(lines[1:3]) == []


def test_the_means_over_scenarios(parts):
    attack = dict(attacks=dict(fgsm=[1]), severities=[3], shifts=dict(grey=[]))

    class Wide(Plan):
        tasks = dict(
            t=dict(metrics=['accuracy/m', 'n'], scenarios=attack),
            long=dict(metrics=['m'], long_tail=50),
            boxes=dict(metrics=['coco/bbox_mAP']),
            masks=dict(metrics=['coco/segm_mAP', 'coco/bbox_mAP']),
            maps=dict(metrics=['mIoU']),
        )

    def place(task, fraction, metric, **ahead):
        scores = [dict(one, task=task, fraction=fraction)
                  for name, points in ahead.items()
                  for one in everywhere(name.replace('_', '-'), 60 - points,
                                        dict(full=1.0, head_only=0.0).get(name, 0.05),
                                        metric=metric)]  # fmt: skip
        return scores + [
            dict(one, task=task, fraction=fraction)
            for one in everywhere('pro-tuning', 60, 0.05, by_seed=2, metric=metric)
        ]

    lines = place('t', 1.0, 'accuracy/m', full=1, head_only=2, lora=3, mona=4)
    lines += place('t', 1.0, 'n', full=50)  # Not the first metric.
    lines += place('t', 0.5, 'accuracy/m', full=-1, head_only=2, lora=3, mona=1)
    lines += place('t', 0.2, 'accuracy/m', full=4, head_only=-2, lora=3, mona=3)
    lines += place('t', 1.0, '100 - mCE, severity 3', full=1, lora=2)
    lines += place('t', 0.5, 'fgsm, 1/255', full=-2) + place('t', 1.0, 'shifted, grey', full=8)
    lines += place('long', 0.5, 'm', full=1, lora=-0.5) + place('maps', 1.0, 'mIoU', full=2)
    # Too many parameters at one of two places, so no rival.
    for fraction in (0.5, 0.2):
        lines += [
            dict(one, task='t', fraction=fraction)
            for one in everywhere('adapter', 70, fraction / 3, metric='accuracy/m')
        ]
    for task in ('boxes', 'masks'):
        lines += place(task, 1.0, 'coco/bbox_mAP', full=0.5)
    lines += place('masks', 1.0, 'coco/segm_mAP', full=0)

    def rows(lines):
        text = parts['claim'].by_scenario(Wide, parts['cells'].cells(Wide, lines))
        return [row for row in text if row.startswith('| ') and ' | places |' not in row]

    # The second of two seeds is better by one more of Pro-tuning: 0.5 on the mean.
    assert rows(lines) == [
        '| classification | 1 | +1.50 ± 0.50 (1) | +2.50 ± 0.50 (1) | +3.50 ± 0.50 (1) | lora |',
        '| few labels | 2 | +2.00 ± 0.50 (1) | +0.50 ± 0.50 (1) | +2.50 ± 0.50 (2) | mona |',
        # As good is not ahead.
        '| class imbalance | 1 | +1.50 ± 0.50 (1) |  | +0.00 ± 0.50 (0) | lora |',
        '| corruption | 1 | +1.50 ± 0.50 (1) |  | +2.50 ± 0.50 (1) | lora |',
        '| attacks | 1 | -1.50 ± 0.50 (0) |  |  | none |',
        '| other domains | 1 | +8.50 ± 0.50 (1) |  |  | none |',
        '| detection | 1 | +100.00 ± 50.00 (1) |  |  | none |',
        '| segmentation | 1 | +2.50 ± 0.50 (1) |  |  | none |',
        '| instance segmentation | 1 | +50.00 ± 50.00 (1) |  |  | none |',
    ]
    # Mona has not all its runs at one of the two places any more.
    less = next(one for one in lines if (one['method'], one['fraction']) == ('mona', 0.5))
    assert rows([one for one in lines if one is not less])[1].endswith('| lora (1 lacks runs) |')
    less = next(one for one in lines if one['method'] == 'pro-tuning')
    assert rows([one for one in lines if one is not less])[0].startswith('| few labels')
    assert parts['claim'].by_scenario(Wide, {}) == []
    for metric, kind in (
        ('multi-label/mAP', 'classification'),
        ('single-label/f1-score', 'classification'),
        ('cityscapes/mAP', 'instance segmentation'),
        ('lvis/segm_AP', 'instance segmentation'),
        ('lvis/bbox_AP', 'detection'),
        ('pascal_voc/mAP', 'detection'),
        ('mDice', 'segmentation'),
    ):
        tasks = dict(t=dict(metrics=[metric]))
        assert parts['claim'].scenario_of(Mock(tasks=tasks), ('t', 1.0, metric)) == kind
    # A metric of no claim; and one seed has no error.
    strange = dict(Wide.tasks, t=dict(metrics=['caption/BLEU']))
    assert parts['claim'].scenario_of(Mock(tasks=strange), ('t', 1.0, 'caption/BLEU')) is None
    assert parts['claim'].told(1.0, math.nan) == '+1.00'


@pytest.mark.parametrize('times', [(), (1.0, 1.06)])
def test_no_point_lies_on_the_border_of_the_times(parts, times):
    axis = Figure().subplots()
    for time in times:
        axis.errorbar(time, 1, 0.1)
    parts['plots'].set_time_scale(axis)
    left, right = axis.get_xlim()
    assert left == 0 < max(times, default=0.5) < right / 1.02


def test_every_method_has_a_colour_of_its_own(parts):
    looks = parts['plots'].looks_of([*parts['plan'].METHODS, *(f'variant {i}' for i in range(40))])
    assert len({tuple(look.values()) for look in looks.values()}) == len(looks)


def test_a_task_with_more_seeds_counts_once(parts):
    """With all of its seeds; the error is over those that all tasks have."""
    lines = everywhere('pro-tuning', 70, 0.05) + everywhere('full', 68, 1.0)
    for seed, ahead in enumerate((2, 4, 12)):
        for lr in Plan.lrs:
            lines.append(line('pro-tuning', lr, seed, 0, 50 + ahead, task='more'))
            lines.append(line('full', lr, seed, 0, 50, share=1.0, task='more'))
    found = parts['cells'].cells(Plan, lines)
    assert found['more', 1.0, 'm']['full']['complete']
    # By 2 in `t`, by 6 in `more`; with the seeds of both, by (2 + 2) / 2 and (2 + 4) / 2.
    rows = parts['claim'].together(found)
    assert '| full | 100.0% | +4.00 ± 0.50 (2) | +4.00 ± 0.50 | 2 of 2 |' in rows
    lines = [one for one in lines if (one['task'], one['seed']) != ('more', 2)]
    assert not parts['cells'].cells(Plan, lines)['more', 1.0, 'm']['full']['complete']


def test_the_seeds_of_a_task(study, parts):
    """They are its own where it has some, and old results go on counting."""
    few = parts['plan'].Study(str(study()))
    old = {run.key: few.setting(run) for run in few.runs()}
    more = parts['plan'].Study(str(study(**{'steps=3': 'steps=3, seeds=[0, 4]'})))
    new = {run.key: more.setting(run) for run in more.runs()}
    assert {parts['plan'].Run.of(key).seed for key in new} == {0, 4}
    counted = parts['plan'].Study(str(study(**{'seeds = [0]': 'seeds = range(2)'})))
    assert {run.seed for run in counted.runs()} == {0, 1}
    assert len(new) == 2 * len(old)
    assert old.items() <= new.items()


@pytest.mark.parametrize(
    'name', sorted(file.stem for file in (ROOT / 'configs/study').glob('*.py'))
)
def test_the_studies_of_the_repository_read(name, monkeypatch):
    monkeypatch.syspath_prepend('tools')
    from study_parts.plan import Run, Study

    study = Study(f'configs/study/{name}.py')
    runs = study.runs()
    assert len({run.key for run in runs}) == len(runs)
    assert all(Run.of(run.key) == run for run in runs)
    # A form that was run once more, on the processor of those it is compared with.
    again = ('flowers5-held-out', 'inside-principal-drop0', 1.0)
    settings = {(run.task, run.method, run.lr_part): study.setting(run) for run in runs}
    if name == 'held_out':
        del settings[again]
    # Two tasks may be of the same form, with other seeds.
    assert len({(task, told) for (task, *_), told in settings.items()}) == len(settings)


@pytest.mark.parametrize('name', ['cpu', 'held_out', 'attack', 'attack_gpu'])
def test_a_study_that_is_told_as_whole_has_all_its_runs(name, parts):
    plan, stack = parts['plan'].Study(f'configs/study/{name}.py'), stack_versions().items()
    Run, found = parts['plan'].Run, {}
    folder = '' if name == 'cpu' else name.replace('_', '-')
    file = ROOT / 'docs/study' / folder / 'results.jsonl'
    for row in map(json.loads, file.read_text().splitlines()):
        found.setdefault(row['key'], []).append(row)
    planned = {run.key: run for run in plan.runs()}
    if name == 'attack_gpu':  # Of a third seed, not of all methods yet; the report leaves it out.
        found = {key: rows for key, rows in found.items() if Run.of(key).seed != 2}
    assert found.keys() == planned.keys()
    for key, rows in found.items():
        assert len(rows) == len({row['metric'] for row in rows}) == rows[0]['metrics']
        # Configs of other versions of the libraries may differ.
        if stack <= rows[0]['versions'].items():
            assert {row['setting'] for row in rows} == {plan.setting(planned[key])}


def test_a_multiplier_of_a_task_is_for_what_trains_in_the_backbone(study, parts):
    """Full fine-tuning keeps its results; a method's own multiplier comes first."""
    methods = ('lora', 'bias', 'full', 'mine')
    more = {'seeds = [0]': 'seeds = [0]\nvariants = dict(mine=dict(prompt_lr_mult=0.3))'}
    one = parts['plan'].Study(str(study(methods, **more)))
    first = {run.method: one.setting(run) for run in one.runs()}
    other = parts['plan'].Study(
        str(study(methods, **more, **{'steps=3': 'steps=3, prompt_lr_mult=0.1'}))
    )
    second = {run.method: other.setting(run) for run in other.runs()}
    assert {method for method in first if first[method] != second[method]} == {'lora', 'bias'}
    assert other.backbone_options('small', 'lora')['prompt_lr_mult'] == 0.1
    assert other.backbone_options('small', 'mine')['prompt_lr_mult'] == 0.3
    assert 'prompt_lr_mult' not in other.backbone_options('small', 'full')
    own = 'steps=3, prompt_lr_mult=0.1, full_lr_mult=0.01'
    rules = "'optim_wrapper.paramwise_cfg': dict(custom_keys=dict(backbone=dict(lr_mult=0.5)))"
    other = parts['plan'].Study(
        str(study(methods, **more, **{'steps=3': f'{own}, cfg_options={{{rules}}}'}))
    )
    for run in other.runs():
        rates = rates_in_backbone(parts['run_config'].config_of(other, run, ''), run.lr)
        assert rates == {dict(full=0.01, mine=0.3).get(run.method, 0.1)}, run.method


@pytest.mark.parametrize(
    ('rules', 'refused'),
    [
        ('dict(norm_decay_mult=0.0)', ''),
        ("dict(custom_keys={'head': dict(lr_mult=10), 'decode_head.x': dict(lr_mult=10)})", ''),
        ('dict(custom_keys=dict(norm=dict(decay_mult=0)))', "has 'norm' as well, and only one key"),
        ('None', 'LearningRateDecay has rates of its own'),
    ],
)
def test_full_fine_tuning_has_its_multiple_beside_other_rules(study, parts, rules, refused):
    options = f"'optim_wrapper.paramwise_cfg': {rules}"
    if 'LearningRateDecay' in refused:
        options += ", 'optim_wrapper.constructor': 'LearningRateDecay'"
    plan = parts['plan'].Study(
        str(
            study(['full'], **{'steps=3': f'steps=3, full_lr_mult=0.01, cfg_options={{{options}}}'})
        )
    )
    run = plan.runs()[0]
    if refused:
        with pytest.raises(ValueError, match=f'full_lr_mult=0.01: .*{refused}'):
            parts['run_config'].config_of(plan, run, '')
        return
    cfg = parts['run_config'].config_of(plan, run, '')
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, wrap_constructor(cfg.optim_wrapper))
    ours = {id(p) for p in model.backbone.parameters()}
    for group in wrapper.optimizer.param_groups:
        assert {id(p) in ours for p in group['params']} == {group['lr'] < run.lr / 50}


def test_the_scores_are_those_of_the_trained_model(parts):
    """Measuring its memory changes no statistics."""

    class Model(nn.Sequential):
        def data_preprocessor(self, data, training):
            return data

        def forward(self, inputs, mode):
            return super().forward(inputs)

    model = Model(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loop = Mock(dataloader=[dict(inputs=torch.rand(2, 3, 4, 4) + 5)])
    assert parts['training'].peak_memory(Mock(model=model, train_loop=loop)) > 0
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)


def test_an_evaluator_around_several_metrics_is_looked_into(parts):
    metrics = [dict(type='CocoMetric', ann_file='a.json'), dict(type='CocoMetric', ann_file='b')]
    for found in (
        metrics,
        dict(type='MultiDatasetsEvaluator', metrics=metrics, dataset_prefixes=['a', 'b']),
        dict(metrics=metrics),
    ):
        run_config, cfg = parts['run_config'], dict(test_evaluator=deepcopy(found))
        run_config.count_shown(run_config.evaluators_of(cfg, 'test'), dict(indices=[1]))
        told = run_config.evaluators_of(cfg, 'test')
        assert told == [dict(type='CocoMetric', ann_file=None)] * 2
    assert parts['run_config'].evaluators_of(dict(test_evaluator=metrics[0]), 'test') == metrics[:1]


def test_a_rate_may_have_a_part_of_the_multiples(study, parts):
    """The head trains at the rate, what is in the backbone at a part of what else it had."""
    grid = 'steps=3, lrs=[1e-3, (1e-3, 0.5)]'
    mults = 'prompt_lr_mult=0.1, full_lr_mult=0.01'
    file = study(('lora', 'full', 'head-only'), **{'steps=3': f'{grid}, {mults}'})
    plan = parts['plan'].Study(str(file))
    runs = {run.key: run for run in plan.runs()}
    # Head-only has nothing of which to take a part.
    assert [*runs] == [
        'small lora 1 0.001 0', 'small lora 1 0.001x0.5 0', 'small full 1 0.001 0',
        'small full 1 0.001x0.5 0', 'small head-only 1 0.001 0',
    ]  # fmt: skip
    assert all(parts['plan'].Run.of(key) == run for key, run in runs.items())
    assert len({plan.setting(run) for run in runs.values()}) == 5
    for run in runs.values():
        cfg = parts['run_config'].config_of(plan, run, '')
        model = MODELS.build(cfg.model)
        wrapper = build_optim_wrapper(model, wrap_constructor(cfg.optim_wrapper))
        ours = {id(p) for p in model.backbone.parameters() if p.requires_grad}
        rates = [set(), set()]
        for group in wrapper.optimizer.param_groups:
            for parameter in group['params']:
                rates[id(parameter) in ours].add(round(group['lr'] / run.lr, 6))
        part = {'lora': 0.1, 'full': 0.01}.get(run.method, 0) * run.lr_part
        assert rates == [{1.0}, {part} - {0}], run.key
    done = run_tool('tools/study.py', file, '--run', 'small lora 1 0.001x0.5 0')
    (row,) = [json.loads(text) for text in done.stdout.splitlines() if text.startswith('{')]
    assert (row['key'], row['lr'], row['lr_part']) == ('small lora 1 0.001x0.5 0', 1e-3, 0.5)
    done = run_tool('tools/study.py', file, '--run', 'small head-only 1 0.001x0.5 0', check=False)
    assert 'could have x0.5: leave that out' in done.stderr


@pytest.mark.parametrize(
    ('rules', 'multiples'),
    [
        ('None', dict(lora=1.0, full=1.0)),
        (
            'dict(prompt_lr_mult=0.3, custom_keys=dict(backbone=dict(lr_mult=0.2)))',
            dict(lora=0.3, full=0.2),
        ),
    ],
)
def test_a_part_is_of_the_configs_multiples_where_a_task_has_none(study, parts, rules, multiples):
    """And the settings of the other rates stay what they were without the pair."""
    options = f"cfg_options={{'optim_wrapper.paramwise_cfg': {rules}}}"
    before = parts['plan'].Study(str(study(**{'steps=3': f'steps=3, lrs=[1e-3], {options}'})))
    settings = {run.key: before.setting(run) for run in before.runs()}
    grid = f'steps=3, lrs=[1e-3, (1e-2, 0.1)], {options}'
    plan = parts['plan'].Study(str(study(**{'steps=3': grid})))
    for run in plan.runs():
        rates = rates_in_backbone(parts['run_config'].config_of(plan, run, ''), run.lr)
        assert rates == {round(multiples[run.method] * run.lr_part, 6)}, run.key
        assert settings.get(run.key, plan.setting(run)) == plan.setting(run)
    assert len({plan.setting(run) for run in plan.runs()}) == 4


def test_a_part_has_the_digits_that_a_key_has(study, parts):
    """Else the run that a key names had another setting than the planned one, and ran for ever."""
    grid = 'steps=3, lrs=[(1 / 700, 1 / 3)], prompt_lr_mult=0.1, full_lr_mult=0.01'
    plan = parts['plan'].Study(str(study(**{'steps=3': grid})))
    for run in plan.runs():
        assert parts['plan'].Run.of(run.key) == run
        assert '0.00142857x0.333333' in run.key


@pytest.mark.parametrize('rate', ['x0.5', '0.001x', '0.001x1', '0.001x0', '1x2x3', 'nan', '1xinf'])
def test_keys_of_no_rate(parts, rate):
    with pytest.raises(ValueError, match='names no run: use'):
        parts['plan'].Run.of(f'small lora 1 {rate} 0')


class PartsPlan(Plan):
    @classmethod
    def rates_of(cls, task, method=None):
        return [(1, 1.0), (2, 1.0), (3, 0.5), (3, 1.0)][: 3 if method == 'head-only' else 4]


def test_of_a_rate_and_a_part_of_the_multiples_validation_picks_one(parts):
    half = [dict(line('lora', 3, seed, 90, 7), lr_part=0.5) for seed in (0, 1)]
    cells = parts['cells'].cells
    cell = cells(PartsPlan, everywhere('lora', 70, 0.05) + half)['t', 1.0, 'm']['lora']
    assert (cell['lr'], cell['lr_part'], cell['score']) == (3, 0.5, 7)
    assert (cell['complete'], cell['edge'], cell['tie']) == (True, True, False)
    # Of two parts with one score the lower counts.
    whole = [line('lora', 3, seed, 90, 8) for seed in (0, 1)]
    cell = cells(PartsPlan, whole + half)['t', 1.0, 'm']['lora']
    assert (cell['lr_part'], cell['score'], cell['tie']) == (0.5, 7, True)


def test_an_end_of_a_grid_is_one_of_its_rates_or_else_of_their_parts(parts):
    is_end = parts['cells'].is_end
    grid = PartsPlan.rates_of('t')
    assert [is_end(rate, grid) for rate in grid] == [True, False, True, True]
    grid = [(1, 0.5), (1, 1.0), (1, 2.0)]
    assert [is_end(rate, grid) for rate in grid] == [True, False, True]
    assert not is_end((1, 1.0), grid[1:2])


def test_a_step_takes_as_long_with_any_part_of_a_multiple(parts):
    """So it is compared with head-only, which has none."""
    lines = [
        dict(line(method, 3, 0, val, 0), lr_part=part, step_s=step_s, processor='A')
        for method, part, val, step_s in (
            ('head-only', 1.0, 1, 1.0), ('lora', 0.5, 3, 3.0), ('lora', 1.0, 2, 5.0),
        )
    ]  # fmt: skip
    found = parts['cells'].cells(PartsPlan, lines)['t', 1.0, 'm']
    assert (found['lora']['lr_part'], found['lora']['time']) == (0.5, 4.0)


def test_images_that_a_fraction_leaves_out_validate(study, parts):
    """With the transforms of the validation split, and none of them trains."""
    own = (
        "steps=3, validate_on_rest=True, cfg_options={'val_dataloader.dataset.pipeline.1.scale': 9}"
    )
    plan = parts['plan'].Study(str(study(**{'steps=3': own, '[1.0]': '[0.7]'})))
    cfg = parts['run_config'].config_of(plan, plan.runs()[0], '')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        train, val = (
            DATASETS.build(loader.dataset) for loader in (cfg.train_dataloader, cfg.val_dataloader)
        )
    stock, rest = val.datasets
    assert sorted(train.indices + rest.indices) == list(range(len(train.dataset)))
    assert len(val) == len(stock) + len(rest) > len(stock)
    assert val[len(stock)]['inputs'].shape == stock[0]['inputs'].shape
    assert train[0]['inputs'].shape != stock[0]['inputs'].shape


def test_channels_last_maps_reach_no_layer_of_mmcv(parts):
    from mmcv.ops import ModulatedDeformConv2dPack
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    torch.manual_seed(0)
    layer = dict(type='RoIAlign', output_size=3, sampling_ratio=0)
    pooled = SingleRoIExtractor(layer, out_channels=8, featmap_strides=[4])
    deformed = ModulatedDeformConv2dPack(4, 8, 3, padding=1)
    nn.init.normal_(deformed.conv_offset.weight, std=0.1)
    model = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), deformed, pooled])
    rois = torch.tensor([[0, 4.0, 8, 60, 40], [1, 0, 0, 30, 30]])

    def run():
        maps = model[1](model[0](x))
        return maps, model[2]([maps.contiguous(memory_format=x_layout)], rois)

    x, x_layout = torch.randn(2, 3, 16, 20), torch.contiguous_format
    stock = run()
    parts['training'].to_channels_last(model)
    x_layout = torch.channels_last
    assert model[0](x).is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(run(), stock, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # float32
