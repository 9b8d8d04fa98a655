# The study of docs/study, sized for two CPU cores: short schedules, small images.
#     python tools/study.py configs/study/cpu.py --out docs/study
# PROTUNE_DATA and PROTUNE_WEIGHTS name the folders of data and weights.
note = (
    'Where "time" is empty, the runs of that line were made on another machine than the others. Where\n'
    'Pro-tuning has one, that of all methods is of the rates that all ran on one machine: 0.06 in\n'
    'camvid and camvid-r18 (with a quarter of the multiple), 0.01 and 0.03 (with a part of it) in\n'
    'flowers5-long-tailed, and 0.01 in flowers5-vit.'
)
methods = [
    'full', 'head-only', 'pro-tuning', 'bias', 'norm', 'last-k', 'adapter', 'conv-adapter', 'lora',
    'mona', 'lorand',
]  # fmt: skip
lrs = [3e-4, 1e-3, 3e-3, 1e-2]
seeds = [0, 1, 2]
# For tasks where three left Pro-tuning and full fine-tuning nearer than the standard error of their
# difference in any row, whichever was ahead.
more_seeds = [0, 1, 2, 3, 4]

size = 80
flowers5 = dict(
    config='configs/small/mobilenetv2_protune_flowers5.py',
    backbone='MobileNetV2',
    metrics=['accuracy/top1'],
    steps=250,
    few_steps=300,
    channels_last=True,
    cfg_options={
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.pipeline.1.scale': size,
        'val_dataloader.batch_size': 64,
        'val_dataloader.dataset.pipeline.1.scale': (size, size),
        'test_dataloader.batch_size': 64,
        'test_dataloader.dataset.pipeline.1.scale': (size, size),
    },
)
# What a classifier is tested by besides, on a part of its test images.
domains = dict(
    every=4,
    severities=[3],
    # Other domains of the same classes: no second set has these five flowers. Rotate turns to either
    # side, at random.
    shifts={
        'grey': [dict(type='RandomGrayscale', prob=1.0, keep_channels=True)],
        'inverted': [dict(type='Invert', prob=1.0)],
        'turned': [dict(type='Rotate', angle=45.0, prob=1.0)],
    },
    attacks=dict(fgsm=[0.25], pgd=[0.25]),
)
# Detection, segmentation and instance segmentation.
fruit = dict(
    config='configs/small/retinanet_protune_mobilenetv2_fruit.py',
    backbone='MobileNetV2',
    metrics=['coco/bbox_mAP'],
    seeds=more_seeds,
    steps=400,
    lrs=[5e-4, 1e-3, 2e-3],
    channels_last=True,
    scenarios=dict(every=3, severities=[3]),
    cfg_options={
        'train_dataloader.batch_size': 4,
        'train_dataloader.dataset.pipeline.2.scale': (160, 160),
        'val_dataloader.dataset.pipeline.1.scale': (160, 160),
        'test_dataloader.dataset.pipeline.1.scale': (160, 160),
    },
)
bccd = dict(
    fruit,
    config='configs/small/retinanet_protune_mobilenetv2_bccd.py',
    fractions=[1.0],
    steps=300,
    lrs=[5e-4, 1e-3, 2e-3, 4e-3],
    scenarios=dict(every=6, severities=[3]),
)
# At the 10 of the configs single seeds of fruit fail with most methods. By validation 1 is no worse for
# any method, in bccd neither: `fruit-max-norm10` and `bccd-max-norm10` of ablation.py have 10.
clip = {'optim_wrapper.clip_grad.max_norm': 1.0}
camvid = dict(
    config='configs/small/fcn_protune_mobilenetv2_camvid.py',
    backbone='MobileNetV2',
    metrics=['mIoU'],
    steps=250,
    lrs=[3e-3, 1e-2, 3e-2, (6e-2, 0.25), (6e-2, 0.5), 6e-2],
    # The head is new and wants ten to twenty times the rate of what is in the backbone, and a
    # hundred to two hundred where all of the backbone trains (by validation).
    prompt_lr_mult=0.1,
    full_lr_mult=0.01,
    channels_last=True,
    scenarios=dict(every=16, severities=[3]),
    cfg_options={
        'model.data_preprocessor.size': (96, 128),
        'train_dataloader.batch_size': 4,
        'train_dataloader.dataset.pipeline.2.scale': (160, 120),
        'train_dataloader.dataset.pipeline.3.crop_size': (96, 128),
        'val_dataloader.batch_size': 8,
        'val_dataloader.dataset.pipeline.1.scale': (160, 120),
        'test_dataloader.batch_size': 8,
        'test_dataloader.dataset.pipeline.1.scale': (160, 120),
    },
)
# At three to six times the rate of the other tasks (3e-2 * 0.1 and more) prompts want a smaller scale,
# and in 250 steps a warm-up: by validation, `camvid-warmup` of ablation.py, where it brings LoRA and the
# adapter nothing.
camvid_prompt = dict(hidden=20, scale=0.22)
# The same where all three convolutions train: see `trained` below.
camvid_trained = dict(fixed_down=False, hidden=10, scale=0.32)
tasks = {
    'flowers5': dict(flowers5, seeds=more_seeds, fractions=[0.05, 0.2], lrs=[3e-4, 1e-3, 3e-3]),
    'flowers5-robust': dict(
        flowers5,
        seeds=more_seeds,
        fractions=[1.0],
        steps=300,
        lrs=[3e-4, 1e-3, 3e-3],
        scenarios=domains,
    ),
    'flowers5-long-tailed': dict(
        flowers5,
        seeds=more_seeds,
        fractions=[1.0],
        steps=450,
        # Few images of a class want a faster head than what is in the backbone does: 1e-3 there, and
        # 1e-4 of full fine-tuning, the best of most methods at one rate for both.
        lrs=[*lrs, (1e-2, 0.1), (3e-2, 0.03)],
        long_tail=50,
        metrics=['shots/mean', 'shots/many', 'shots/medium', 'shots/few'],
    ),
    'camvid': dict(
        camvid,
        seeds=more_seeds,
        fractions=[1.0, 0.2],
        options={'pro-tuning': dict(prompt=camvid_prompt, prompt_warmup=0.5)},
    ),
    # 250 steps are few for a head from scratch: with four times as many it no longer decides alone.
    'camvid-longer': dict(
        camvid,
        fractions=[1.0],
        steps=1000,
        lrs=[1e-2, 3e-2, (6e-2, 0.5), 6e-2],
        options={'pro-tuning': dict(prompt=camvid_prompt)},
    ),
    'fruit': dict(
        fruit,
        fractions=[1.0, 0.25],
        lrs=[5e-4, 1e-3, 2e-3, 4e-3],
        cfg_options={**fruit['cfg_options'], **clip},
    ),
    'flowers5-vit': dict(
        flowers5,
        config='configs/small/vit-s_protune_flowers5.py',
        backbone='ViT-S',
        fractions=[0.2],
        few_steps=100,
        lrs=[*lrs, 3e-2],
        # A multiple of its patches of 14 pixels.
        cfg_options={
            **flowers5['cfg_options'],
            'train_dataloader.dataset.pipeline.1.scale': 84,
            'val_dataloader.dataset.pipeline.1.scale': (84, 84),
            'test_dataloader.dataset.pipeline.1.scale': (84, 84),
        },
        # As in segmentation: what is in the backbone wants a lower rate than the new head. Pro-tuning,
        # biases and norms do not: by validation, `flowers5-vit-one-rate` and `-low-rate` of ablation.py.
        full_lr_mult=0.01,
        options={
            'last-k': dict(prompt_lr_mult=0.1),
            # It starts as its authors' code does: by validation, `flowers5-vit-starts`.
            'adapter': dict(prompt_lr_mult=0.1, prompt=dict(authors_init=True)),
            'conv-adapter': dict(prompt_lr_mult=0.1),
            'lora': dict(prompt_lr_mult=0.1),
            'mona': dict(prompt_lr_mult=0.1),
            'lorand': dict(prompt_lr_mult=0.1),
        },
    ),
    'camvid-r18': dict(
        camvid,
        config='configs/small/fcn_protune_r18_camvid.py',
        backbone='ResNet-18',
        fractions=[1.0],
        options={'pro-tuning': dict(prompt_warmup=0.5)},
    ),
    'bccd': dict(bccd, lrs=[1e-3, 2e-3, 4e-3], cfg_options={**bccd['cfg_options'], **clip}),
    'camvid-instances': dict(
        config='configs/small/mask_rcnn_protune_mobilenetv2_camvid.py',
        backbone='MobileNetV2',
        metrics=['coco/segm_mAP', 'coco/bbox_mAP'],
        seeds=more_seeds,
        fractions=[1.0],
        steps=300,
        lrs=[1e-3, 2e-3, 4e-3],
        channels_last=True,
        cfg_options={
            'train_dataloader.batch_size': 2,
            'train_dataloader.dataset.pipeline.2.scale': (256, 192),
            'val_dataloader.dataset.pipeline.1.scale': (256, 192),
            'test_dataloader.dataset.pipeline.1.scale': (256, 192),
        },
    ),
}

