"""What the command-line tools share."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .checkpoints import StockModelHook
from .config import config_backbones, is_protuned, library, load_config
from .policies import POLICIES, check_policy
from .runner import CarefulRunner

DEBUG = 'PROTUNE_DEBUG'
"""Environment variable: set to 1 for the traceback of an error that is otherwise one line."""


def add_common_arguments(parser: argparse.ArgumentParser, checkpoint: bool = False) -> None:
    """Arguments of both tools, spelled as in MMDetection."""
    parser.add_argument('config', help='config file, or package::path, stock or Pro-tuned')
    if checkpoint:
        parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--work-dir',
        help="directory for logs, checkpoints and metrics; default: the config's own, else "
        'work_dirs/NAME OF CONFIG, with -protune and the policy behind it where these are given',
    )
    parser.add_argument('--protune', action='store_true', help='Pro-tune a stock config')
    parser.add_argument(
        '--policy',
        metavar='|'.join(POLICIES),
        help="the twin of a Pro-tuned config: 'head-only' (frozen backbone, no prompts), 'full' "
        "(stock fine-tuning), or frozen but for biases, norms or the last K blocks ('last-2')",
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings, key=value: model.backbone.prompt.ratio=4',
    )
    parser.add_argument('--no-pin-memory', action='store_true', help='do not pin host memory')
    parser.add_argument(
        '--no-persistent-workers', action='store_true', help='restart data workers every epoch'
    )
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='launcher'
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse(parser: argparse.ArgumentParser) -> tuple[Config, argparse.Namespace]:
    """Parse the command line and return the config with what both tools set, and the arguments."""
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.protune, args.policy, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or default_folder(args, cfg.get('work_dir'))
    set_dataloader_defaults(cfg, args)
    return cfg, args


def default_folder(args: argparse.Namespace, named: str | None = None) -> str:
    """The work folder of a config: a twin of it has one of its own.

    Else a training of one would write over the checkpoints of the other.

    Args:
        args: the arguments of a tool.
        named: the folder that the config names. Default: ``work_dirs`` and the name of the config.
    """
    name = Path(args.config.partition('::')[2] or args.config).stem
    policy = args.policy if args.policy != 'prompts' else None
    parts = (named or str(Path('work_dirs') / name), 'protune' if args.protune else None, policy)
    return '-'.join(filter(None, parts))


def read_config(
    path: str, protune: bool = False, policy: str | None = None, options: dict | None = None
) -> Config:
    """Read a config, apply ``--cfg-options``, Pro-tune it, and choose its twin last.

    Raises:
        ValueError: a policy for a config that is not Pro-tuned, and what
            :func:`protune_mm.protune_config` raises.
    """
    if policy is not None:
        check_policy(policy)
    cfg = load_config(path, protune=protune, cfg_options=options)
    if policy is not None:
        if not is_protuned(cfg):
            raise ValueError(f'--policy {policy}: {path} is not Pro-tuned; add --protune')
        for _, backbone in config_backbones(cfg):
            backbone['policy'] = policy
    return cfg


def set_dataloader_defaults(cfg: Config, args: argparse.Namespace) -> None:
    """Set what MMPretrain's stock scripts set for its dataloaders, and the two switches.

    Its configs name no ``collate_fn`` and rely on this.
    """
    defaults = {}
    if library(cfg) == 'mmpretrain':
        defaults = dict(
            pin_memory=True, persistent_workers=True, collate_fn=dict(type='default_collate')
        )
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if not cfg.get(name):
            continue
        loader = ConfigDict({**defaults, **cfg[name]})
        if args.no_pin_memory:
            loader.pin_memory = False
        if args.no_persistent_workers or loader.get('num_workers') == 0:
            loader.persistent_workers = False
        cfg[name] = loader


def draw_predictions(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualization hook of the config's library.

    Raises:
        ValueError: the config has no such hook.
    """
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise ValueError(f'--show: {args.config} has no default_hooks.visualization')
    # MMSegmentation's draws every 50th image only, MMPretrain's every 5000th.
    hook['interval'] = 1
    # MMDetection's would lie in its work folder.
    folder = args.show_dir and str(Path(args.show_dir).absolute())
    if library(cfg) == 'mmpretrain':
        hook.update(enable=True, show=args.show, wait_time=args.wait_time, out_dir=folder)
        return
    hook['draw'] = True
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir and library(cfg) == 'mmdet':
        hook['test_out_dir'] = folder
    elif args.show_dir:
        cfg.visualizer['save_dir'] = folder


def is_careful(cfg: Config) -> bool:
    """Whether the runner of a config is one of ours, which knows ``first_load_from``."""
    name_runner(cfg)
    kind = cfg.get('runner_type', Runner)
    kind = RUNNERS.get(kind) if isinstance(kind, str) else kind
    return isinstance(kind, type) and issubclass(kind, CarefulRunner)


def name_runner(cfg: Config) -> None:
    """Name our runner in a config that names none and is Pro-tuned."""
    if 'runner_type' not in cfg and is_protuned(cfg):
        cfg.runner_type = 'protune_mm.ProTuneRunner'


def build_runner(cfg: Config) -> Runner:
    """Build the runner a config asks for, and ours where it asks for none and is Pro-tuned."""
    name_runner(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    if not any(isinstance(hook, StockModelHook) for hook in runner.hooks):
        runner.register_hook(StockModelHook())
    return runner


def _leave_group() -> None:
    """Take leave of the other processes: the threads of a group abort one that just exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def run(main: Callable[[], None]) -> None:
    """Run a tool; bad input ends in one line on standard error and exit status 2.

    Errors inside training that are not our own checks keep their traceback.
    """
    stopped = None
    try:
        main()
    except SystemExit as end:  # A training that a signal has stopped, say.
        stopped = end.code
    except Exception as error:
        if os.environ.get(DEBUG) == '1' or not _is_bad_input(error):
            raise
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
    # Only now is nothing left of `main`, whose model holds on to the group.
    _leave_group()
    if stopped is not None:
        sys.exit(stopped)


def _is_bad_input(error: Exception) -> bool:
    """Whether one of our checks raised the error, or a file was missing before the first step."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised_in = frames[-1].f_globals
    running = any(frame.f_code.co_name in ('run_iter', 'run_epoch') for frame in frames)
    name = raised_in.get('__name__', '')
    # A tool may have modules and packages beside it; an environment there lies deeper.
    tools = Path(sys.argv[0]).resolve().parent
    file = raised_in.get('__file__')
    beside = file is not None and tools in Path(file).resolve().parents[:2]
    ours = name.startswith('protune_mm.') or beside
    return (ours and isinstance(error, ValueError | TypeError | RuntimeError)) or (
        isinstance(error, FileNotFoundError | ModuleNotFoundError) and not running
    )
