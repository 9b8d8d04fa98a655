# The study of cpu.py, longer, at the size the weights were made for: for one GPU.
#     python tools/study.py configs/study/gpu.py --out docs/study/gpu --jobs 16
# Models and images are small: a GPU holds many runs, each of which loads its own images.
# The scales of the prompts are those of cpu.py and were not chosen for as many steps.
_base_ = ['./cpu.py']

note = '''Part of a study: full, head-only, pro-tuning and lora, in two of the tasks. Sixteen runs shared one
GPU, so "time" is of a GPU that others used as well. [What came of it](../findings.md).'''
size = 224
classify = dict(
    seeds=[0, 1, 2],
    steps=600,
    few_steps=300,
    cfg_options={
        'train_dataloader.batch_size': 32,
        'train_dataloader.dataset.pipeline.1.scale': size,
        'val_dataloader.dataset.pipeline.1.scale': (size, size),
        'test_dataloader.dataset.pipeline.1.scale': (size, size),
    },
)
longer = dict(
    seeds=[0, 1, 2],
    steps=3000,
    few_steps=1500,
    cfg_options={'train_dataloader.batch_size': 8, 'train_dataloader.num_workers': 4},
)
# Images of the size of the config, not of the study for CPUs.
own_size = dict(longer, cfg_options=dict(longer['cfg_options'], _delete_=True))
tasks = {
    # Run so far, with full, head-only, pro-tuning and lora: two seeds of this, three of flowers5
    # with 5 % of the labels. The machine was lent for no longer; the third seed is to follow.
    'flowers5-robust': dict(classify, seeds=[0, 1]),
    'flowers5': dict(classify),
    'flowers5-long-tailed': dict(classify),
    'camvid': dict(own_size, fractions=[1.0, 0.2, 0.05]),
    'fruit': dict(own_size),
    'flowers5-vit': dict(classify, fractions=[0.05, 0.2, 1.0]),
    'camvid-r18': dict(own_size, fractions=[1.0, 0.2]),
    'bccd': dict(own_size, fractions=[1.0, 0.25]),
    'camvid-instances': dict(own_size),
}