# In MobileNetV2 LoRA, LoRand and ConvAdapter are wider than by the defaults of their papers, which train
# 2.5 to 6.1 % of the backbone, and Mona is narrower (14.1 %), so that width alone does not decide: all
# prompts train 4.3 to 9.1 %. In the other networks rivals have the defaults, 1.1 to 6.4 %. ConvAdapter
# beside every convolution comes before batch norms that multiply by up to a hundred, so it is beside
# blocks.
options = dict(
    MobileNetV2={
        'conv-adapter': dict(prompt=dict(beside='block', ratio=2)),
        'lora': dict(prompt=dict(rank=12)),
        'mona': dict(prompt=dict(hidden=40)),
        'lorand': dict(prompt=dict(rank=16)),
    },
)
# By validation: docs/study/form.md. In MobileNetV2 it is prompt='principal', as wide as the library
# makes it. In the others the scale is one over the root of the width: the wider a hidden layer is, the
# farther a step of Adam moves what the prompt adds at one scale.
# Where a task does not say otherwise prompts, biases, norms and last blocks train at the rate of
# the head, and the whole backbone of full fine-tuning, as in the libraries' configs, at a tenth.
# `trained`: all three convolutions train; most ablations and the longer trainings came before the
# other one and have it. `principal`: the first one stays as it starts; this study has it.
trained = dict(stages='inside', prompt=dict(init_mode='principal', act_cfg=None))
principal = dict(trained, prompt=dict(trained['prompt'], fixed_down=True, scale=0.7))
options['MobileNetV2']['pro-tuning'] = principal
for family, hidden in (('ResNet-18', 192), ('ViT-S', 96)):
    prompt = dict(principal['prompt'], hidden=hidden, scale=round(hidden**-0.5, 2))
    options[family] = {'pro-tuning': dict(principal, prompt=prompt)}
del family, hidden, prompt
