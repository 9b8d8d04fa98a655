"""The guard hook fails a training in which a frozen tensor moves or a prompt gets no gradient."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from torch import nn

import protune_mm
from protune_mm.hooks import DivergedError, FiniteLossHook, FrozenGuardHook, digest
from protune_mm.runner import ProTuneRunner
from protune_mm.tuned import frozen_tensors
from tests.test_frozen import runner

pytestmark = pytest.mark.filterwarnings('ignore:Lazy modules are a new feature')
BACKBONE = dict(type='protune_mm.ProTuned', base='mmdet.ResNet', depth=18)


class Meddle(Hook):
    """Do something to the backbone at one point of the training."""

    priority = 'LOW'

    def __init__(self, when, what):
        self.what = what
        setattr(self, when, lambda run, *a, **k: self.what(run.model.backbone))


def train(tmp_path, meddle=None, backbone=BACKBONE, **more):
    hooks = [meddle] if meddle else []
    run = runner(tmp_path, backbone, ProTuneRunner, custom_hooks=hooks, **more)
    run.train()
    return run


def test_a_clean_training_passes_and_says_so(tmp_path):
    run = train(tmp_path)
    log = next(tmp_path.glob('*/*.log')).read_text()
    count = len(list(frozen_tensors(run.model)))
    assert f'{count} frozen tensors are bit-identical to the start' in log
    n = {
        'frozen': sum(p.numel() for p in run.model.backbone.parameters() if not p.requires_grad),
        'prompts': sum(p.numel() for p in protune_mm.tuned_parameters(run.model).values()),
        'head': sum(p.numel() for p in run.model.head.parameters()),
    }
    line = f'backbone frozen {n["frozen"]:,}, prompts {n["prompts"]:,} '
    assert line in log
    assert f'neck+head {n["head"]:,}' in log
    assert sum(isinstance(h, FrozenGuardHook) for h in run.hooks) == 1


MOVES = {
    'layer4.1.bn2.running_var': lambda b: b.layer4[1].bn2.running_var.add_(1e-7),
    'conv1.weight': lambda b: b.conv1.weight.data.mul_(1.0000001),
    'layer2.0.bn1.num_batches_tracked': lambda b: b.layer2[0].bn1.num_batches_tracked.add_(1),
}


@pytest.mark.parametrize('name', MOVES)
@pytest.mark.parametrize('when', ['after_train_iter', 'after_train_epoch'])
def test_the_first_tensor_that_moved_is_named(tmp_path, name, when):
    with pytest.raises(RuntimeError, match=f"frozen tensor 'backbone.{name}' moved"):
        train(tmp_path, Meddle(when, MOVES[name]))


def test_a_frozen_module_in_training_mode_is_named(tmp_path):
    meddle = Meddle('before_train', lambda b: b.layer3[0].bn1.train())
    with pytest.raises(RuntimeError, match=r"'backbone.layer3.0.bn1' is in training mode"):
        train(tmp_path, meddle)


def test_a_frozen_parameter_that_asks_for_a_gradient_is_named(tmp_path):
    meddle = Meddle('before_train', lambda b: b.conv1.requires_grad_(True))
    with pytest.raises(RuntimeError, match=r"'backbone.conv1.weight' requires a gradient"):
        train(tmp_path, meddle)


def test_a_prompt_without_gradient_is_named(tmp_path):
    def detach(backbone):
        backbone.layer4[1].prompt = nn.Sequential(nn.Identity(), Detached(512))

    class Detached(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(channels, channels, 1)

        def forward(self, x):
            return super().forward(x).detach()

    meddle = Meddle('before_train', detach)
    with pytest.raises(RuntimeError, match=r"'backbone.layer4.1.prompt.1.bias' got no gradient"):
        train(tmp_path, meddle)


def test_the_digest_sees_every_bit_and_the_shape():
    x = torch.arange(6, dtype=torch.float32)
    assert digest(x) == digest(x.clone())
    assert digest(x) != digest(x.reshape(2, 3))
    assert digest(x) != digest(x.double())
    assert digest(torch.tensor(0.0)) != digest(torch.tensor(-0.0)), 'bits, not values'
    assert digest(x.reshape(2, 3).t()) == digest(x.reshape(2, 3).t().contiguous())
    assert digest(torch.tensor([], dtype=torch.bfloat16))
    assert digest(torch.tensor(3))


def test_grad_accumulation_and_iteration_loops_pass(tmp_path):
    more = dict(
        train_cfg=dict(by_epoch=False, max_iters=4, val_interval=10),
        optim_wrapper=dict(
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.1), accumulative_counts=2
        ),
    )
    train(tmp_path, **more)


def test_an_ema_hook_passes_and_averages_the_prompts(tmp_path):
    from mmengine.hooks import EMAHook

    hook = EMAHook(momentum=0.5)
    run = runner(tmp_path, BACKBONE, ProTuneRunner, custom_hooks=[hook])
    run.train()
    averaged = dict(hook.ema_model.module.named_parameters())
    frozen = {name for name, _ in frozen_tensors(run.model)}
    for name, parameter in run.model.named_parameters():
        assert torch.equal(averaged[name], parameter) == (name in frozen), name


def test_a_checkpoint_holds_the_exact_frozen_tensors_whatever_an_average_does(tmp_path):
    """mmdet's EMA computes a * (1 - m) + b * m, which drifts by rounding where a equals b."""
    from mmdet.models.layers import ExpMomentumEMA

    run = runner(tmp_path, BACKBONE, ProTuneRunner)
    ema = ExpMomentumEMA(run.model, momentum=0.3, gamma=10)
    for _ in range(300):
        ema.update_parameters(run.model)
    drifted = {k: v.clone() for k, v in ema.module.state_dict().items()}
    checkpoint = dict(state_dict=drifted, ema_state_dict=ema.state_dict())
    exact = dict(frozen_tensors(run.model))
    assert any(not torch.equal(drifted[name], tensor) for name, tensor in exact.items())
    next(h for h in run.hooks if isinstance(h, FrozenGuardHook)).before_save_checkpoint(
        run, checkpoint
    )
    for name, tensor in exact.items():
        assert torch.equal(checkpoint['state_dict'][name], tensor), name
        assert torch.equal(checkpoint['ema_state_dict'][f'module.{name}'], tensor), name


