"""What happens to a training when things go wrong: the right model, or one clear error.

    python tools/faults.py            # 50 kills and all other cases, about a quarter of an hour
    python tools/faults.py --quick    # 5 kills, two of them while a checkpoint is written

Cases run side by side, one for each core; ``--jobs 1`` runs them one after another.

A small classifier is trained on drawn images, in processes of its own, on the CPU. A case ends well
when the tuned weights, and the outputs of the model on a fixed batch, are bit-identical to those of
a training that nothing happened to, or when the program ends with a non-zero status and one line
that says why. The exit status is 0 only if all cases ended well.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import Tensor

import protune_mm

TOOLS = Path(__file__).parent
CONFIG = """
_base_ = ['mmpretrain::resnet/resnet18_8xb32_in1k.py']
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs'),
]
dataset = dict(_delete_=True, type='CustomDataset', data_root={data!r}, pipeline=pipeline)
val_dataloader = dict(batch_size=4, num_workers=0, persistent_workers=False, dataset=dataset)
test_dataloader = val_dataloader
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False,
    dataset=dict(dataset, pipeline=train_pipeline),
)
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator
train_cfg = dict(max_epochs={epochs}, val_interval=1000)
optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3))
param_scheduler = []
model = dict(
    backbone=dict(
        type='protune_mm.ProTuned', base='ResNet',
        init_cfg=dict(type='Pretrained', checkpoint={base!r}),
    ),
    head=dict(num_classes=2, topk=(1,)),
)
data_preprocessor = dict(num_classes=2)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2), logger=dict(interval=1))
randomness = dict(seed=0)
"""
DOCUMENT = """# What happens when things go wrong

A small classifier is trained again and again, and each time something goes wrong. A case ends well
when the tuned weights and the outputs of the model on a fixed batch are, bit for bit, those of a
training that nothing happened to, or when the program ends with a non-zero status and one line that
says why.

    python tools/faults.py --out docs/faults.md

