"""Many jobs side by side, their results noted at once, so that a stopped run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TextIO

import torch

DIED = 'the process died'  # The reason where one ended without a result.


class HopelessError(ValueError):
    """What is wrong with more than one job: no other is begun."""


def hold(file: TextIO) -> None:
    """Wait until no other process holds an open file, and hold it until it is closed."""
    with contextlib.suppress(OSError):  # A file system without locks.
        fcntl.flock(file, fcntl.LOCK_EX)


def check_document(file: Path, start: str) -> None:
    """Refuse to write over a document that is not the tool's own.

    Args:
        file: where the tool would write its document.
        start: how that begins.

    Raises:
        ValueError: the file is there and begins otherwise.
    """
    if file.exists() and not file.read_text().startswith(start):
        raise ValueError(
            f'{file} is there, and this tool has not written it: name another folder by --out'
        )


class Results:
    """Results so far, in a file that a stopped run leaves behind.

    Args:
        path: of the file, JSON lines.
        processes: how many jobs run side by side.
        failure: makes the result of a job that raised an error or whose process died from its key
            and the reason. None: such a job has no result, and the next run tries it again.
    """

    def __init__(
        self,
        path: Path,
        processes: int,
        failure: Callable[[str, str], dict] | None = None,
    ) -> None:
        self.path = path
        self.processes = processes
        self.failure = failure
        self.failed: dict[str, str] = {}
        self.known = self.from_lines(self._read())

    def _read(self) -> list[dict]:
        """All lines but half a line at the end, which a stopped run may have left."""
        lines = []
        for number, line in enumerate(self._whole()[0].splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f'{self.path}, line {number}, is no JSON ({error}): remove the line, and what '
                    'it held is run again'
                ) from error
        return lines

    def _whole(self) -> tuple[str, bool]:
        """The whole lines of the file, and whether these are all of it."""
        text = self.path.read_text() if self.path.exists() else ''
        whole = text[: text.rfind('\n') + 1]
        with contextlib.suppress(json.JSONDecodeError):
            json.loads(text[len(whole) :])
            whole = f'{text}\n'  # Only the end of the line was lost.
        return whole, whole == text

    def mend(self) -> None:
        """Take half a line off the end, so that what is noted next is a line of its own."""
        if not self._whole()[1]:
            with self._held():
                pass

    def add(self, row: dict) -> None:
        """Put a result at the end of the file, which others may write to as well."""
        with self._held() as out:
            out.write(''.join(json.dumps(line) + '\n' for line in self.to_lines(row)))

    @contextlib.contextmanager
    def _held(self) -> Iterator[TextIO]:
        """The file, of whole lines, to write to its end while no other process does."""
        with self.path.open('a') as out:
            hold(out)
            whole, is_all = self._whole()
            if not is_all:
                # In place: another file of this name would not be the one that others hold.
                lost = len(whole.encode()) - self.path.stat().st_size
                out.write('\n') if lost > 0 else out.truncate(len(whole.encode()))
            yield out

    def read_again(self) -> None:
        """See what other processes have noted since."""
        self.known = self.from_lines(self._read())
        self.failed = {key: why for key, why in self.failed.items() if key not in self.known}

    def from_lines(self, lines: list[dict]) -> dict[str, dict]:
        """Key to result, from what the file holds."""
        return {line['key']: line for line in lines}

    def to_lines(self, row: dict) -> list[dict]:
        """What the file holds of one result."""
        return [row]

    def work(self, job: Callable[[str], dict], keys: Iterable[str]) -> list[dict]:
        """Run the jobs that have no result yet.

        Args:
            job: from a key to a result, a dict with at least ``key`` and ``status``.
            keys: of all jobs.

        Returns:
            list[dict]: the results there are, in the order of the keys.

        Raises:
            HopelessError: a job did. Those that have ended are noted.
        """
        keys = list(keys)
        self.mend()
        progress = Progress(sum(key not in self.known for key in keys))
        while todo := [key for key in keys if not self._done(key)]:
            self._side_by_side(job, todo, self.processes, progress)
            # What is left was cut off by the death of a process: one of the next few killed it,
            # perhaps for want of memory.
            left = [key for key in todo if not self._done(key)]
            for key in left[: 2 * self.processes]:
                self._side_by_side(job, [key], 1, progress)
                if not self._done(key):
                    self._fail(key, DIED, progress)
        return [self.known[key] for key in keys if key in self.known]

    def _done(self, key: str) -> bool:
        return key in self.known or key in self.failed

    def _side_by_side(
        self, job: Callable, keys: list[str], processes: int, progress: Progress
    ) -> None:
        spawn = multiprocessing.get_context('spawn')
        processes = min(processes, len(keys))
        with ProcessPoolExecutor(processes, spawn, start_worker) as pool:
            running = {pool.submit(job, key): key for key in keys}
            try:
                self._note_all(running, progress)
            except BaseException:
                # Ctrl-C, or a disk that is full: the pool would do all that waits first, and nobody
                # would note it.
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                raise

    def _note_all(self, running: dict[Future, str], progress: Progress) -> None:
        for done in as_completed(running):
            try:
                row = done.result()
            except BrokenProcessPool:
                return
            except HopelessError as error:
                raise HopelessError(str(error)) from None  # Without the frames of its process.
            except Exception as error:
                self._fail(running[done], f'{type(error).__name__}: {error}', progress)
            else:
                self._note(row, progress)

    def _fail(self, key: str, reason: str, progress: Progress) -> None:
        if self.failure is not None:
            self._note(self.failure(key, reason), progress)
        else:
            self.failed[key] = reason
            progress.show(dict(key=key, status='failed', reason=reason))

    def _note(self, row: dict, progress: Progress) -> None:
        self.known[row['key']] = row
        self.add(row)
        progress.show(row)


class Progress:
    """Says what is done, and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.time()

    def show(self, row: dict) -> None:
        """One line for a job that is done."""
        self.done += 1
        left = (time.time() - self.start) / self.done * (self.total - self.done) / 60
        note = f': {row["reason"][:400]}' if row['status'] == 'failed' else ''
        print(f'[{self.done}/{self.total}, {left:.0f} min left] {row["status"]} '
              f'{row["key"][:110]}{note}', flush=True)  # fmt: skip


def start_worker() -> None:
    """One thread and one GPU a process, no messages, and an end with the process it works for."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if torch.cuda.device_count() > 1:
        # Processes of a pool are numbered from 1 on, over all pools.
        number = multiprocessing.current_process()._identity[0]
        torch.cuda.set_device(number % torch.cuda.device_count())
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


def _end_with_parent() -> None:
    # A pool's workers outlive a parent that was killed, and would go on with what it had queued.
    multiprocessing.parent_process().join()
    os._exit(1)
