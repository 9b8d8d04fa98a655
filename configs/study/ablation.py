# What the paper's figure leaves open, with few labels: the block and its places. Chosen by the
# validation split alone.
#     python tools/study.py configs/study/ablation.py --results ablations.jsonl
_base_ = ['./cpu.py']

lrs = [1e-3, 3e-3, 1e-2]
tasks = dict(_delete_=True, flowers5=dict(_base_.tasks.flowers5, fractions=[0.05]))
gn = dict(type='GN', num_groups=1)
variants = {
    'stages': dict(),
    'blocks': dict(stages='blocks'),
    'blocks-hidden48': dict(stages='blocks', prompt=dict(hidden=48)),
    'blocks-hidden48-norm': dict(stages='blocks', prompt=dict(hidden=48, norm_cfg=gn)),
    'blocks-hidden48-norm-linear': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn, act_cfg=None)
    ),
    'stages-norm': dict(prompt=dict(norm_cfg=gn)),
    'stages-paper': dict(prompt='paper'),
    'late-stages': dict(stages=['layer5', 'layer6', 'layer7']),
    'stages-ratio2': dict(prompt=dict(ratio=2)),
    'blocks-hidden48-linear': dict(stages='blocks', prompt=dict(hidden=48, act_cfg=None)),
    'blocks-hidden48-norm-relu': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn, act_cfg=dict(type='ReLU'))
    ),
    'blocks-hidden48-norm-kernel3': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn, kernel_size=3)
    ),
    'blocks-hidden48-norm-kernel7': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn, kernel_size=7)
    ),
    'blocks-hidden16-norm-dense': dict(
        stages='blocks', prompt=dict(hidden=16, norm_cfg=gn, depthwise=False)
    ),
    'blocks-hidden48-norm-scale': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn, learnable_scale=True)
    ),
    'blocks-hidden48-norm-rate3': dict(
        stages='blocks', prompt=dict(hidden=48, norm_cfg=gn), prompt_lr_mult=3.0
    ),
}
methods = list(variants)
