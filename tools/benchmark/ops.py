"""The depth-wise 5x5 convolution, and convolution with ReLU in one kernel, on a GPU.

The Triton kernel and cuDNN's fused kernel against PyTorch's own.

    python tools/benchmark/ops.py

Writes docs/benchmark/ops.json and ops.md, and depthwise.json beside protune_mm/ops/depthwise.py,
from which the prompt block takes the faster of the two for this GPU, dtype and layout.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable

import torch
from cases import arguments, check_tests, quiet, write
from torch.nn import functional as F

from protune_mm.ops.depthwise import TABLE, Depthwise, reference

SIZES = ((800, 1333), (512, 512))
NETWORKS = {
    'ResNet-50': [(256, 4), (512, 8), (1024, 16), (2048, 32)],
    'Swin-T': [(96, 4), (192, 8), (384, 16), (768, 32)],
    'ViT-B': [(768, 16)],
}
"""Channels and stride of each stage."""
FUSED = [(64, 4), (128, 8), (256, 16), (512, 32)]
"""Channels and stride of ResNet-50's 3x3 convolutions."""
RATIO = 8
BATCH = 2
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = {'contiguous': torch.contiguous_format, 'channels_last': torch.channels_last}


def main() -> None:
    args = arguments(__doc__.split('\n')[0]).parse_args()
    if not torch.cuda.is_available():
        sys.exit('ops.py needs a CUDA device: the kernel does not run elsewhere')
    check_tests('tests/test_depthwise.py', skip=args.skip_tests)
    quiet()
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    copy = copy_bandwidth()
    shapes = [
        (name, channels // RATIO, *(math.ceil(side / stride) for side in size))
        for size in SIZES
        for name, stages in NETWORKS.items()
        for channels, stride in stages
    ]
    rows = []
    table_of = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    chosen = table_of.setdefault(torch.cuda.get_device_name(), {})
    for dtype in DTYPES:
        for layout in LAYOUTS:
            rows += [measure(*shape, dtype, layout, copy) for shape in shapes]
            name = str(dtype).removeprefix('torch.')
            faster = speedup(rows, name, layout) > 1
            chosen[f'{name} {layout}'] = 'triton' if faster else 'torch'
            # After each: a run that is stopped leaves what it has measured.
            TABLE.write_text(json.dumps(table_of, indent=1, sort_keys=True) + '\n')
            write(args.out, 'ops', rows, table(rows, [], copy), 'cuda')
    fused = [
        measure_fused(channels, *(math.ceil(side / stride) for side in size), dtype, layout)
        for dtype in DTYPES
        for layout in LAYOUTS
        for size in SIZES
        for channels, stride in FUSED
    ]
    write(args.out, 'ops', [*rows, *fused], table(rows, fused, copy), 'cuda')


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time of a call, warmed up, by events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.empty(2**28, dtype=torch.uint8, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def measure(
    name: str, channels: int, height: int, width: int, dtype: torch.dtype, layout: str, copy: float
) -> dict:
    """Forward, and forward plus backward, of both implementations for one shape."""
    shape = (BATCH, channels, height, width)
    x = torch.randn(shape, device='cuda', dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(channels, 1, 5, 5, device='cuda', dtype=dtype)
    bias = torch.randn(channels, device='cuda', dtype=dtype)
    grad = torch.randn_like(x)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    found = dict(
        case=f'{name} {channels}x{height}x{width}',
        dtype=str(dtype).removeprefix('torch.'),
        layout=layout,
    )
    for key, run in (('triton', Depthwise.apply), ('torch', reference)):

        def both(run: Callable = run) -> None:
            torch.autograd.grad(run(*leaves), leaves, grad)

        with torch.no_grad():
            found[f'{key}_forward_s'] = seconds(lambda run=run: run(*leaves))
        found[f'{key}_both_s'] = seconds(both)
    moved = 2 * x.numel() * x.element_size()
    found['forward_of_copy'] = moved / found['triton_forward_s'] / copy
    found['speedup'] = found['torch_both_s'] / found['triton_both_s']
    print(found, flush=True)
    return found


def measure_fused(channels: int, height: int, width: int, dtype: torch.dtype, layout: str) -> dict:
    """A 3x3 convolution and ReLU without a graph: two kernels, and cuDNN's one."""
    x = torch.randn(BATCH, channels, height, width, device='cuda', dtype=dtype)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    weight = torch.randn(channels, channels, 3, 3, device='cuda', dtype=dtype)
    weight = weight.contiguous(memory_format=LAYOUTS[layout])
    bias = torch.randn(channels, device='cuda', dtype=dtype)
    one = (1, 1)
    with torch.no_grad():
        plain = seconds(lambda: F.conv2d(x, weight, bias, padding=1).relu_())
        fused = seconds(
            lambda: torch.ops.aten.cudnn_convolution_relu(x, weight, bias, one, one, one, 1)
        )
    found = dict(
        case=f'conv 3x3 and ReLU, {channels}x{height}x{width}',
        dtype=str(dtype).removeprefix('torch.'),
        layout=layout,
        plain_s=plain,
        fused_s=fused,
        speedup=plain / fused,
    )
    print(found, flush=True)
    return found


def speedup(rows: list[dict], dtype: str, layout: str) -> float:
    """Geometric mean over the shapes, forward plus backward."""
    ratios = [r['speedup'] for r in rows if r['dtype'] == dtype and r['layout'] == layout]
    return math.exp(statistics.fmean(math.log(r) for r in ratios))


def table(rows: list[dict], fused: list[dict], copy: float) -> str:
    """The document."""
    text = ['# Depth-wise 5x5 convolution', '', f'Copies run at {copy / 1e9:.0f} GB/s.', '']
    text += [
        f'Forward and backward, {BATCH} images. The times hold what it takes to start a kernel, as',
        'in a training step: where "forward, of copy" is far below one, that is most of them.',
        '',
    ]
    text += ['| shape | dtype | layout | Triton, ms | PyTorch, ms | faster | forward, of copy |']
    text += ['|---|---|---|---|---|---|---|']
    text += [
        f'| {r["case"]} | {r["dtype"]} | {r["layout"]} | {r["triton_both_s"] * 1e3:.3f} '
        f'| {r["torch_both_s"] * 1e3:.3f} | {r["speedup"]:.2f} | {r["forward_of_copy"]:.2f} |'
        for r in rows
    ]
    text += ['', 'Geometric means, forward plus backward:', '']
    text += [
        f'- {dtype}, {layout}: {speedup(rows, dtype, layout):.2f}'
        for dtype, layout in dict.fromkeys((r['dtype'], r['layout']) for r in rows)
    ]
    if not fused:
        return '\n'.join([*text, ''])
    text += ['', '# Convolution and ReLU, forward', '']
    text += [
        '| shape | dtype | layout | two kernels, ms | one, ms | faster |',
        '|---|---|---|---|---|---|',
    ]
    text += [
        f'| {r["case"]} | {r["dtype"]} | {r["layout"]} | {r["plain_s"] * 1e3:.3f} '
        f'| {r["fused_s"] * 1e3:.3f} | {r["speedup"]:.2f} |'
        for r in fused
    ]
    return '\n'.join([*text, ''])


if __name__ == '__main__':
    main()
