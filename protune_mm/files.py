"""Checkpoint files of a training: each is whole or not there, and the last good one is found."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS as STOCK_HOOKS

from .compat import damage
from .registry import HOOKS

PREEMPTED = 'preempted_iter_{}.pth'
"""Name of a checkpoint that a signal asked for; the next regular one replaces it."""
WRITTEN = re.compile(r'(epoch|iter|preempted_iter)_\d+\.pth')
"""Names of checkpoints of a training; others in its folder are exported ones, say."""


@HOOKS.register_module(name='CheckpointHook')
class SafeCheckpointHook(CheckpointHook):
    """mmengine's, but an old checkpoint is removed only when the new one is written.

    With ``max_keep_ckpts=1``, say, mmengine removes the only one first.
    """

    def _save_checkpoint_with_step(self, *args: Any, **kwargs: Any) -> None:
        runner = args[0] if args else kwargs['runner']
        runner.call_hook('gather_random_states')
        with self._removing_late():
            super()._save_checkpoint_with_step(*args, **kwargs)
        if is_main_process():
            for path in Path(runner.work_dir).glob(PREEMPTED.format('*')):
                path.unlink(missing_ok=True)

    def _save_best_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._removing_late():
            super()._save_best_checkpoint(*args, **kwargs)

    @contextmanager
    def _removing_late(self) -> Iterator[None]:
        if isinstance(self.file_backend, _LateRemoval):
            yield
            return
        late = _LateRemoval(self.file_backend)
        self.file_backend = late
        try:
            yield
        finally:
            self.file_backend = late.backend
        late.remove_now()


def safe_hook(kind: str | type) -> str | type:
    """The hook of a config as a :class:`SafeCheckpointHook`, under any name; others stay.

    Args:
        kind: type of a hook, as a config names it: mmengine's, or one that derives from it.
    """
    found = kind
    if isinstance(kind, str):
        with STOCK_HOOKS.switch_scope_and_registry(None) as registry:
            found = registry.get(kind)
    if not (isinstance(found, type) and issubclass(found, CheckpointHook)):
        return kind
    if issubclass(found, SafeCheckpointHook):
        return found
    if found is CheckpointHook:
        return SafeCheckpointHook
    return _safe(found)


@functools.cache
def _safe(kind: type) -> type:
    return type(kind.__name__, (SafeCheckpointHook, kind), {'__module__': kind.__module__})


class _LateRemoval:
    """A file backend that remembers what it was told to remove."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._calls: list[tuple] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def remove(self, path: str) -> None:
        self._calls.append((self.backend.remove, path, _inode(path)))

    def rmtree(self, path: str) -> None:
        self._calls.append((self.backend.rmtree, path, _inode(path)))

    def remove_now(self) -> None:
        for call, path, inode in self._calls:
            # The new checkpoint may have the name of the old one.
            if _inode(path) == inode:
                call(path)


def _inode(path: str) -> int | None:
    return Path(path).stat().st_ino if Path(path).exists() else None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file that a crash leaves as it was, or as it is at the end of the block.

    Args:
        path: of the file.

    Yields:
        Path: what to write instead, in the same folder; nothing of it is left after an error.
    """
    partial = path.with_name(f'.{path.name}.partial')
    try:
        yield partial
        with partial.open('rb') as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def last_good_checkpoint(folder: str) -> str | None:
    """The newest checkpoint in a work folder that is whole; None where there is none.

    That which ``last_checkpoint`` names, unless a signal had a later one written, or a crash came
    between a later one and that note. The files of a copied folder may have any times.

    Args:
        folder: a Runner's ``work_dir``.
    """
    logger = MMLogger.get_current_instance()
    found = {path for path in Path(folder).glob('*.pth') if WRITTEN.fullmatch(path.name)}
    pointer = Path(folder, 'last_checkpoint')
    told = pointer.read_text().strip() if pointer.is_file() else ''
    elsewhere = '://' in told
    if told and not elsewhere and Path(folder, Path(told).name).is_file():
        told = str(Path(folder, Path(told).name))  # Of a copied folder the note names another one.
    if elsewhere:
        found = {path for path in found if path.name.startswith(PREEMPTED.partition('{')[0])}
    elif told:
        # With a `filename_tmpl` or `out_dir` of its own the older ones lie beside it.
        alike = {path for path in Path(told).parent.glob('*.pth') if _differ_in_number(path, told)}
        found |= {Path(told), *alike}
    last = Path(told).resolve()
    files = sorted(
        {path.resolve() for path in found if path.is_file()},
        key=lambda path: (_is_after(path, last), path == last, path.stat().st_mtime_ns),
        reverse=True,
    )
    for path in files:
        wrong = damage(path)
        if wrong is None:
            return str(path)
        logger.warning(f'checkpoint {path} is left out: {wrong}')
    return told if elsewhere else None


def _is_after(path: Path, last: Path) -> bool:
    """Whether a checkpoint was written after the one that a training noted as its last.

    One for a signal is gone as soon as the next regular one is written. Of the others both name
    and time tell: one of an earlier training in the folder may have a higher number.
    """
    (kind, number), (last_kind, last_number) = _kind_of(path), _kind_of(last)
    if kind == 'preempted_iter':
        return True
    later = kind == last_kind and number > last_number and last.is_file()
    return later and path.stat().st_mtime_ns >= last.stat().st_mtime_ns


def _differ_in_number(path: Path, other: str) -> bool:
    """Whether the names of two files are the same but for the last number."""
    mine, its = (re.split(r'(\d+)', name) for name in (path.name, Path(other).name))
    differ = [i for i, (a, b) in enumerate(zip(mine, its, strict=False)) if a != b]
    return len(mine) == len(its) and differ == [len(mine) - 2]


def _kind_of(path: Path) -> tuple[str, int]:
    kind, _, number = path.stem.rpartition('_')
    return (kind, int(number)) if WRITTEN.fullmatch(path.name) else ('', 0)
