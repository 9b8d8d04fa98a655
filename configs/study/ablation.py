# What the paper's figure leaves open, with few labels: the block and its places. Chosen by the
# validation split alone.
#     python tools/study.py configs/study/ablation.py --results ablations.jsonl
_base_ = ['./cpu.py']

tasks = dict(_delete_=True, flowers5=dict(_base_.tasks.flowers5, fractions=[0.05]))
gn = dict(type='GN', num_groups=1)
norm = dict(hidden=48, norm_cfg=gn)
variants = {
    'stages': dict(),
    'stages-norm': dict(prompt=dict(norm_cfg=gn)),
    'stages-paper': dict(prompt='paper'),
    'stages-ratio2': dict(prompt=dict(ratio=2)),
    'late-stages': dict(stages=['layer5', 'layer6', 'layer7']),
    'blocks': dict(stages='blocks'),
    'blocks-hidden48': dict(stages='blocks', prompt=dict(hidden=48)),
    'blocks-hidden48-fan-in': dict(stages='blocks', prompt=dict(hidden=48, init_mode='fan_in')),
    'norm': dict(stages='blocks', prompt=norm),
    'norm-linear': dict(stages='blocks', prompt=dict(norm, act_cfg=None)),
    'norm-relu': dict(stages='blocks', prompt=dict(norm, act_cfg=dict(type='ReLU'))),
    'norm-kernel3': dict(stages='blocks', prompt=dict(norm, kernel_size=3)),
    'norm-kernel7': dict(stages='blocks', prompt=dict(norm, kernel_size=7)),
    'norm-dense': dict(stages='blocks', prompt=dict(norm, hidden=16, depthwise=False)),
    'norm-scale': dict(stages='blocks', prompt=dict(norm, learnable_scale=True)),
    'norm-random': dict(stages='blocks', prompt=dict(norm, zero_init=False, scale=0.1)),
    'norm-series': dict(stages='blocks', prompt=dict(norm, last='series')),
    'norm-rate3': dict(stages='blocks', prompt=norm, prompt_lr_mult=3.0),
    'norm-rate0.3': dict(stages='blocks', prompt=norm, prompt_lr_mult=0.3),
    'norm-hidden24': dict(stages='blocks', prompt=dict(norm, hidden=24)),
}
methods = list(variants)