"""
PATIENCE = 120
"""Seconds after which a program that should end has not."""


class Bench:
    """A folder with images, a base, a config and the result of an undisturbed training.

    Args:
        root: empty folder.
        seed: of the images, the weights and the moments of the kills.
        epochs: of the training that is killed again and again; others have eight.
    """

    def __init__(self, root: Path, seed: int, epochs: int) -> None:
        self.root, self.seed, self.random = root, seed, random.Random(seed)
        self.epochs = epochs
        self.long = f'train_cfg.max_epochs={epochs}'
        MMLogger.get_instance('faults', log_level='ERROR')
        draw(root / 'data', seed)
        self.base, self.other_base = (weights(root / f'base{i}.pth', seed + i) for i in (0, 1))
        self.config = root / 'config.py'
        self.config.write_text(
            CONFIG.format(data=str(root / 'data'), base=str(self.base), epochs=8)
        )
        self.reference: tuple[dict, Tensor] | None = None
        self.long_reference: tuple[dict, Tensor] | None = None
        self.good: Path | None = None

    def of_case(self, name: str) -> Bench:
        """The same bench, with random moments of its own: cases run side by side."""
        bench = copy.copy(self)
        bench.random = random.Random(f'{self.seed} {name}')
        return bench

    def folder(self) -> Path:
        """A new work folder."""
        return Path(tempfile.mkdtemp(prefix='work', dir=self.root))

    def start(
        self, work: Path, *options: str, resume: bool = False, output: Path | None = None
    ) -> subprocess.Popen:
        """Begin a training; what it prints goes into its work folder, or another."""
        command = [sys.executable, '-W', 'ignore', str(TOOLS / 'train.py'), str(self.config)]
        command += ['--work-dir', str(work)] + ['--resume'] * resume
        command += ['--cfg-options', *options] if options else []
        return begin(command, output or work)

    def train(self, work: Path, *options: str, resume: bool = False) -> None:
        """Train to the end."""
        ended = self.start(work, *options, resume=resume)
        # The long training has epochs of up to a second on a busy machine.
        if wait(ended, PATIENCE + (2 * self.epochs if self.long in options else 0)) != 0:
            raise CaseError(f'a training failed: {last_line(work)}')

    def test(self, checkpoint: Path, *options: str) -> tuple[int, Path]:
        """Exit status of ``tools/test.py``, and the folder of its output."""
        work = self.folder()
        command = [sys.executable, '-W', 'ignore', str(TOOLS / 'test.py'), str(self.config)]
        command += [str(checkpoint), '--work-dir', str(work)]
        command += ['--cfg-options', *options] if options else []
        return wait(begin(command, work)), work

    def model(self, work: Path) -> tuple[dict, Tensor]:
        """Tuned weights in the last checkpoint, and what the model that loads it returns."""
        path = newest(work)
        batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(self.seed))
        # mmengine's scope belongs to the whole process, and cases run in threads of it.
        with _building, DefaultScope.overwrite_default_scope('mmpretrain'), torch.no_grad():
            model = MODELS.build(protune_mm.load_config(str(self.config)).model).eval()
            load_checkpoint(model, str(path), map_location='cpu', logger='faults')
            return tuned(path), model(batch)

    def compare(self, work: Path, reference: tuple[dict, Tensor] | None = None) -> str:
        """Say that the last checkpoint is the reference's, bit for bit.

        Raises:
            CaseError: it is not.
        """
        weights, outputs = reference or self.reference
        found, seen = self.model(work)
        if found.keys() != weights.keys():
            raise CaseError('the checkpoint has other keys than the reference')
        for name, tensor in weights.items():
            if not torch.equal(tensor, found[name]):
                raise CaseError(f'{name} differs from the reference')
        if not torch.equal(outputs, seen):
            raise CaseError('the model returns something else than the reference')
        return 'right model, bit for bit'


_building = threading.Lock()


class CaseError(Exception):
    """A case did not end well."""


def draw(root: Path, seed: int) -> None:
    """Twelve images of two classes."""
    pixels = np.random.default_rng(seed)
    for i in range(12):
        folder = root / 'ab'[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f'{i}.png'), pixels.integers(0, 255, (32, 32, 3), dtype=np.uint8))


def weights(path: Path, seed: int) -> Path:
    """A file of random weights of the base."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        backbone = MODELS.build(dict(type='ResNet', depth=18, num_stages=4, style='pytorch'))
    backbone.init_weights()
    torch.save(backbone.state_dict(), path)
    return path


def begin(command: list[str], work: Path, **more: str) -> subprocess.Popen:
    """Start a program in a process group of its own, its output in ``work/output``."""
    with (work / 'output').open('ab') as output:
        # On the CPU, where bits are the same each time: a GPU is hidden.
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **more}
        return subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env=environment
        )


def wait(program: subprocess.Popen, patience: float = PATIENCE) -> int:
    """Exit status of a program.

    Raises:
        CaseError: it does not end.
    """
    try:
        return program.wait(patience)
    except subprocess.TimeoutExpired as error:
        kill_group(program)
        raise CaseError(f'the program has not ended after {patience:g} s') from error


