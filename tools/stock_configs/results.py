"""Results of many jobs, run side by side: noted at once, so that a stopped run goes on."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from .reading import file_of, result, short


class Results:
    """Results so far, in a file that a stopped run leaves behind.

    Args:
        path: of the file, a JSON line a job.
        processes: how many jobs run side by side.
    """

    def __init__(self, path: Path, processes: int) -> None:
        self.path = path
        self.processes = processes
        self.known = {row['key']: row for row in self._read()}
        if path.exists() and not path.read_text().endswith('\n'):
            with path.open('a') as out:  # A stopped run may have left half a line.
                out.write('\n')

    def _read(self) -> Iterator[dict]:
        """A line that was cut off is done again."""
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def work(self, job: Callable[[str], dict], keys: Iterable[str]) -> list[dict]:
        """Run the jobs that have no result yet.

        Args:
            job: from a key to a result.
            keys: 'kind what' of each job.

        Returns:
            list[dict]: the results of all keys.
        """
        keys = list(keys)
        progress = Progress(sum(key not in self.known for key in keys))
        while todo := [key for key in keys if key not in self.known]:
            self._side_by_side(job, todo, self.processes, progress)
            # What is left was cut off by the death of a process: one of the next few killed it,
            # perhaps for want of memory.
            left = [key for key in todo if key not in self.known]
            for key in left[: 2 * self.processes]:
                self._side_by_side(job, [key], 1, progress)
                if key not in self.known:
                    self._note(
                        result(key, 'failed', 'the process died', file=file_of(key)), progress
                    )
        return [self.known[key] for key in keys]

    def _side_by_side(self, job: Callable, keys: list[str], processes: int, progress: Progress):
        spawn = multiprocessing.get_context('spawn')
        processes = min(processes, len(keys))
        with ProcessPoolExecutor(processes, spawn, start_worker) as pool:
            running = {pool.submit(job, key): key for key in keys}
            for done in as_completed(running):
                try:
                    row = done.result()
                except BrokenProcessPool:
                    return
                except Exception as error:
                    row = result(running[done], 'failed', short(error), file=file_of(running[done]))
                self._note(row, progress)

    def _note(self, row: dict, progress: Progress) -> None:
        self.known[row['key']] = row
        with self.path.open('a') as out:
            out.write(json.dumps(row) + '\n')
        progress.show(row)


class Progress:
    """Says what is done, and how long the rest will take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.start = total, 0, time.time()

    def show(self, row: dict) -> None:
        """One line for a job that is done."""
        self.done += 1
        left = (time.time() - self.start) / self.done * (self.total - self.done) / 60
        note = f': {row["reason"][:150]}' if row['status'] == 'failed' else ''
        print(f'[{self.done}/{self.total}, {left:.0f} min left] {row["status"]} '
              f'{row["key"][:110]}{note}', flush=True)  # fmt: skip


def start_worker() -> None:
    """One thread a process, and no messages of the stack."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')
