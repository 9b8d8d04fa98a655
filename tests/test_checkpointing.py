"""Options of mmengine's runner that touch the backbone: the same training, prompts included."""

import threading

import torch
from mmengine.registry import MODELS

import protune_mm
from protune_mm.runner import checkpoint_activations
from protune_mm.tuned import prompts
from tests.conftest import run_tool
from tests.small_runs import QUICK, SHAPES, data


def test_training_with_checkpointed_activations_is_the_same(trained, shapes, tmp_path):
    """Of the stem and of a block with its prompt; and of the whole backbone."""
    plain = torch.load(trained[0] / 'epoch_1.pth', weights_only=True)['state_dict']
    for regions in ('["backbone.conv1","backbone.layer2"]', 'backbone'):
        work = tmp_path / regions[:3]
        options = [*QUICK, *data(shapes), f'activation_checkpointing={regions}']
        done = run_tool('tools/train.py', SHAPES, '--work-dir', work, '--cfg-options', *options)
        assert 'bit-identical' in done.stdout + done.stderr
        state = torch.load(work / 'epoch_1.pth', weights_only=True)['state_dict']
        assert any('.prompt.' in name for name in state)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_folding_of_norms_leaves_a_frozen_backbone_out(trained, shapes, tmp_path):
    """mmengine would trace it, and cannot."""
    plain = torch.load(trained[0] / 'epoch_1.pth', weights_only=True)['state_dict']
    names = '["backbone","neck.fpn_convs.0.conv"]'
    options = [*QUICK, *data(shapes), f'efficient_conv_bn_eval={names}']
    done = run_tool('tools/train.py', SHAPES, '--work-dir', tmp_path, '--cfg-options', *options)
    assert 'efficient_conv_bn_eval leaves the frozen backbone out' in done.stdout + done.stderr
    assert "feature for sub-modules: ['neck.fpn_convs.0.conv']" in done.stdout + done.stderr
    state = torch.load(tmp_path / 'epoch_1.pth', weights_only=True)['state_dict']
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, plain[name], rtol=1e-4, atol=1e-5, msg=name)


def test_blocks_of_tokens_are_computed_again_for_their_own_image():
    """Of images of two shapes, and in another thread, as on a GPU."""
    torch.manual_seed(0)
    base = dict(type='mmpretrain.VisionTransformer', arch='deit-tiny', out_type='featmap')
    tuned = protune_mm.protune(MODELS.build(dict(base, img_size=64))).train()
    for prompt in prompts(tuned).values():
        torch.nn.init.normal_(prompt.up.weight)
    images = [torch.randn(1, 3, *size) for size in ((32, 64), (64, 32))]

    def backward():
        tuned.zero_grad()
        outs = [tuned(image)[-1].square().mean() for image in images]
        thread = threading.Thread(target=sum(outs).backward)
        thread.start()
        thread.join()
        return {n: p.grad for n, p in protune_mm.tuned_parameters(tuned).items()}

    plain = backward()
    for layer in tuned.layers[1:]:
        checkpoint_activations(layer)
    again = backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, msg=name)  # float32
