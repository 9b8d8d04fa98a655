"""Options of mmengine's runner that touch the backbone: the same training, prompts included."""

import torch

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
