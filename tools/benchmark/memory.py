"""Bytes that training keeps for backward, and multiplications of a step: exact on any machine.

    python tools/benchmark/memory.py

Writes docs/benchmark/memory.json and memory.md.
"""

from __future__ import annotations

import argparse

import torch
from cases import (
    BACKBONES,
    BASELINE,
    DETECTORS,
    ROWS,
    SEGMENTORS,
    arguments,
    backbone,
    backbone_rows,
    check_tests,
    chosen,
    loss_of,
    quiet,
    use_peft,
    whole_model,
    write,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from protune_mm.lean.memory import kept_bytes

SIZE = (256, 256)
MIB = 2**20
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
    ),
}
"""PyTorch's counter does not know its fused attention on the CPU."""


def main() -> None:
    parser = arguments(__doc__.split('\n')[0], '--cases', '--peft')
    args = parser.parse_args()
    names = chosen(parser, args, [*BACKBONES, *DETECTORS, *SEGMENTORS])
    if args.peft:
        use_peft(args.peft)
    check_tests('tests/test_lean.py', skip=args.skip_tests)
    quiet()
    rows = []
    for name in names:
        if name not in BACKBONES:
            for row in ROWS:
                model = whole_model(name, row)
                rows.append(measure(name, row, model, loss_of(name, model, SIZE, 2)))
            continue
        for row in backbone_rows():
            module = backbone(name, row)
            if module is not None:
                image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
                rows.append(measure(name, row, module, lambda m=module, x=image: m(x)))
    write(args.out, 'memory', rows, table(rows, args), 'cpu')


def measure(name: str, row: str, model: torch.nn.Module, forward: object) -> dict:
    """One line of the table."""
    kept = kept_bytes(forward)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        outputs = forward()
        flat = outputs if isinstance(outputs, list | tuple) else [outputs]
        tracked = [out for out in flat if out.requires_grad]
        if tracked:
            sum(out.sum() for out in tracked).backward()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = dict(
        case=name,
        row=row,
        kept_bytes=kept,
        flops=counter.get_total_flops(),
        trainable=trainable,
    )
    print(f'{name}, {row}: {kept / MIB:.2f} MiB, {found["flops"] / 1e9:.2f} GFLOP', flush=True)
    return found


def table(rows: list[dict], args: argparse.Namespace) -> str:
    """The document."""
    given = f' --peft {args.peft}' if args.peft else ''
    if args.cases:
        given += ' --cases ' + ' '.join(f'"{case}"' for case in args.cases)
    text = [
        '# Memory that training keeps for backward',
        '',
        'Bytes of all storages that a forward pass makes and that are alive when its outputs and',
        'temporaries are gone, without parameters, buffers, inputs and folded weights: exact, and',
        'the same on every machine. FLOP: forward and backward of one step, as PyTorch counts them',
        '(two a multiplication), so that recomputation shows. fp32, prompts after every stage.',
        f'Backbones alone: one image of {SIZE[0]}x{SIZE[1]}, prompts of ratio 4; whole models: two',
        'of them, to the losses, prompts of the default ratio. "head-only" of a backbone alone',
        'trains nothing. Where Swin-T trains, its drop path is on and Mask R-CNN gets other',
        'proposals: "full fine-tuning" and "stock frozen_stages" of it compare, with each other',
        'too, to about 6 % only.',
        '',
        f'    python tools/benchmark/memory.py{given}',
        '',
    ]
    for case in dict.fromkeys(row['case'] for row in rows):
        mine = [row for row in rows if row['case'] == case]
        base = next(row for row in mine if row['row'] == BASELINE)
        text += [f'## {case}', '', '| | MiB kept | of lean off | GFLOP | of lean off | trained |']
        text += ['|---|---|---|---|---|---|']
        text += [
            f'| {row["row"]} | {row["kept_bytes"] / MIB:.2f} '
            f'| {row["kept_bytes"] / base["kept_bytes"]:.3f} '
            f'| {row["flops"] / 1e9:.2f} | {row["flops"] / base["flops"]:.3f} '
            f'| {row["trainable"]:,} |'
            for row in mine
        ]
        text.append('')
    return '\n'.join(text)


if __name__ == '__main__':
    main()
