# The study of cpu.py, longer, at the size the weights were made for: for one GPU.
#     python tools/study.py configs/study/gpu.py --out work_dirs/study_gpu
# The scales of the prompts are those of cpu.py and were not chosen for as many steps.
_base_ = ['./cpu.py']

seeds = [0, 1, 2, 3, 4]
size = 224
classify = dict(
    steps=2000,
    few_steps=600,
    cfg_options={
        'train_dataloader.batch_size': 32,
        'train_dataloader.num_workers': 4,
        'train_dataloader.dataset.pipeline.1.scale': size,
        'val_dataloader.dataset.pipeline.1.scale': (size, size),
        'test_dataloader.dataset.pipeline.1.scale': (size, size),
    },
)
longer = dict(
    steps=3000,
    few_steps=1500,
    cfg_options={'train_dataloader.batch_size': 8, 'train_dataloader.num_workers': 4},
)
# Images of the size of the config, not of the study for CPUs.
own_size = dict(longer, cfg_options=dict(longer['cfg_options'], _delete_=True))
tasks = {
    'flowers5': dict(classify, fractions=[0.02, 0.05, 0.1, 0.2, 1.0]),
    'flowers5-robust': dict(
        classify,
        scenarios=dict(
            every=1,
            severities=[1, 2, 3, 4, 5],
            attacks=dict(fgsm=[0, 0.25, 0.5, 1], pgd=[0.25, 0.5, 1], autoattack=[0.5]),
        ),
    ),
    'flowers5-long-tailed': dict(classify),
    'camvid': dict(own_size, fractions=[1.0, 0.2, 0.05]),
    'fruit': dict(own_size, fractions=[1.0, 0.25]),
    'flowers5-vit': dict(classify, fractions=[0.05, 0.2, 1.0]),
    'camvid-r18': dict(own_size, fractions=[1.0, 0.2]),
    'bccd': dict(own_size, fractions=[1.0, 0.25]),
    'camvid-instances': dict(own_size),
}
