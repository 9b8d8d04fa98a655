# What the paper's figure leaves open, with few labels: the block and its places.
#     python tools/study.py configs/study/ablation.py --results ablations.jsonl
_base_ = ['./cpu.py']

tasks = dict(_delete_=True, flowers5=_base_.tasks.flowers5)
variants = {
    'stages': dict(),
    'stages-paper': dict(prompt='paper'),
    'stages-ratio2': dict(prompt=dict(ratio=2)),
    'late-stages': dict(stages=['layer5', 'layer6', 'layer7']),
    'blocks': dict(stages='blocks'),
    'blocks-ratio4': dict(stages='blocks', prompt=dict(ratio=4)),
    'blocks-ratio4-rate3': dict(stages='blocks', prompt=dict(ratio=4), prompt_lr_mult=3.0),
    'blocks-ratio4-kernel3': dict(stages='blocks', prompt=dict(ratio=4, kernel_size=3)),
    'blocks-ratio4-kernel7': dict(stages='blocks', prompt=dict(ratio=4, kernel_size=7)),
    'blocks-ratio4-relu': dict(stages='blocks', prompt=dict(ratio=4, act_cfg=dict(type='ReLU'))),
    'blocks-ratio4-linear': dict(stages='blocks', prompt=dict(ratio=4, act_cfg=None)),
    'blocks-ratio8-dense': dict(stages='blocks', prompt=dict(ratio=8, depthwise=False)),
    'blocks-ratio4-scale': dict(stages='blocks', prompt=dict(ratio=4, learnable_scale=True)),
    'blocks-ratio4-small': dict(stages='blocks', prompt=dict(ratio=4, scale=0.1)),
}
methods = list(variants)
