"""Matrix products of frozen layers on the CPU: oneDNN against PyTorch's own choice.

    python tools/benchmark/products.py

Writes docs/benchmark/products.json and products.md.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from cases import arguments, check_tests, quiet, write
from torch.nn import functional as F

from protune_mm.lean import products
from protune_mm.lean.functions import FrozenConv2d

LINEAR = {
    'ViT-B': [(257, 768, 2304), (257, 768, 768), (257, 768, 3072), (257, 3072, 768)],
    'Swin-T': [
        (4096, 96, 288),
        (4096, 96, 384),
        (1024, 192, 768),
        (256, 384, 1536),
        (64, 768, 3072),
    ],
    'ConvNeXt-T': [(4096, 96, 384), (1024, 768, 192), (256, 384, 1536), (64, 3072, 768)],
}
"""Tokens, input and output channels, for one image of 256x256."""
CONVOLUTION = {
    'ResNet-50': [(256, 64, 64), (512, 128, 32), (256, 1024, 16), (2048, 512, 8)],
    'MobileNetV2': [(96, 24, 64), (32, 192, 32), (96, 576, 16), (960, 160, 8)],
}
"""Input and output channels, and side of the map, of 1x1 convolutions for the same image."""
GEOMETRY = ((1, 1), (0, 0), (1, 1), 1)


def main() -> None:
    parser = arguments(__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=21, help='calls of each kernel')
    args = parser.parse_args()
    check_tests('tests/test_products.py', skip=args.skip_tests)
    quiet()
    rows = []
    for name, shapes in LINEAR.items():
        rows += [linear(name, *shape, args.rounds) for shape in shapes]
    for name, shapes in CONVOLUTION.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            rows += [convolution(name, *shape, layout, args.rounds) for shape in shapes]
    write(args.out, 'products', rows, table(rows), 'cpu')


def linear(name: str, tokens: int, into: int, out: int, rounds: int) -> dict:
    """A linear layer with constant weights."""
    x = torch.randn(1, tokens, into, requires_grad=True)
    weight, bias = torch.randn(out, into), torch.randn(out)
    return compare(
        dict(case=name, kind='linear', shape=f'{tokens} x {into} to {out}'),
        lambda: F.linear(x, weight, bias),
        lambda: products.frozen_linear(x, weight, bias),
        x,
        rounds,
    )


def convolution(
    name: str, into: int, out: int, side: int, layout: torch.memory_format, rounds: int
) -> dict:
    """A 1x1 convolution with constant weights."""
    x = torch.randn(1, into, side, side).contiguous(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(out, into, 1, 1), torch.randn(out)
    last = layout is torch.channels_last
    return compare(
        dict(
            case=name,
            kind=f'1x1, {"channels-last" if last else "contiguous"}',
            shape=f'{into} x {side} x {side} to {out}',
        ),
        lambda: F.conv2d(x, weight, bias),
        lambda: FrozenConv2d.apply(x, weight, bias, GEOMETRY),
        x,
        rounds,
    )


def compare(row: dict, stock: Callable, ours: Callable, x: torch.Tensor, rounds: int) -> dict:
    """Medians of forward plus input gradient, the two in turn."""
    grad = torch.randn_like(stock())
    times: dict[Callable, list[float]] = {stock: [], ours: []}
    for number in range(rounds + 3):
        for run, found in times.items():
            start = time.perf_counter()
            torch.autograd.grad(run(), x, grad)
            if number >= 3:
                found.append(time.perf_counter() - start)
    row['stock_s'], row['ours_s'] = (statistics.median(found) for found in times.values())
    row['speedup'] = row['stock_s'] / row['ours_s']
    print(row, flush=True)
    return row


def table(rows: list[dict]) -> str:
    """The document."""
    text = [
        '# Matrix products of frozen layers, on the CPU',
        '',
        'Forward plus gradient of the input, float32, one image of 256x256: what PyTorch chooses',
        'for such a layer, and what lean layers take. Calls in turn, medians.',
        '',
        '    python tools/benchmark/products.py',
        '',
        '| | | shape | stock, ms | lean, ms | faster |',
        '|---|---|---|---|---|---|',
    ]
    text += [
        f'| {r["case"]} | {r["kind"]} | {r["shape"]} | {r["stock_s"] * 1e3:.2f} '
        f'| {r["ours_s"] * 1e3:.2f} | {r["speedup"]:.2f} |'
        for r in rows
    ]
    text += ['', 'Geometric means:', '']
    for kind in dict.fromkeys(r['kind'] for r in rows):
        logs = [math.log(r['speedup']) for r in rows if r['kind'] == kind]
        text.append(f'- {kind}: {math.exp(statistics.fmean(logs)):.2f}')
    return '\n'.join([*text, ''])


if __name__ == '__main__':
    main()