def kill_group(program: subprocess.Popen) -> None:
    """kill -9 a program and all that it started."""
    # torchrun gives each rank a group of its own.
    for pid in (program.pid, *descendants(program.pid)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    program.wait()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started."""
    found: list[int] = []
    for file in Path(f'/proc/{pid}/task').glob('*/children'):
        with suppress(OSError):
            found += map(int, file.read_text().split())
    return found


def last_line(work: Path) -> str:
    """Last line of a program's output."""
    lines = (work / 'output').read_text(errors='replace').strip().splitlines()
    return lines[-1] if lines else ''


def newest(work: Path) -> Path:
    """The last checkpoint of a work folder."""
    return max(work.glob('*.pth'), key=lambda path: path.stat().st_mtime_ns)


def tuned(path: Path) -> dict:
    """Weights in a checkpoint."""
    return torch.load(path, weights_only=True)['state_dict']


def until(condition: Callable[[], bool], program: subprocess.Popen, pause: float = 0.02) -> bool:
    """Wait for something; False if the program ended first.

    Raises:
        CaseError: neither happens.
    """
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if condition():
            return True
        if program.poll() is not None:
            return False
        time.sleep(pause)
    kill_group(program)
    raise CaseError('nothing happened')


@contextmanager
def running(bench: Bench, work: Path, *options: str, resume: bool = False) -> Iterator:
    """A training that has begun to train."""
    files = {p.name for p in work.glob('epoch_*.pth')}
    program = bench.start(work, *options, resume=resume)
    try:
        until(lambda: {p.name for p in work.glob('epoch_*.pth')} - files != set(), program)
        yield program
    finally:
        kill_group(program)


def clear_error(status: int, work: Path, *parts: str) -> str:
    """Say that a program ended with one clear error.

    Args:
        status: its exit status.
        work: the folder of its output.
        *parts: what the last line of it must name.

    Raises:
        CaseError: it did not; or the error is one of ours and comes with a traceback.
    """
    line, text = last_line(work), (work / 'output').read_text(errors='replace')
    if status == 0:
        raise CaseError('the program ended as if all were well')
    for part in parts:
        if part not in line:
            raise CaseError(f"exit status {status}, but no '{part}' in: {line}")
    if status == 2 and 'Traceback' in text:
        raise CaseError(f'a traceback comes with: {line}')
    return f'exit status {status}: {line.removeprefix("error: ")[:110]}'


def undisturbed(bench: Bench, _: int) -> str:
    work, long = bench.folder(), bench.folder()
    with ThreadPoolExecutor(2) as pool:
        trainings = [pool.submit(bench.train, work), pool.submit(bench.train, long, bench.long)]
        for training in trainings:
            training.result()
    bench.reference = bench.model(work)
    bench.good = newest(work)
    bench.long_reference = bench.model(long)
    return f'{len(bench.reference[0])} tensors, {newest(work).stat().st_size / 1e6:.1f} MB'


def kills(bench: Bench, count: int) -> str:
    """kill -9 one training again and again, and let it finish."""
    work, writing, done = bench.folder(), 0, 0
    while done < count:
        program = bench.start(work, bench.long, resume=True)
        # Two of five while a file is written; the others at any moment, the start included.
        aim = done % 5 in (1, 3)
        partial = lambda: next(work.glob('.*.partial'), None) is not None  # noqa: E731
        trained = len(list(work.glob('epoch_*.pth')))
        if aim:
            alive = until(partial, program, 0.0005)
        else:
            log = work / 'output'
            size = log.stat().st_size
            until(lambda: b'Epoch(train)' in log.read_bytes()[size:], program)  # noqa: B023
            alive = program.poll() is None
            time.sleep(bench.random.random() * 0.8)
        alive = alive and program.poll() is None
        kill_group(program)
        if not alive:
            raise CaseError(
                f'the training ended before kill {done + 1} ({trained} files): {last_line(work)}'
            )
        writing += next(work.glob('.*.partial'), None) is not None
        for path in work.glob('.*.partial'):
            path.unlink()  # Left behind by the kill, for the next look.
        done += 1
    bench.train(work, bench.long, resume=True)
    if writing < min(2, count):
        raise CaseError(f'only {writing} of {count} kills hit a file that was written')
    told = bench.compare(work, bench.long_reference)
    return f'{told}; {count} kills, {writing} while a file was written'


def disk_full(bench: Bench, _: int) -> str:
    work = bench.folder()
    with running(bench, work) as program:
        resource.prlimit(program.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        status = wait(program)
        told = clear_error(status, work, 'could not be written')
    bench.train(work, resume=True)
    return f'{told}; then {bench.compare(work)}'


def damaged(how: str) -> Callable[[Bench, int], str]:
    def case(bench: Bench, _: int) -> str:
        path = bench.folder() / 'damaged.pth'
        shutil.copy(bench.good, path)
        raw = bytearray(path.read_bytes())
        if how == 'truncated':
            path.write_bytes(raw[: bench.random.randrange(len(raw) // 4, len(raw) - 1)])
        elif how == 'bit-flipped':
            with zipfile.ZipFile(path) as archive:
                part = max(archive.infolist(), key=lambda info: info.file_size)
            raw[part.header_offset + 100 + bench.random.randrange(part.file_size - 200)] ^= 16
            path.write_bytes(raw)
        elif how == 'empty':
            path.write_bytes(b'')
        elif how == 'foreign':
            path.write_bytes(b'This is no checkpoint.')
        else:
            torch.save(dict(state_dict=_Malicious()), path)
        status, work = bench.test(path)
        if (bench.root / 'code_ran').exists():
            raise CaseError('code of the file ran')
        return clear_error(status, work, str(path))

    return case


class _Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ('code_ran',))


def other(*parts: str, options: Callable[[Bench], list]) -> Callable[[Bench, int], str]:
    def case(bench: Bench, _: int) -> str:
        return clear_error(*bench.test(bench.good, *options(bench)), *parts)

    return case


def wrong_base(bench: Bench, _: int) -> str:
    option = f'model.backbone.init_cfg.checkpoint={bench.other_base}'
    status, work = bench.test(bench.good, option)
    return clear_error(status, work, 'another base', str(bench.base), str(bench.other_base))


def missing_base(bench: Bench, _: int) -> str:
    status, work = bench.test(bench.good, 'model.backbone.init_cfg=None')
    return clear_error(status, work, str(bench.base), 'PROTUNE_BASE')


def changed_set(bench: Bench, _: int) -> str:
    work = bench.folder()
    with running(bench, work):
        pass
    program = bench.start(work, 'model.neck.type=GeneralizedMeanPooling', resume=True)
    return clear_error(wait(program), work, 'cannot be resumed', 'neck')


def dead_worker(bench: Bench, _: int) -> str:
    work = bench.folder()
    with running(bench, work, 'train_dataloader.num_workers=1') as program:
        until(lambda: descendants(program.pid) != [], program, 0.001)
        for child in descendants(program.pid):
            os.kill(child, signal.SIGKILL)
        told = clear_error(wait(program), work, 'worker')
    bench.train(work, 'train_dataloader.num_workers=1', resume=True)
    whole = bench.folder()
    bench.train(whole, 'train_dataloader.num_workers=1')
    return f'{told}; then {bench.compare(work, bench.model(whole))}'


def no_number(bench: Bench, _: int) -> str:
    work = bench.folder()
    with running(bench, work):
        pass
    before = bench.model(work)
    program = bench.start(work, HUGE_LOSS, resume=True)
    told = clear_error(wait(program), work, 'diverged')
    bench.compare(work, before)
    bench.train(work, resume=True)
    return f'{told}; then {bench.compare(work)}'


HUGE_LOSS = 'model.head.loss.loss_weight=1e300'
"""More than a float32 holds."""


def ranks(bench: Bench, work: Path, resume: bool = False) -> subprocess.Popen:
    """Begin a training of two processes."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    command = [
        'bash',
        str(TOOLS / 'dist_train.sh'),
        str(bench.config),
        '2',
        '--work-dir',
        str(work),
    ]
    return begin(command + ['--resume'] * resume, work, PORT=str(port), PATH=path)


def dead_rank(bench: Bench, _: int) -> str:
    whole, work = bench.folder(), bench.folder()
    if wait(ranks(bench, whole)) != 0:
        raise CaseError(f'two ranks do not train: {last_line(whole)}')
    program = ranks(bench, work)
    try:
        if not until(lambda: next(work.glob('epoch_*.pth'), None) is not None, program):
            raise CaseError(f'two ranks do not train: {last_line(work)}')
        os.kill(max(descendants(program.pid)), signal.SIGKILL)
        status = wait(program)
    finally:
        kill_group(program)
    text = (work / 'output').read_text(errors='replace')
    if status == 0 or ('SIGKILL' not in text and 'Signal 9' not in text):
        raise CaseError(f'exit status {status}: {last_line(work)}')
    if wait(ranks(bench, work, resume=True)) != 0:
        raise CaseError(f'it does not resume: {last_line(work)}')
    told = bench.compare(work, bench.model(whole))
    return f'exit status {status}, names the rank and its signal; then {told}'


def two_trainings(bench: Bench, _: int) -> str:
    work = bench.folder()
    with running(bench, work, bench.long) as first:
        elsewhere = bench.folder()
        second = bench.start(work, output=elsewhere)
        told = clear_error(wait(second), elsewhere, 'another training')
        wait(first)
    return f'{told}; the first: {bench.compare(work, bench.long_reference)}'


CASES: dict[str, Callable[[Bench, int], str]] = {
    'undisturbed': undisturbed,
    'kill -9': kills,
    'disk full while saving': disk_full,
    **{f'{how} checkpoint': damaged(how) for how in
       ('truncated', 'bit-flipped', 'empty', 'foreign', 'malicious')},
    'wrong base': wrong_base,
    'missing base': missing_base,
    'other prompt type': other(
        'prompt.type', options=lambda bench: ['model.backbone.prompt.type=Adapter']
    ),
    'other ratio': other('prompt.ratio', options=lambda bench: ['model.backbone.prompt.ratio=4']),
    'other stages': other('blocks', options=lambda bench: ['model.backbone.stages=[layer1]']),
    'other trainable set at resume': changed_set,
    'a worker dies': dead_worker,
    'loss is no number': no_number,
    'one of two ranks dies': dead_rank,
    'two trainings in one folder': two_trainings,
}  # fmt: skip


def run_case(bench: Bench, name: str, count: int) -> str:
    """What a case has to tell; ``FAILED`` and why if it did not end well."""
    try:
        return CASES[name](bench, count)
    except CaseError as error:
        return f'FAILED: {error}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--quick', action='store_true', help='5 kills instead of 50')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--jobs', type=int, default=min(4, len(os.sched_getaffinity(0))), help='cases side by side'
    )
    parser.add_argument('--only', nargs='+', choices=list(CASES), help='these cases')
    parser.add_argument('--out', type=Path, help='a document to write the table to')
    parser.add_argument('--keep', help='a folder that stays, for looking into')
    args = parser.parse_args()
    count = 5 if args.quick else 50
    chosen = args.only or list(CASES)[1:]
    args.out = args.out and args.out.resolve()
    root = Path(args.keep or tempfile.mkdtemp(prefix='faults_')).resolve()
    root.mkdir(parents=True, exist_ok=True)
    os.chdir(root)  # Where code of a malicious file would write.
    begun = time.monotonic()
    rows = dict.fromkeys(['undisturbed', *chosen], '')
    failed = 0

    def tell(name: str, told: str) -> None:
        nonlocal failed
        rows[name], failed = told, failed + told.startswith('FAILED')
        done, passed = sum(map(bool, rows.values())), time.monotonic() - begun
        print(f'[{done}/{len(rows)}, {passed:.0f} s] {name}: {told}', flush=True)

    try:
        bench = Bench(root, args.seed, epochs=8 + 6 * count)
        tell('undisturbed', run_case(bench, 'undisturbed', count))
        with ThreadPoolExecutor(args.jobs) as pool:
            started = {
                pool.submit(run_case, bench.of_case(name), name, count): name
                for name in chosen
                if not failed
            }
            for case in as_completed(started):
                tell(started[case], case.result())
    finally:
        if not args.keep:
            shutil.rmtree(root, ignore_errors=True)
    width = max(map(len, rows))
    well = sum(bool(told) for told in rows.values()) - failed
    table = '\n'.join(
        f'{name:{width}}  {told.replace(str(root), "")}' for name, told in rows.items()
    )
    summary = (
        f'{table}\n\n{well} of {len(rows)} cases ended well, in {time.monotonic() - begun:.0f} s\n'
        f'seed {args.seed}, protune_mm {protune_mm.__version__}, torch {torch.__version__}, '
        f'{platform.machine()}, {args.jobs} cases side by side\n'
    )
    print(f'\n{summary}')
    if args.out:
        Path(args.out).write_text(f'{DOCUMENT}```\n{summary}```\n')
    sys.exit(0 if well == len(rows) else 1)


if __name__ == '__main__':
    main()