def test_prompts_frozen_from_outside_stay_so_and_are_not_watched(tmp_path):
    run = runner(tmp_path, BACKBONE, ProTuneRunner)
    run.model.backbone.requires_grad_(False)
    run.train()
    assert not any(p.requires_grad for p in run.model.backbone.parameters())


def test_the_full_policy_has_no_guard(tmp_path):
    run = runner(tmp_path, dict(BACKBONE, policy='full'), ProTuneRunner)
    run.train()
    assert not any(isinstance(h, FrozenGuardHook) for h in run.hooks)
    assert 'Pro-tuning:' not in next(tmp_path.glob('*/*.log')).read_text()


def test_an_optimizer_object_is_taken_as_it_is(tmp_path):
    run = runner(tmp_path, BACKBONE, ProTuneRunner)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    run.optim_wrapper = dict(type='OptimWrapper', optimizer=torch.optim.SGD(trained, lr=0.1))
    run.train()


@pytest.mark.parametrize(
    ('bad', 'fixed', 'told'),
    [
        (range(5, 9), False, None),
        (range(5, 9), True, None),
        (range(3, 1000), False, 'loss scale of mixed precision has fallen to .* here;'),
        # As of loss_scale=512., which never falls.
        (range(3, 1000), True, 'no loss of the last 50 steps was a finite number, before .* 100:'),
    ],
)
def test_in_mixed_precision_a_training_whose_steps_are_all_left_out_ends(bad, fixed, told):
    """As AmpOptimWrapper does it, whose constructor asks for a GPU."""
    wrapper = AmpOptimWrapper.__new__(AmpOptimWrapper)
    wrapper.loss_scaler = torch.amp.GradScaler('cpu')
    layer, hook = nn.Linear(2, 1), FiniteLossHook()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    run = SimpleNamespace(optim_wrapper=wrapper, iter=0, max_iters=200, work_dir='here')

    def train():
        for run.iter in range(200):
            loss = layer(torch.ones(1, 2)).square().sum() * (torch.nan if run.iter in bad else 1)
            wrapper.loss_scaler.scale(loss).backward()
            wrapper.loss_scaler.step(optimizer)
            wrapper.loss_scaler.update(512.0 if fixed else None)
            optimizer.zero_grad()
            hook.after_train_iter(run, run.iter, outputs=dict(loss=loss.detach()))
            hook.before_save_checkpoint(run, {})

    if not told:
        train()
        return
    with pytest.raises(DivergedError, match=told):
        train()
