# Why full fine-tuning is ahead under attack in longer trainings: four times the steps of
# held_out.py, on the same training images held out, with twice as many of them attacked.
#     python tools/study.py configs/study/attack.py --out docs/study/attack
_base_ = ['./held_out.py']
note = (
    'The test images here are two tenths of the training images, not the test split, and half of '
    'them are attacked.\n`full-frozen0` leaves the first convolution frozen, `full-frozen3` the '
    'first three stages as well; `inside-hidden32`\nand `inside-principal-scale2` and `-scale3` are '
    '`inside-principal` wider and at larger scales; LoRA has rank 12 and a factor of one.\n'
    '[What came of it](../longer.md#attacks-in-longer-trainings).'
)

_prompt = _base_.trained.prompt
variants = {
    # With the first convolution frozen, and with that and the first three stages.
    'full-frozen0': dict(policy='full', frozen_stages=0),
    'full-frozen3': dict(policy='full', frozen_stages=3),
    'inside-hidden32': dict(stages='inside', prompt=dict(_prompt, hidden=32)),
    'inside-principal-scale2': dict(stages='inside', prompt=dict(_prompt, scale=2.0)),
    'inside-principal-scale3': dict(stages='inside', prompt=dict(_prompt, scale=3.0)),
}
methods = ['full', 'inside-principal', 'lora-rank12-alpha12', *variants]
tasks = {
    'flowers5-held-out': dict(
        steps=1200,
        scenarios=dict(_delete_=True, every=2, attacks=_base_.domains.attacks),
    ),
}
