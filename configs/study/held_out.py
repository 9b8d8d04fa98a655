# What scale, width and drop rate of prompts do under corruption and attack and in other domains.
# The test split here is two tenths of the training images, so that the block can be chosen by it.
#     python tools/study.py configs/study/held_out.py --out docs/study/held-out
_base_ = ['./ablation.py']
note = (
    'The test images here are two tenths of the training images, not the test split: the scale of '
    'the prompts\nwas chosen by them. `inside-principal-drop0` is `inside-principal` once more: it, '
    '`-drop0.2` and\nthose with `fixed` ran on another processor than the rest, so their "time" compares '
    'two.\n'
    '[What came of it](../form.md#scale-and-accuracy-under-attack).'
)

# The scales, hidden channels left out at random, and first convolutions that stay as they start.
methods = ['full', *_base_.scales, *_base_.drops[::2], *_base_.fixes]
tasks = {
    '_delete_': True,
    'flowers5-held-out': dict(
        _base_.flowers5,
        fractions=[1.0],
        steps=300,
        lrs=[1e-3],
        seeds=_base_.seeds,
        scenarios=_base_.domains,
        cfg_options={
            **_base_.flowers5.cfg_options,
            'train_dataloader.dataset.indices': [i for i in range(3457) if i % 10 > 2],
            'val_dataloader.dataset.indices': [i for i in range(3457) if i % 10 == 0],
            'test_dataloader.dataset.data_prefix': 'train',
            'test_dataloader.dataset.indices': [i for i in range(3457) if i % 10 in (1, 2)],
        },
    ),
}
