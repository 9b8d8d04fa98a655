"""``prompt.features='plain'``: a neck reads the stages' outputs as they are before their prompt."""

import pytest
import torch

from tests.conftest import EXAMPLES, flat, image, move_prompts, pair

PLAIN = dict(features='plain')
RETURNED = ('ResNet', 'MobileNetV2')
"""Families that return the outputs of their stages themselves."""
MAPS = [case for case in EXAMPLES if case.values[1].name in RETURNED]
RESNET = MAPS[0].values


def several(family):
    """What makes a classifier's backbone return the outputs of several stages."""
    return dict(out_indices=(1, 2, 3)) if family.name in RETURNED else {}


def both(library, family):
    """A backbone with prompted and one with plain outputs, and the same prompts."""
    outputs = several(family)
    _, prompted = pair(library, family, lean=False, **outputs)
    _, plain = pair(library, family, lean=False, prompt=PLAIN, **outputs)
    move_prompts(prompted)
    plain.load_state_dict(prompted.state_dict())
    return prompted.eval(), plain.eval()


@pytest.mark.parametrize(('library', 'family'), EXAMPLES)
def test_outputs_are_what_the_prompts_read(library, family):
    prompted, plain = both(library, family)
    read = []
    for block in prompted.modules():
        if hasattr(block, '_protune_site'):
            block.prompt.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    wanted = flat(prompted(image()))
    if family.name not in RETURNED:
        # A norm comes after the block, or tokens become a map.
        with pytest.raises(RuntimeError, match=r"prompt\.features='plain'"):
            plain(image())
        return
    got = flat(plain(image()))
    replaced = 0
    for a, b in zip(wanted, got, strict=True):
        assert a.shape == b.shape
        if not torch.equal(a, b):
            replaced += 1
            assert any(x.shape == b.shape and torch.equal(x, b) for x in read)
    assert torch.equal(wanted[-1], got[-1]), 'the last stage is prompted'
    assert replaced == len(wanted) - 1


@pytest.mark.parametrize(('library', 'family'), MAPS)
@pytest.mark.parametrize('lean', [False, True])
def test_every_prompt_has_a_gradient(library, family, lean):
    _, plain = pair(library, family, lean=lean, prompt=PLAIN, **several(family))
    move_prompts(plain)
    plain.train()
    sum(x.square().mean() for x in flat(plain(image()))).backward()
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is not None) == ('.prompt.' in name), name


def test_prompts_of_layers_have_no_plain_features():
    with pytest.raises(ValueError, match=r"features='plain'"):
        pair(*RESNET, prompt=dict(type='LoRA', features='plain'))


def test_unknown_choice():
    with pytest.raises(ValueError, match=r"prompt\.features='raw' is unknown: use one of prompted"):
        pair(*RESNET, prompt=dict(features='raw'))
