# The study of docs/study, sized for two CPU cores: short schedules, small images.
#     python tools/study.py configs/study/cpu.py
# PROTUNE_DATA and PROTUNE_WEIGHTS name the folders of data and weights.
methods = [
    'full', 'head-only', 'pro-tuning', 'bias', 'norm', 'last-k', 'adapter', 'conv-adapter', 'lora',
    'mona', 'lorand',
]  # fmt: skip
lrs = [3e-4, 1e-3, 3e-3]
seeds = [0, 1, 2]

flowers5 = dict(
    config='configs/small/mobilenetv2_protune_flowers5.py',
    backbone='MobileNetV2',
    metrics=['accuracy/top1'],
    steps=400,
    few_steps=150,
    cfg_options={
        'train_dataloader.batch_size': 16,
        'val_dataloader.batch_size': 64,
        'test_dataloader.batch_size': 64,
    },
)
tasks = {
    'flowers5': dict(flowers5, fractions=[0.05]),
    'flowers5-robust': dict(
        flowers5,
        fractions=[1.0],
        scenarios=dict(every=4, severities=[3], attacks=dict(fgsm=[0, 0.25], pgd=[0.25])),
    ),
    'flowers5-long-tailed': dict(
        flowers5,
        fractions=[1.0],
        steps=150,
        long_tail=50,
        metrics=['shots/mean', 'shots/many', 'shots/medium', 'shots/few'],
    ),
}

# At most a tenth of the backbone's parameters for every method that does not train all of them.
options = dict(
    MobileNetV2={
        'adapter': dict(prompt=dict(hidden=48)),
        'conv-adapter': dict(prompt=dict(ratio=64)),
        'lora': dict(prompt=dict(rank=4)),
        'mona': dict(prompt=dict(hidden=32)),
        'lorand': dict(prompt=dict(rank=8)),
    },
)
