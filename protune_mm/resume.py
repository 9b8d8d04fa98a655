"""Resume a training as if it had never stopped.

mmengine restores weights, optimizer and schedules. What is added here: the random state, the place
inside an epoch, and a validation that leaves the random state of the training alone.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from .checkpoints import INFO
from .files import PREEMPTED
from .registry import HOOKS


def random_state() -> dict:
    """The state of all random generators of this process, as plain tensors and numbers."""
    version, keys, gauss = random.getstate()
    name, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    return dict(
        torch=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        python=dict(version=version, keys=torch.tensor(keys), gauss=gauss),
        numpy=dict(
            name=str(name),
            words=torch.from_numpy(words.astype(np.int64)),
            position=int(position),
            has_gauss=int(has_gauss),
            cached=float(cached),
        ),
    )


def set_random_state(state: dict) -> None:
    """Continue from a :func:`random_state`."""
    torch.set_rng_state(state['torch'].cpu())
    if state['cuda'] and torch.cuda.is_available():
        count = min(len(state['cuda']), torch.cuda.device_count())
        torch.cuda.set_rng_state_all([s.cpu() for s in state['cuda'][:count]])
    python, words = state['python'], state['numpy']
    random.setstate((python['version'], tuple(python['keys'].tolist()), python['gauss']))
    np.random.set_state(
        (
            words['name'],
            words['words'].cpu().numpy().astype(np.uint32),
            words['position'],
            words['has_gauss'],
            words['cached'],
        )
    )


class _Skipping:
    """A dataloader for one epoch that starts after some batches, in the random state of then."""

    def __init__(self, dataloader: Any, skip: int, state: dict | None) -> None:
        self._dataloader, self._skip, self._state = dataloader, skip, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataloader, name)

    def __len__(self) -> int:
        return len(self._dataloader)

    def __iter__(self) -> Iterator:
        # An iterator draws a number when it is made: that of a whole epoch after the state of
        # then, that of an epoch that was going on before it.
        if self._skip == 0:
            self._restore()
        batches = iter(self._dataloader)
        for _ in range(self._skip):
            next(batches, None)
        if self._skip:
            self._restore()
        return batches

    def _restore(self) -> None:
        if self._state is not None:
            set_random_state(self._state)


class _Advancing:
    """The endless iterator of an iteration-based loop, in the random state of then from there."""

    def __init__(self, iterator: Any, skip: int, state: dict) -> None:
        self._iterator, self._left, self._state = iterator, skip, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

    def __next__(self) -> Any:
        if self._left == 0:
            set_random_state(self._state)
        self._left -= 1
        return next(self._iterator)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Save the random state and the place in the epoch, and go on from there.

    On a CPU with a seed, a resumed training is bit-identical to one that never stopped, as long as
    its data workers are not persistent: those carry their own random state from one epoch to the
    next. Several processes each go on from their own state; another number of them start anew.
    """

    # After DistSamplerSeedHook, which needs the dataloader itself.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._before_val: dict | None = None
        self._resumed: dict | None = None
        self._whole: Any = None
        self._gathered: list[dict] | None = None

    def gather_random_states(self, runner: Runner) -> None:
        """Collect the states of all processes, which are about to save a checkpoint together.

        Only the first one writes it, so this is called where all of them come.
        """
        self._gathered = all_gather_object(self._before_val or random_state())

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the random states, those before a validation if one is going on."""
        states, self._gathered = self._gathered, None
        if states is None and get_world_size() == 1:
            states = [self._before_val or random_state()]
        if states is not None:
            checkpoint.setdefault(INFO, {})['random'] = states

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note what is to be restored when the first batch is drawn."""
        if not runner._resume:
            return
        self._resumed = checkpoint.get(INFO, {})

    def before_train_epoch(self, runner: Runner) -> None:
        """Go to the batch at which the checkpoint was written."""
        if self._resumed is None:
            return
        states, self._resumed = self._resumed.get('random', []), None
        state = states[get_rank()] if len(states) == get_world_size() else None
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            skip = loop.iter - loop.epoch * len(loop.dataloader)
            if not 0 <= skip < len(loop.dataloader):
                runner.logger.warning(
                    f'the checkpoint was written after {loop.iter} iterations of '
                    f'{loop.epoch} epochs, which does not fit epochs of {len(loop.dataloader)}: '
                    'the epoch starts at its first batch'
                )
                skip = 0
            if skip:
                runner.logger.info(f'going on at batch {skip + 1} of epoch {loop.epoch + 1}')
            self._whole = loop.dataloader
            loop.dataloader = _Skipping(loop.dataloader, skip, state)
        elif isinstance(loop, IterBasedTrainLoop) and state is not None:
            loop.dataloader_iterator = _Advancing(loop.dataloader_iterator, loop.iter, state)

    def after_train_epoch(self, runner: Runner) -> None:
        """From the next epoch on the dataloader is the stock one again."""
        if self._whole is not None:
            runner.train_loop.dataloader, self._whole = self._whole, None

    def before_val(self, runner: Runner) -> None:
        """Note the random state of the training."""
        self._before_val = random_state()

    def after_val(self, runner: Runner) -> None:
        """Go on with it: a resumed training does not validate again."""
        if self._before_val is not None:
            set_random_state(self._before_val)
            self._before_val = None


SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
AGAIN = 5.0
"""Seconds within which a signal is the same one: a cluster's, say, and torchrun's after it."""


def unsignalled(dataloader: Any) -> Any:
    """Let the workers of a dataloader go on when the whole group of processes is signalled.

    A worker that dies of it would end the training before it has saved. Told to end by the
    training itself, it ends.
    """
    if dataloader.num_workers > 0:
        stock = dataloader.worker_init_fn
        dataloader.worker_init_fn = functools.partial(_start_worker, stock)
    return dataloader


def _start_worker(stock: Callable | None, worker: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_with_training, daemon=True).start()
    if stock is not None:
        stock(worker)


def _end_with_training() -> None:
    """End this worker on a SIGTERM of its training, as PyTorch's own handler does.

    An interpreter that exits in the middle of an epoch waits for its workers after that.
    """
    while True:
        told = signal.sigwaitinfo(SIGNALS)
        if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
            os._exit(0)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM or SIGUSR1, save after the running step and exit.

    The exit status is 128 + the signal's number, as of a process that died of it, by which Slurm
    and ``tools/slurm_train.sh`` know that the job was preempted. All processes of a distributed
    training stop after the same step. A second signal, some seconds later, ends the
    process at once.
    """

    priority = 'LOWEST'

    def __init__(self) -> None:
        self._signal = 0
        self._since = 0.0
        self._before: dict = {}
        self._group: Any = None

    def before_train(self, runner: Runner) -> None:
        """Listen."""
        if get_world_size() > 1:
            # Over gloo, which waits for no GPU.
            self._group = torch.distributed.new_group(backend='gloo')
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # Not in the main thread: whoever runs it there listens.
            self._before = {}

    def after_train(self, runner: Runner) -> None:
        """Listen no more."""
        self.unlisten()

    def unlisten(self) -> None:
        """Give the signals back; the Runner does so, too, when a training ends by an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: object) -> None:
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > AGAIN:
            # It does not come to the end of its step.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def after_train_iter(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Save and exit if a signal came, once no gradients are being accumulated."""
        number = self._agree()
        loop, step = runner.train_loop, runner.iter + 1
        ends = isinstance(loop, EpochBasedTrainLoop) and step % len(loop.dataloader) == 0
        # At the end of an epoch the schedules have to step first; at that of the training the
        # rest is short.
        if number and not ends and step < loop.max_iters and _between_updates(runner):
            self._stop(runner, runner.epoch, step, number)

    def after_train_epoch(self, runner: Runner, *args: object, **kwargs: object) -> None:
        """Save and exit if a signal came in the last step of the epoch."""
        loop = runner.train_loop
        if not isinstance(loop, EpochBasedTrainLoop) or runner.epoch + 1 >= loop.max_epochs:
            return
        number = self._agree()
        if number:
            self._stop(runner, runner.epoch + 1, runner.iter, number)

    def _agree(self) -> int:
        """The signal that any process has received so far, the same in all of them."""
        if self._group is None:
            return self._signal
        told = torch.tensor(self._signal)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._group)
        return int(told)

    def _stop(self, runner: Runner, epoch: int, step: int, number: int) -> None:
        """Write a checkpoint where ``--resume`` finds it, and exit."""
        name = PREEMPTED.format(step)
        runner.call_hook('gather_random_states')
        runner.save_checkpoint(
            runner.work_dir,
            name,
            meta=dict(epoch=epoch, iter=step),
            by_epoch=epoch > runner.epoch,
        )
        if self._group is not None:
            # The first to exit takes the others with it: not before the file is written.
            torch.distributed.barrier(self._group)
        runner.logger.warning(
            f'{signal.Signals(number).name}: stopped after step {step}; --resume goes on from '
            f'{Path(runner.work_dir, name)}'
        )
        if self._group is not None:
            # A launcher ends the others as soon as one has ended, and reports the highest status.
            self._before = dict.fromkeys(self._before, signal.SIG_IGN)
        self.unlisten()
        sys.exit(128 + number)


def _between_updates(runner: Runner) -> bool:
    wrapper = runner.optim_wrapper
    counts = getattr(wrapper, '_accumulative_counts', 1)
    return counts == 1 or wrapper._inner_count % counts == 0
