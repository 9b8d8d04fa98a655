"""The warm-up of prompts is theirs alone, multiplies the stock schedule, and can be resumed."""

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import CosineAnnealingLR, LinearLR, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from torch import nn

from protune_mm.optim import PromptWarmup, check_warmup, without_warmup, wrap_constructor
from tests.test_resume import ITERS, base, config, forget_afterwards, train  # noqa: F401


class Model(nn.Module):
    def __init__(self, **more):
        super().__init__()
        config = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18, **more)
        self.backbone = MODELS.build(config)
        self.head = nn.Linear(512, 2)


def optimizer_of(model):
    return build_optim_wrapper(
        model, wrap_constructor(dict(optimizer=dict(type='AdamW', lr=1.0, weight_decay=0.05)))
    )


def rates(optimizer, model):
    """Learning rates of the head and of the prompts."""
    head = {id(p) for p in model.head.parameters()}
    groups = {True: set(), False: set()}
    for group in optimizer.param_groups:
        for parameter in group['params']:
            groups[id(parameter) in head].add(group['lr'])
    (of_head,), (of_prompts,) = groups[True], groups[False]
    return of_head, of_prompts


def steps(optimizer, schedulers, model, count):
    found = []
    for _ in range(count):
        found.append(rates(optimizer, model))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return found


def stock(optimizer):
    return [
        LinearLR(optimizer, start_factor=0.1, by_epoch=False, begin=0, end=4),
        CosineAnnealingLR(optimizer, by_epoch=False, begin=4, end=20, T_max=16),
    ]


def warmup(optimizer, **more):
    config = dict(type='protune_mm.PromptWarmup', end=11, start_factor=0.01, **more)
    return PARAM_SCHEDULERS.build(config, default_args=dict(optimizer=optimizer))


@pytest.mark.parametrize('first', [True, False])
def test_it_multiplies_the_rate_of_prompts_and_leaves_the_head(first):
    model = Model()
    plain = optimizer_of(model)
    expected = steps(plain, stock(plain), model, 20)
    optimizer = optimizer_of(model)
    if first:
        schedulers = [warmup(optimizer), *stock(optimizer)]
    else:
        schedulers = [*stock(optimizer), warmup(optimizer)]
    found = steps(optimizer, schedulers, model, 20)
    for step, ((stock_head, stock_prompt), (head, prompt)) in enumerate(
        zip(expected, found, strict=True)
    ):
        factor = min(1.0, 0.01 + 0.99 * step / 10)
        assert head == pytest.approx(stock_head, rel=1e-9)
        assert prompt == pytest.approx(stock_prompt * factor, rel=1e-9)
    assert found[0][1] < found[0][0], 'prompts start below the head'


def test_a_resumed_training_goes_on():
    model = Model()
    whole = optimizer_of(model)
    expected = steps(whole, [warmup(whole)], model, 12)
    before = optimizer_of(model)
    schedule = warmup(before)
    steps(before, [schedule], model, 5)
    state = before.state_dict()
    for group in state['param_groups']:
        group.pop('prompt', None)  # As of a version without the key.
    after = optimizer_of(model)
    again = warmup(after)
    after.load_state_dict(state)
    again.load_state_dict(schedule.state_dict())
    found = steps(after, [again], model, 7)
    assert [prompt for _, prompt in found] == pytest.approx([prompt for _, prompt in expected[5:]])
    assert [head for head, _ in found] == [1.0] * 7


def test_epochs_become_steps():
    model = Model()
    optimizer = optimizer_of(model)
    config = dict(type='protune_mm.PromptWarmup', end=2, by_epoch=True, convert_to_iter_based=True)
    schedule = PARAM_SCHEDULERS.build(
        config, default_args=dict(optimizer=optimizer, epoch_length=5)
    )
    assert isinstance(schedule, PromptWarmup)
    found = steps(optimizer, [schedule], model, 11)
    assert [head for head, _ in found] == [1.0] * 11
    assert found[8][1] < 1.0
    assert found[10][1] == pytest.approx(1.0)


def test_an_optimizer_without_prompts_is_an_error():
    for optimizer in (
        optimizer_of(Model(policy='head-only')),
        torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1),
    ):
        with pytest.raises(ValueError, match=r'holds no prompts.*Pro-tuned'):
            PromptWarmup(optimizer, end=5)


@pytest.mark.parametrize('factor', [0, -0.1, 1.5])
def test_a_factor_out_of_range_is_an_error(factor):
    with pytest.raises(ValueError, match=f'start_factor={factor}: use a factor above 0'):
        PromptWarmup(optimizer_of(Model()), end=5, start_factor=factor)


def test_a_warm_up_in_which_nothing_rises_is_an_error():
    with pytest.raises(ValueError, match='begin=0 and end=1 leave nothing to rise in'):
        PromptWarmup(optimizer_of(Model()), end=1, by_epoch=True)


@pytest.mark.parametrize(
    'other',
    [
        dict(type='mmdet.QuadraticWarmupLR', by_epoch=False, begin=0, end=5),
        dict(type='OneCycleLR', by_epoch=False, eta_max=1.0, total_steps=9),
        dict(type='CosineRestartLR', by_epoch=False, periods=[9], eta_min=0.1),
    ],
)
def test_schedulers_that_do_not_multiply_are_refused(other):
    optimizer = optimizer_of(Model())
    built = [
        warmup(optimizer),
        PARAM_SCHEDULERS.build(other, default_args=dict(optimizer=optimizer)),
    ]
    with pytest.raises(ValueError, match=r'PromptWarmup multiplies rates, which \w+LR adds to'):
        check_warmup(built)
    with pytest.raises(ValueError, match='PromptWarmup'):
        check_warmup(dict(one=built))
    check_warmup(built[1:])
    later = {**other, 'begin': 11, 'end': 16}
    later = PARAM_SCHEDULERS.build(later, default_args=dict(optimizer=optimizer))
    check_warmup([built[0], later])
    check_warmup([built[0], *stock(optimizer)])


def test_twins_without_prompts_leave_it_out(base, pictures, tmp_path):  # noqa: F811
    """`--policy full` of a config that has it, say."""
    for policy, there in (('prompts', True), ('head-only', False), ('full', False)):
        cfg = config(pictures, base, tmp_path / policy, dict(ITERS, max_iters=3, val_interval=3))
        cfg.model.backbone.policy = policy
        cfg.param_scheduler = [
            dict(type='protune_mm.PromptWarmup', end=2),
            dict(type='ConstantLR', factor=0.5, by_epoch=False, end=3),
        ]
        seen = Seen()
        assert train(cfg, seen) is None
        assert seen.schedules == (['PromptWarmup'] if there else []) + ['ConstantLR']


class Seen(Hook):
    def before_train(self, runner):
        self.schedules = [type(each).__name__ for each in runner.param_schedulers]


def test_configs_of_every_form_lose_it():
    ours, other = dict(type=PromptWarmup, end=2), dict(type='LinearLR', end=3)
    assert without_warmup([ours, other]) == [other]
    assert without_warmup(dict(ours, type='PromptWarmup')) == []
    assert without_warmup(dict(a=[ours], b=other)) == dict(a=[], b=other)
    for untouched in (None, other, [other]):
        assert without_warmup(untouched) is untouched
