"""Step time and peak memory of each way to train, rows alternating within one run.

    python tools/benchmark/speed.py
    python tools/benchmark/speed.py --device cuda --models --amp

Writes docs/benchmark/speed.json and speed.md (speed_cuda with a GPU).
"""

from __future__ import annotations

import contextlib
import shlex
import statistics
import time
from collections.abc import Callable

import torch
from cases import (
    AMP_ROWS,
    BACKBONES,
    BASELINE,
    DETECTORS,
    GPU_ROWS,
    PROMPT,
    ROWS,
    SEGMENTORS,
    arguments,
    backbone,
    backbone_rows,
    check_tests,
    chosen,
    half_of,
    loss_of,
    quiet,
    refuse_part,
    use_peft,
    whole_model,
    write,
)
from mmengine.registry import MODELS

import protune_mm

STOCK_LAST = 'Pro-tuning, lean off, channels-last'
"""What anybody can do with stock layers: convert the weights and the image."""
INFERENCE_BASELINE = 'inference, lean off'
INFERENCE = {INFERENCE_BASELINE: False, 'inference, lean': True}
SIZES = {**dict.fromkeys(DETECTORS, (800, 1333)), **dict.fromkeys(SEGMENTORS, (512, 512))}
"""Height and width of the images of whole models, in pixels, as their stock configs have them."""


def main() -> None:
    parser = arguments(__doc__.split('\n')[0], '--cases', '--peft')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--rounds', type=int, default=9, help='steps of each row')
    parser.add_argument(
        '--batch', type=int, help='images; default: 1 for backbones, 32 on a GPU; 2 for models'
    )
    parser.add_argument('--models', action='store_true', help='whole models too: for GPUs')
    parser.add_argument('--rows', nargs='+', help='only rows with one of these words')
    parser.add_argument('--amp', action='store_true', help='autocast, see half_of')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: PyTorch sees no GPU here')
    if args.peft:
        use_peft(args.peft)
    if args.device == 'cuda':
        ROWS.update(GPU_ROWS, **(AMP_ROWS if args.amp else {}))
    names = chosen(parser, args, [*BACKBONES, *(SIZES if args.models else ())])
    known = [*backbone_rows(), STOCK_LAST, *INFERENCE]
    for word in args.rows or ():
        if not any(word in row for row in known):
            parser.error(f"--rows: '{word}' is in no row: there are {'; '.join(known)}")
    refuse_part(parser, args, 'rows')
    tests = 'tests/test_lean.py' if args.device == 'cpu' else 'tests/test_lean_gpu.py'
    check_tests(tests, skip=args.skip_tests)
    quiet()
    out = 'speed' if args.device == 'cpu' else f'speed_{args.device}'
    rows = []
    for name in names:
        rows += measure(name, args)
        # After each: a run that is stopped leaves what it has measured.
        write(args.out, out, rows, table(rows, args), args.device)


def measure(name: str, args: object) -> list[dict]:
    """Time every row of one model, one step each in turn."""
    steps: dict[str, Callable[[], None]] = {}
    for row in [*backbone_rows(), STOCK_LAST] if name in BACKBONES else ROWS:
        step = prepare(name, row, args) if wanted(row, args) else None
        if step is not None:
            steps[row] = step
    if name in BACKBONES:
        steps |= {
            row: infer(name, lean, args) for row, lean in INFERENCE.items() if wanted(row, args)
        }
    times: dict[str, list[float]] = {row: [] for row in steps}
    peaks = {row: peak_of(step, args.device) for row, step in steps.items()}
    for number in range(args.rounds + 2):
        for row, step in steps.items():
            seconds = timed(step, args.device)
            if number >= 2:  # The first steps allocate and, on a GPU, choose kernels.
                times[row].append(seconds)
    rows = []
    for row in steps:
        base = times[INFERENCE_BASELINE if row in INFERENCE else BASELINE]
        median = statistics.median(times[row])
        ratio = median / statistics.median(base)
        rows.append(
            dict(case=name, row=row, median_s=median, ratio=ratio, peak_bytes=peaks[row],
                 fastest_ratio=min(times[row]) / min(base))
        )  # fmt: skip
        print(f'{name}, {row}: {ratio:.3f} of lean off, {median * 1e3:.1f} ms', flush=True)
    return rows


