"""Bytes that a training on two nodes sends at each step, counted at the network device.

    python tools/benchmark/wire.py        # as root: it makes two network namespaces

Each training runs twice, for a few steps and for more; what the longer sends besides is that of the
steps between.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from mmengine.registry import MODELS, init_default_scope

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from cases import ROOT, arguments, check_tests, chosen, quiet, replace_sync_bn, write
from two_nodes import Node, two_nodes

from protune_mm import cli

POLICIES = {
    'full fine-tuning': 'full',
    'Pro-tuning': 'prompts',
    'head-only': 'head-only',
}
IMAGES = 12
EPOCHS = (1, 8)
CONFIGS = {
    'ResNet-50, 10 classes': """
_base_ = ['mmpretrain::resnet/resnet50_8xb32_in1k.py']
dataset = dict(
    _delete_=True, type='CustomDataset', data_root={data!r} + '/classes',
    pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
)
train_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False, dataset=dataset)
model = dict(backbone=dict(init_cfg=None), head=dict(num_classes=10, topk=(1,)))
data_preprocessor = dict(num_classes=10)
""",
    'Mask R-CNN R50-FPN': """
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py']
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False,
    dataset=dict(
        data_root={data!r} + '/shapes/', ann_file='annotations/train.json',
        data_prefix=dict(img='images/train/'),
        metainfo=dict(classes=('circle', 'square', 'triangle')),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs'),
        ],
    ),
)
model = dict(backbone=dict(init_cfg=None))
""",
}
SHARED = """
val_dataloader = val_cfg = val_evaluator = None
test_dataloader = test_cfg = test_evaluator = None
train_cfg = dict(max_epochs={epochs}, val_interval=1000)
default_hooks = dict(checkpoint=None)
randomness = dict(seed=0)
"""


def main() -> None:
    parser = arguments(__doc__.split('\n')[0], '--cases')
    args = parser.parse_args()
    cases = chosen(parser, args, CONFIGS)
    check_tests('tests/test_distributed.py', '-k', 'double or nodes', skip=args.skip_tests)
    quiet()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        draw(root)
        for case in cases:
            for row, policy in POLICIES.items():
                try:
                    rows.append(measure(root, case, row, policy))
                except OSError as error:
                    sys.exit(f'error: {error}')
    write(args.out, 'wire', rows, table(rows), 'cpu')


def draw(root: Path) -> None:
    """Small images for both models."""
    pixels = np.random.default_rng(0)
    for i in range(IMAGES):
        folder = root / 'classes' / f'{i % 10}'
        folder.mkdir(parents=True, exist_ok=True)
        picture = pixels.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f'{i}.png'), picture)
    shapes = ['--train', str(IMAGES), '--val', '1', '--size', '96', '64']
    command = [sys.executable, 'tools/make_shapes.py', str(root / 'shapes'), *shapes]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def measure(root: Path, case: str, row: str, policy: str) -> dict:
    """One line of the table."""
    sent = []
    for epochs in EPOCHS:
        config = root / 'config.py'
        config.write_text(CONFIGS[case].format(data=str(root)) + SHARED.format(epochs=epochs))
        with two_nodes() as nodes:
            train(nodes, config, policy, root)
            sent.append(sum(node.sent() for node in nodes) / len(nodes))
    steps = (EPOCHS[1] - EPOCHS[0]) * IMAGES // 2
    per_step = (sent[1] - sent[0]) / steps
    trained = trainable_bytes(config, policy)
    start = sent[0] - per_step * EPOCHS[0] * IMAGES // 2
    print(f'{case}, {row}: {per_step / 1e6:.2f} MB a step, trains {trained / 1e6:.2f}', flush=True)
    return dict(case=case, row=row, step_bytes=per_step, start_bytes=start, trained_bytes=trained)


def train(nodes: tuple[Node, Node], config: Path, policy: str, root: Path) -> None:
    """One process on each node."""
    python = str(Path(sys.executable).parent)
    programs = []
    for node in nodes:
        environment = {
            **os.environ, **node.environment, 'PORT': '29521', 'OMP_NUM_THREADS': '1',
            'PYTHONWARNINGS': 'ignore', 'PATH': f'{python}:{os.environ["PATH"]}',
            'CUDA_VISIBLE_DEVICES': '',
        }  # fmt: skip
        command = [*node.inside, 'bash', 'tools/dist_train.sh', str(config), '1', '--protune']
        command += ['--work-dir', str(root / f'work{node.rank}'), '--policy', policy]
        command += ['--no-pin-memory', '--no-persistent-workers']
        programs.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    texts = [program.communicate()[0] for program in programs]
    for program, text in zip(programs, texts, strict=True):
        if program.returncode:
            sys.exit(f'{text[-4000:]}\nerror: the training failed')


def trainable_bytes(config: Path, policy: str) -> int:
    """Bytes of the gradients of a model."""
    cfg = cli.read_config(str(config), protune=True, policy=policy)
    init_default_scope(cfg.default_scope)
    replace_sync_bn(cfg.model)
    model = MODELS.build(cfg.model)
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def table(rows: list[dict]) -> str:
    """The document."""
    lines = [
        '# Bytes on the wire',
        '',
        'Two nodes (network namespaces with a cable between them), one process each, through',
        '`tools/dist_train.sh`: bytes that leave a node at each step, by the counter of its',
        'network device, so with the headers of TCP. Gradients of two processes are summed by a',
        'ring, in which each sends as many bytes as it has gradients. At the start mmengine and',
        'PyTorch send the whole model, and not the same number of bytes each time, which is why a',
        'step is right to about 0.1 MB.',
        '',
        '    python tools/benchmark/wire.py',
        '',
        '| model | | trains | sent a step | of full | at the start |',
        '|---|---|---|---|---|---|',
    ]
    full = {row['case']: row['step_bytes'] for row in rows if row['row'] == 'full fine-tuning'}
    lines += [
        f'| {row["case"]} | {row["row"]} | {row["trained_bytes"] / 1e6:.2f} MB '
        f'| {row["step_bytes"] / 1e6:.2f} MB | {row["step_bytes"] / full[row["case"]]:.1%} '
        f'| {row["start_bytes"] / 1e6:.0f} MB |'
        for row in rows
    ]
    return '\n'.join([*lines, ''])


if __name__ == '__main__':
    main()
