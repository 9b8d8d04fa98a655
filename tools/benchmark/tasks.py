"""Many tasks on one frozen ResNet-50: memory, switching and latency against separate models.

python tools/benchmark/tasks.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cases import arguments, check_tests, quiet, write

import protune_mm
from protune_mm.checkpoints import tuned_state_dict

COUNTS = (1, 4, 16)


def main() -> None:
    parser = arguments(__doc__.split('\n')[0])
    parser.add_argument('--size', type=int, default=224, help='side of the image, in pixels')
    parser.add_argument('--repeats', type=int, default=5, help='timings of each')
    args = parser.parse_args()
    check_tests('tests/test_prompt_sets.py', '-k', 'not every_backbone', skip=args.skip_tests)
    quiet()
    torch.manual_seed(0)
    rows = [measure(count, args) for count in COUNTS]
    full, tuned = (file_size(policy) for policy in ('full', 'prompts'))
    files = dict(case='files', full_bytes=full, tuned_bytes=tuned)
    write(args.out, 'tasks', [*rows, files], table(rows, files, args), 'cpu')


def backbone(stages: list[str] | None) -> nn.Module:
    """A Pro-tuned ResNet-50 with random weights."""
    config = dict(type='protune_mm.ProTuned', base='mmpretrain.ResNet', depth=50, stages=stages)
    return MODELS.build(config).eval()


def measure(count: int, args: argparse.Namespace) -> dict:
    """One line of the table: prompts at the last stage, one image."""
    images = torch.randn(1, 3, args.size, args.size)
    shared = backbone(['layer4'])
    sets = protune_mm.PromptSets(shared, '0')
    names = [str(i) for i in range(count)]
    for name in names[1:]:
        sets.add(name)
    separate = [backbone(['layer4']) for _ in names]
    weights = bytes_of(shared) + sum(
        bytes_of(prompt) for name in names[1:] for prompt in sets[name]
    )
    with torch.no_grad():
        together, alone = alternate(
            lambda: sets.together(images, names),
            lambda: [model(images) for model in separate],
            args.repeats,
        )
    switches = [seconds(lambda name=name: sets.switch(name)) for name in names * 20]
    every = backbone(None)
    per_task = sum(bytes_of(p) for p in protune_mm.PromptSets(every, '0')['0'])
    found = dict(
        case=f'{count} tasks',
        one_bytes=bytes_of(shared),
        sets_bytes=weights,
        separate_bytes=sum(bytes_of(model) for model in separate),
        every_stage_bytes=bytes_of(every) + (count - 1) * per_task,
        every_stage_one_bytes=bytes_of(every),
        together_s=together,
        separate_s=alone,
        switch_s=max(switches),
    )
    print(
        f'{count} tasks: {weights / bytes_of(shared):.2f} x the weights of one, '
        f'{alone / together:.1f} x faster, switch {found["switch_s"] * 1e3:.3f} ms',
        flush=True,
    )
    return found


def bytes_of(module: nn.Module) -> int:
    """Bytes of all weights and buffers."""
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())


def seconds(call: Callable) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(first: Callable, second: Callable, repeats: int) -> tuple[float, float]:
    """Median times of two calls, measured in turn after one warm-up."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return tuple(statistics.median(column) for column in zip(*times, strict=True))


def file_size(policy: str) -> int:
    """Bytes of a checkpoint of a ResNet-50 classifier of 10 classes with AdamW, after one step."""
    cfg = protune_mm.load_config('mmpretrain::resnet/resnet50_8xb32_in1k.py', protune=True)
    cfg.model.backbone.policy = policy
    cfg.model.head.update(num_classes=10, topk=(1,))
    cfg.model.pop('data_preprocessor', None)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = tuned_state_dict(model) if policy == 'prompts' else model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'checkpoint.pth')
        torch.save(dict(state_dict=state, optimizer=optimizer.state_dict()), path)
        return path.stat().st_size


def table(rows: list[dict], files: dict, args: argparse.Namespace) -> str:
    """The document."""
    part = files['tuned_bytes'] / files['full_bytes']
    lines = [
        '# Many tasks on one backbone',
        '',
        'ResNet-50 in float32 with `protune_mm.PromptSets`. Weights: of one backbone and the',
        'prompts of all tasks, as a multiple of those of one task; exact. Time: all tasks on one',
        'image of',
        f'{args.size}x{args.size} in one call (`together`, prompts at the last stage) against as',
        f'many separate models, median of {args.repeats}, measured in turn. Switch: the slowest of',
        '20 rounds.',
        '',
        '    python tools/benchmark/tasks.py',
        '',
        '| tasks | weights, last stage | weights, every stage | separate models '
        '| together is faster | switch |',
        '|---|---|---|---|---|---|',
    ]
    lines += [
        f'| {row["case"].split()[0]} | {row["sets_bytes"] / row["one_bytes"]:.2f} '
        f'| {row["every_stage_bytes"] / row["every_stage_one_bytes"]:.2f} '
        f'| {row["separate_bytes"] / row["one_bytes"]:.2f} '
        f'| {row["separate_s"] / row["together_s"]:.2f}x | {row["switch_s"] * 1e3:.3f} ms |'
        for row in rows
    ]
    lines += [
        '',
        'A checkpoint of a ResNet-50 classifier with 10 classes and AdamW, prompts after every',
        f'stage: {files["tuned_bytes"] / 1e6:.1f} MB, {part:.1%} of the '
        f'{files["full_bytes"] / 1e6:.1f} MB of full fine-tuning.',
        '',
    ]
    return '\n'.join(lines)


if __name__ == '__main__':
    main()