def wanted(row: str, args: object) -> bool:
    """Whether a row is asked for; the one that all are compared with always is."""
    return (
        row in (BASELINE, INFERENCE_BASELINE)
        or not args.rows
        or any(word in row for word in args.rows)
    )


def backbone_batch(args: object) -> int:
    """Images a step: one leaves a GPU waiting for the processor, which all rows do alike."""
    return args.batch or (32 if args.device == 'cuda' else 1)


def prepare(name: str, row: str, args: object) -> Callable[[], None] | None:
    """A function that does one step: forward, backward, and SGD without momentum."""
    if name in BACKBONES:
        model = backbone(name, BASELINE if row == STOCK_LAST else row)
        if model is None or row == 'head-only':
            return None  # Nothing of a backbone alone trains.
        model.to(args.device)
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(backbone_batch(args), 3, 256, 256, generator=generator).to(args.device)
        if row == STOCK_LAST:
            model.to(memory_format=torch.channels_last)
            image = image.contiguous(memory_format=torch.channels_last)

        def forward() -> list[torch.Tensor]:
            out = model(image)
            return list(out) if isinstance(out, list | tuple) else [out]
    else:
        model = whole_model(name, row).to(args.device)
        forward = loss_of(name, model, SIZES[name], args.batch or 2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(name, args):
            loss = sum(out.float().sum() for out in forward() if out.requires_grad)
        loss.backward()
        optimizer.step()

    return step


def autocast(name: str, args: object) -> contextlib.AbstractContextManager:
    """Mixed precision for a model of that name, where it is asked for."""
    return torch.autocast(args.device, half_of(name)) if args.amp else contextlib.nullcontext()


def infer(name: str, lean: bool, args: object) -> Callable[[], None]:
    """A function that runs a Pro-tuned backbone for its features."""
    torch.manual_seed(0)
    module = MODELS.build(dict(BACKBONES[name]))
    model = protune_mm.protune(module, prompt=PROMPT, lean=lean).to(args.device)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(backbone_batch(args), 3, 256, 256, generator=generator).to(args.device)

    def run() -> None:
        with autocast(name, args), torch.inference_mode():
            model(image)

    return run


def peak_of(step: Callable[[], None], device: str) -> int:
    """Bytes that a step has allocated at most, on a GPU, beyond what there was when it was made.

    It is the first step: in it gradients, and lean execution's copies of weights, are made.
    """
    if device != 'cuda':
        step()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def timed(step: Callable[[], None], device: str) -> float:
    """Seconds of a step."""
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def table(rows: list[dict], args: object) -> str:
    """The document."""
    text = [
        '# Time of a training step',
        '',
        'Forward, backward and SGD; rows alternate, one step each in turn; medians as a ratio to',
        '"lean off" of the same run, and the ratio of the fastest steps; inference to inference.',
        'Peak memory (GPU only) is what the first step allocates beyond weights.',
        f'Images a step: {backbone_batch(args)} of 256x256 pixels for backbones, {args.batch or 2} '
        'for whole models.',
        '',
        f'    python tools/benchmark/speed.py --device {args.device} --rounds {args.rounds}'
        + (f' --peft {args.peft}' if args.peft else '')
        + (f' --batch {args.batch}' if args.batch else '')
        + (f' --cases {shlex.join(args.cases)}' if args.cases else '')
        + (f' --rows {shlex.join(args.rows)}' if args.rows else '')
        + (' --models' if args.models else '')
        + (' --amp' if args.amp else ''),
        '',
    ]
    for case in dict.fromkeys(row['case'] for row in rows):
        text += [f'## {case}', '', '| | ratio | fastest | ms | peak MiB |', '|---|---|---|---|---|']
        text += [
            f'| {row["row"]} | **{row["ratio"]:.2f}** | {row["fastest_ratio"]:.2f} '
            f'| {row["median_s"] * 1e3:.1f} '
            f'| {peak(row)} |'
            for row in rows
            if row['case'] == case
        ]
        text.append('')
    return '\n'.join(text)


def peak(row: dict) -> str:
    """Peak memory in MiB; the CPU's allocator does not tell."""
    return f'{row["peak_bytes"] / 2**20:.0f}' if row['peak_bytes'] else 'not measured'


if __name__ == '__main__':
    main()
