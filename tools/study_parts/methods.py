"""The methods that a study compares."""

from __future__ import annotations

METHODS: dict[str, dict] = {
    'full': dict(policy='full'),
    'head-only': dict(policy='head-only'),
    'pro-tuning': dict(),
    'bias': dict(policy='bias'),
    'norm': dict(policy='norm'),
    'last-k': dict(policy='last-1'),
    'adapter': dict(prompt=dict(type='Adapter')),
    'conv-adapter': dict(prompt=dict(type='ConvAdapter')),
    'lora': dict(prompt=dict(type='LoRA')),
    'mona': dict(prompt=dict(type='Mona')),
    'lorand': dict(prompt=dict(type='LoRand')),
}
"""Name of a method to what it adds to the line of a Pro-tuned backbone."""
