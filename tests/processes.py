"""Trainings of several processes, for the tests of several files."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
EPOCHS = 2
TRAIN = """
train_dataloader = dict(batch_size={batch})
train_cfg = dict(max_epochs={epochs}, val_interval=100)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=2))
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.1, momentum=0.9),
    clip_grad=dict(max_norm=0.1),  # Below the norms here: they are all clipped.
)
param_scheduler = []
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint={base!r})),
    head=dict(init_cfg=dict(type='Normal', layer='Linear', std=0.01)),
)
randomness = dict(seed=1)
"""
PLAIN = ['--no-pin-memory', '--no-persistent-workers']


def environment(**more):
    """What a script with ``python`` in it needs; two processes have a port of their own."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    if torch.cuda.device_count() < 2:
        more.setdefault('CUDA_VISIBLE_DEVICES', '')  # Two processes cannot share a GPU over NCCL.
    return {
        **os.environ, 'OMP_NUM_THREADS': '1', 'PATH': path, 'PORT': str(port),
        'PYTHONWARNINGS': 'ignore', **more,
    }  # fmt: skip


def dist(script, *arguments, inside=(), **more):
    """Start tools/dist_*.sh."""
    command = [*inside, 'bash', f'tools/{script}.sh', *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def children(pid):
    """Processes that a process has started."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def finish(*programs, status=0):
    """Output of the first of some programs, which end with a status; None: with any."""
    try:
        texts = [program.communicate(timeout=300)[0] for program in programs]
    finally:
        for program in programs:
            if program.poll() is None:
                # The ranks of torchrun outlive it.
                for pid in (*children(program.pid), program.pid):
                    os.kill(pid, signal.SIGKILL)
    for program, text in zip(programs, texts, strict=True):
        assert status in (None, program.returncode), text[-4000:]
    return texts[0]


def weights(work):
    path = max(work.glob('*.pth'), key=lambda p: p.stat().st_mtime_ns)
    return torch.load(path, weights_only=True)['state_dict']


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **tolerance, msg=lambda m, n=name: f'{n}: {m}'
        )
