"""Many tasks on one frozen backbone: each computes what a model of its own would."""

import copy
import threading

import pytest
import torch
from mmengine.registry import DefaultScope

import protune_mm
from protune_mm.checkpoints import tuned_state_dict
from protune_mm.tuned import frozen_tensors, prompts
from tests.conftest import (
    EVERY,
    EXAMPLES,
    build_protuned,
    build_stock,
    flat,
    image,
    move_prompts,
    pair,
)

examples = pytest.mark.parametrize(('library', 'family'), EXAMPLES)
TASKS = ('birds', 'cars', 'dogs')


def moved(backbone, seed):
    """Prompts with a visible effect, another for each seed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in protune_mm.tuned_parameters(backbone).values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return backbone


@pytest.fixture
def tasks(request):
    """A backbone with three sets, and three models of their own."""
    library, family, more = request.param
    alone = [moved(pair(library, family, **more)[1], seed) for seed in range(3)]
    shared = pair(library, family, **more)[1]
    sets = protune_mm.PromptSets(shared, 'first')
    for name, backbone in zip(TASKS, alone, strict=True):
        sets.load(name, tuned_state_dict(backbone))
    stock = pair(library, family)[0]
    return sets, dict(zip(TASKS, alone, strict=True)), stock


def cases(*more):
    return pytest.mark.parametrize(
        'tasks',
        [
            pytest.param((*p.values, options), id=f'{p.id}-{options}')
            for p in EXAMPLES
            for options in more
        ],
        indirect=True,
    )


def close(a, b, tolerance=0.0):
    pairs = list(zip(flat(a), flat(b), strict=True))
    return all((x - y).abs().max() <= tolerance * y.abs().max() for x, y in pairs)


@cases({}, dict(prompt=dict(type='LoRA', rank=2)))
@torch.no_grad()
def test_switching_is_another_model(tasks):
    sets, alone, stock = tasks
    x = image()
    assert list(sets) == ['first', *TASKS]
    for name in (*TASKS, *reversed(TASKS)):
        sets.switch(name)
        assert close(sets.backbone(x), alone[name](x))
        state = sets.backbone.state_dict()
        assert all(torch.equal(state[k], v) for k, v in alone[name].state_dict().items())
    sets.disable()
    assert close(sets.backbone(x), stock(x), 1e-4)  # float32: lean folds batch norms
    with sets.use('cars'):
        assert close(sets.backbone(x), alone['cars'](x))
        with sets.use(None):
            assert close(sets.backbone(x), stock(x), 1e-4)
        assert close(sets.backbone(x), alone['cars'](x))
    sets.switch('dogs')
    assert close(sets.backbone(x), alone['dogs'](x))


@examples
@torch.no_grad()
def test_disabled_is_exactly_the_stock_model(library, family):
    stock, tuned = pair(library, family, lean=False)
    move_prompts(tuned)
    protune_mm.PromptSets(tuned).disable()
    assert close(tuned(image()), stock(image()))


@cases({}, dict(stages='blocks'), dict(prompt=dict(type='LoRA', rank=2)), dict(affine=True))
@torch.no_grad()
def test_together_is_each_alone(tasks):
    sets, alone, stock = tasks
    x = image()
    out = sets.together(x, ['cars', None, 'birds', 'dogs'])
    assert list(out) == ['cars', None, 'birds', 'dogs']
    for name in TASKS:
        assert close(out[name], alone[name](x), 1e-4)  # float32: kernels for other batch sizes
    assert close(out[None], stock(x), 1e-4)
    one = x[:1]
    assert close(sets.together(one, ['cars', 'birds'])['birds'], alone['birds'](one), 1e-4)


@pytest.mark.parametrize(('library', 'family'), EVERY)
@torch.no_grad()
def test_together_fits_every_backbone(library, family):
    with DefaultScope.overwrite_default_scope(library):
        x = image()
        try:
            flat(build_stock(library, family)(x))
        except (RuntimeError, AssertionError, AttributeError):
            return  # It takes images of one size only.
        backbone = build_protuned(library, family)
        for _, tensor in frozen_tensors(backbone):
            # Some layers leave theirs as they find the memory.
            if tensor.is_floating_point() and tensor.ndim > 1:
                torch.nn.init.normal_(tensor, std=0.05)
        moved(backbone, 1)
        sets = protune_mm.PromptSets(backbone, 'a')
        sets.add('b')
        sets.switch('b')
        moved(backbone, 2)
        expected = {}
        for name in ('a', 'b'):
            sets.switch(name)
            expected[name] = backbone(x)
        out = sets.together(x, ['b', 'a'])
    for name in ('a', 'b'):
        assert close(out[name], expected[name], 2e-4)  # float32


@torch.no_grad()
def test_frozen_work_before_the_first_prompt_is_done_once():
    library, family = EXAMPLES[0].values
    backbone = pair(library, family, stages=['layer4'])[1]
    sets = protune_mm.PromptSets(backbone, 'a')
    sets.add('b')
    seen = {}
    for name in ('conv1', 'layer3', 'layer4'):
        backbone.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.setdefault(name, []).append(len(args[0]))
        )
    sets.together(image(2), ['a', 'b'])
    assert seen == dict(conv1=[2], layer3=[2], layer4=[2]), 'the prompt is the last that runs'
    backbone = pair(library, family, stages=['layer3', 'layer4'])[1]
    sets = protune_mm.PromptSets(backbone, 'a')
    sets.add('b')
    seen.clear()
    for name in ('layer3', 'layer4'):
        backbone.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen.setdefault(name, []).append(len(args[0]))
        )
    sets.together(image(2), ['a', 'b'])
    assert seen == dict(layer3=[2], layer4=[4])


@cases({})
def test_threads_serve_different_tasks(tasks):
    sets, alone, stock = tasks
    x = image()
    with torch.no_grad():
        expected = {name: alone[name](x) for name in TASKS}
        expected[None] = sets.backbone.eval() and stock(x)
    wrong, done = [], []
    start = threading.Barrier(5)

    def serve(name):
        start.wait()
        with torch.no_grad(), sets.use(name):
            for _ in range(12):
                if not close(sets.backbone(x), expected[name], 1e-4):
                    wrong.append(name)
        done.append(name)

    def disturb():
        start.wait()
        for _ in range(200):
            for name in TASKS:
                sets.switch(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in (*TASKS, None)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, done)) == sorted(map(str, (*TASKS, None)))
    assert wrong == []


@cases({})
def test_a_set_can_be_trained_saved_and_loaded(tasks, tmp_path):
    sets = tasks[0]
    x = image()
    sets.add('new')
    sets.switch('new')
    backbone = sets.backbone.train()
    before = {n: t.clone() for n, t in frozen_tensors(backbone)}
    others = {n: [copy.deepcopy(p.state_dict()) for p in sets[n]] for n in TASKS}
    optimizer = torch.optim.SGD(protune_mm.tuned_parameters(backbone).values(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        sum(o.square().mean() for o in flat(backbone(x))).backward()
        optimizer.step()
    backbone.eval()
    assert all(torch.equal(t, before[n]) for n, t in frozen_tensors(backbone))
    for name in TASKS:
        for prompt, old in zip(sets[name], others[name], strict=True):
            assert all(torch.equal(old[k], v) for k, v in prompt.state_dict().items())
    with torch.no_grad():
        expected = backbone(x)
    sets.save('new', tmp_path / 'new.pth')
    sets.switch('cars')
    sets.remove('new')
    assert 'new' not in sets
    sets.load('again', tmp_path / 'new.pth')
    with torch.no_grad(), sets.use('again'):
        assert close(backbone(x), expected)


def resnet(**more):
    library, family = EXAMPLES[0].values
    return pair(library, family, **more)[1]


def test_all_sets_are_in_the_mode_of_the_backbone():
    backbone = resnet(prompt=dict(drop_rate=0.5)).train()
    sets = protune_mm.PromptSets(backbone, 'a')
    sets.add('b')
    sets.switch('b')
    for mode in (False, True, False):
        backbone.train(mode)
        sets.add(f'while {mode}') if f'while {mode}' not in sets else None
        assert {p.training for name in sets for each in sets[name] for p in each.modules()} == {
            mode
        }
    moved(backbone, 1)
    with torch.no_grad(), sets.use('a'):
        assert close(backbone(image()), backbone(image()))
    assert set(sets.together(image(), ['a', 'b'])) == {'a', 'b'}
    sets.switch('a')
    assert not any(p.training for p in prompts(backbone).values())


@pytest.mark.filterwarnings('ignore:torch.utils.checkpoint. the use_reentrant')  # The libraries'.
def test_blocks_that_are_computed_again_find_the_chosen_prompts():
    library, family = EXAMPLES[0].values
    backbone = moved(pair(library, family, prompt=dict(type='LoRA'), with_cp=True)[1], 1).train()
    sets = protune_mm.PromptSets(backbone, 'a')
    sets.add('b')
    x = image().requires_grad_()
    for wrong in ('b', None):
        with (
            sets.use(wrong),
            pytest.raises(RuntimeError, match=r'with_cp=True.*other prompts than'),
        ):
            backbone(x)
        with sets.use(wrong), torch.no_grad():
            backbone(x)
    sets.switch('b')
    sum(o.square().mean() for o in flat(backbone(x))).backward()
    # Prompts after blocks are outside of what is computed again.
    after = moved(pair(library, family, with_cp=True)[1], 1).train()
    others = protune_mm.PromptSets(after, 'a')
    others.add('b')
    with others.use('b'):
        sum(o.square().mean() for o in flat(after(x))).backward()
    assert all(p.up.weight.grad is not None for p in others['b'])
    grads = {name: [p.up.weight.grad is not None for p in sets[name]] for name in ('a', 'b')}
    assert all(grads['b'])
    assert not any(grads['a'])


def test_bad_input_is_one_clear_error(tmp_path):
    backbone = resnet()
    sets = protune_mm.PromptSets(backbone, 'a')
    for call, error, message in (
        (lambda: sets.switch('b'), KeyError, "no prompt set 'b': there are a"),
        (lambda: sets.use('b').__enter__(), KeyError, "no prompt set 'b'"),
        (lambda: sets.remove('a'), ValueError, "'a' is in use"),
        (lambda: sets.add('a'), ValueError, "'a' is there already"),
        (lambda: sets.add(3), ValueError, '3 is no name'),
        (lambda: sets.together(image(), []), ValueError, 'one at least'),
        (lambda: sets.together(image(), ['a', 'a']), ValueError, 'each set once'),
        (lambda: sets.load('b', {}), ValueError, 'prompts of 0 backbones'),
        (lambda: sets.load('b', tmp_path / 'no.pth'), FileNotFoundError, 'no.pth'),
        (lambda: protune_mm.PromptSets(backbone), ValueError, 'has prompt sets already'),
        (lambda: protune_mm.PromptSets(torch.nn.Linear(1, 1)), ValueError, 'has 0 Pro-tuned'),
        (
            lambda: sets.load('b', tuned_state_dict(resnet(prompt=dict(ratio=4)))),
            ValueError,
            'prompt.ratio=4',
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    torch.manual_seed(5)
    library, family = EXAMPLES[0].values
    other = resnet()
    other.load_state_dict(build_stock(library, family).state_dict())
    with pytest.raises(RuntimeError, match='tuned on another base'):
        sets.load('b', tuned_state_dict(other))
    assert list(sets) == ['a']
    backbone.train()
    with pytest.raises(ValueError, match=r'call eval\(\) first'):
        sets.together(image(), ['a'])


def test_a_copy_has_no_sets_of_its_own():
    backbone = moved(resnet(), 1)
    sets = protune_mm.PromptSets(backbone, 'a')
    sets.disable()
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        assert not close(twin(image()), backbone(image()))
    assert len(prompts(twin)) == len(prompts(backbone))
    protune_mm.PromptSets(twin)
