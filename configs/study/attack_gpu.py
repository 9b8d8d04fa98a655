# attack.py at the size the weights were made for, in the steps and batches of gpu.py and at three
# rates, with the other domains: for one GPU.
#     python tools/study.py configs/study/attack_gpu.py --out docs/study/attack-gpu --jobs 16
_base_ = ['./attack.py', './_base_/flowers5_224.py']
note = (
    'The test images here are two tenths of the training images, not the test split, and half of '
    'them are attacked and shown in other domains.\n`full-frozen3` leaves the first convolution '
    'and three stages frozen; `inside-principal-scale2` and `-scale3` are\n`inside-principal` at '
    'larger scales; LoRA has rank 12 and a factor of one. Sixteen runs shared one GPU, so "time" '
    'is of a GPU that others used as well.\n'
    '[What came of it](../longer.md#attacks-in-longer-trainings).'
)

methods = [
    'full',
    'full-frozen3',
    'inside-principal',
    'inside-principal-scale2',
    'inside-principal-scale3',
    'lora-rank12-alpha12',
]
tasks = {
    'flowers5-held-out': dict(
        _base_.flowers5_224,
        # A third, so far of the first two methods alone, is in the results but not in the table.
        seeds=[0, 1],
        lrs=[1e-3, 3e-3, 1e-2],
        scenarios=dict(shifts=_base_.domains.shifts),
    ),
}
