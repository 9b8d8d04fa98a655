"""Train one config under several policies, same steps and seed, and write the table.

    python tools/compare.py configs/small/*.py --out docs/real_runs

Each run trains with tools/train.py, picks its best checkpoint by the validation split and tests
it on the test split. Results go to OUT/results.jsonl, one line a run, as soon as the run ends; a
run that is there is not repeated. The table in OUT/README.md is drawn from that file alone.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from jobs import Results, check_document
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook

from protune_mm import cli
from protune_mm.compat import processor, stack_versions
from protune_mm.policies import POLICIES, check_policy

TOOLS = Path(__file__).parent
ROOT = TOOLS.resolve().parent
ORDER = ('head-only', 'prompts', 'full')
TITLES = {'head-only': 'head-only', 'prompts': 'Pro-tuned', 'full': 'full fine-tuning'}

TITLE = '# Real runs: head-only, Pro-tuned and full fine-tuning'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('configs', nargs='+', help='Pro-tuned configs with save_best set')
    parser.add_argument('--policies', nargs='+', metavar='|'.join(POLICIES), default=list(ORDER))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--epochs', type=int, help='default: as the config says')
    parser.add_argument('--out', default='docs/real_runs', help='folder of results and table')
    parser.add_argument('--work-dir', default='work_dirs/compare')
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='handed to both tools'
    )
    args = parser.parse_args()
    for policy in args.policies:
        check_policy(policy)
    for config in args.configs:
        cfg = cli.read_config(config, options=parsed(args.cfg_options))
        if 'max_epochs' not in (cfg.get('train_cfg') or {}):
            parser.error(f'{config} counts no epochs (train_cfg.max_epochs), which this tool does')
        asked = score_asked(cfg)
        if not isinstance(asked, str) or asked == 'auto':
            parser.error(
                f'{config}: default_hooks.checkpoint.save_best={asked!r}: '
                "it has to name one score, such as 'coco/bbox_mAP'"
            )
    out = Path(args.out)
    check_document(out / 'README.md', TITLE)
    out.mkdir(parents=True, exist_ok=True)
    results = out / 'results.jsonl'
    plan = [(config, policy) for config in args.configs for policy in args.policies]
    for number, (config, policy) in enumerate(plan, 1):
        done = read(results)
        key = (place(config, Path.cwd()), policy, args.seed, args.epochs, *args.cfg_options)
        if any(key == key_of(row) for row in done):
            print(f'[{number}/{len(plan)}] {key}: already in {results}', flush=True)
            continue
        print(f'[{number}/{len(plan)}] {key}: training', flush=True)
        row = run(config, policy, args)
        note(row, results)
        print(f'[{number}/{len(plan)}] {key}: test {row["metric"]} {row["test"]}', flush=True)
    (out / 'README.md').write_text(table(read(results)))


def key_of(row: dict) -> tuple:
    asked = re.search(r' --epochs (\d+)', row['command'])
    epochs = int(asked[1]) if asked else None
    # Older rows tell the path in the command alone, which was run from the root.
    path = row.get('path') or place(row['command'].split()[2], ROOT)
    return (path, row['policy'], row['seed'], epochs, *row.get('options', ()))


def place(config: str, folder: Path) -> str:
    """Path of a config from the root of the repository, or ``package::path`` as it is.

    Args:
        config: as it was named.
        folder: in which it was.
    """
    return config if '::' in config else os.path.relpath((folder / config).resolve(), ROOT)


def score_asked(cfg: Config) -> object:
    """What a config picks the best checkpoint by."""
    hooks = cfg.get('default_hooks') or {}
    return (hooks.get('checkpoint') or {}).get('save_best')


def run(config: str, policy: str, args: argparse.Namespace) -> dict:
    """Train, pick by validation, test; return one line of results."""
    cfg = cli.read_config(config, policy=policy, options=parsed(args.cfg_options))
    hook, metric = cfg.default_hooks.checkpoint, score_asked(cfg)
    name = '-'.join([policy, f'seed{args.seed}', *map(short, args.cfg_options)])
    path = place(config, Path.cwd())
    work = Path(args.work_dir) / '-'.join(Path(path).with_suffix('').parts) / name
    options = [f'randomness.seed={args.seed}', *args.cfg_options]
    if args.epochs:
        options.append(f'train_cfg.max_epochs={args.epochs}')
    train = [config, '--policy', policy, '--work-dir', str(work), '--cfg-options', *options]
    start = time.time()
    call('train.py', train)
    wall = time.time() - start
    curve = validation_curve(work, metric)
    # Which one that is the hook knows: of a loss the least is the best.
    found = work.glob(f'best_{metric.replace("/", "_")}_epoch_*.pth')
    checkpoint = max(found, key=lambda path: path.stat().st_mtime, default=None)
    if checkpoint is None:
        sys.exit(
            f'{work} has no best checkpoint by {metric}: is it among the scores of validation?'
        )
    best = int(checkpoint.stem.rpartition('_')[2])
    scores = work / 'test.json'
    test = [config, str(checkpoint), '--policy', policy, '--work-dir', str(work)]
    extra = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    call('test.py', [*test, '--out', str(scores), *extra])
    return {
        'config': Path(config).stem,
        'path': path,
        'policy': policy,
        'options': args.cfg_options,
        'seed': args.seed,
        'metric': metric,
        'rule': CheckpointHook(save_best=metric, rule=hook.get('rule')).rules[0],
        'epochs': max(curve),
        'best_epoch': best,
        'val': curve[best],
        'val_curve': list(curve.values()),
        'test': json.loads(scores.read_text())[metric],
        'parameters': counts(cfg, policy),
        'wall_s': round(wall),
        'device': torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        'threads': torch.get_num_threads(),
        'command': f'python tools/compare.py {config} --policies {policy} --seed {args.seed}'
        + (f' --epochs {args.epochs}' if args.epochs else '')
        + ' '.join(['', *extra]),
        'versions': stack_versions(),
    }


def call(tool: str, arguments: list) -> None:
    log = subprocess.run(
        [sys.executable, str(TOOLS / tool), *arguments], capture_output=True, text=True
    )
    if log.returncode:
        sys.exit(f'tools/{tool} {" ".join(arguments)} failed:\n{log.stderr[-3000:]}')


def validation_curve(work: Path, metric: str) -> dict:
    """Epoch to validation score, from the newest log of a work directory."""
    newest = max(work.glob('*/vis_data/scalars.json'), key=lambda p: p.stat().st_mtime)
    rows = [json.loads(line) for line in newest.read_text().splitlines()]
    return {row['step']: row[metric] for row in rows if metric in row}


def counts(cfg: object, policy: str) -> dict:
    """Parameters of the model by part, and how many of them train."""
    from mmengine.registry import MODELS, init_default_scope

    from protune_mm.config import library
    from protune_mm.report import parameter_counts

    init_default_scope(library(cfg))
    model = MODELS.build(cfg.model)
    found = parameter_counts(model)
    found['trained'] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found


class Runs(Results):
    """Rows of a results file by what was run, without half a line that a kill left at its end."""

    def from_lines(self, lines: list[dict]) -> dict:
        return {key_of(row): row for row in lines}


def read(results: Path) -> list[dict]:
    """All rows of a results file."""
    return list(Runs(results, 1).known.values())


def note(row: dict, results: Path) -> None:
    """Put a row at the end of a results file, another run of this tool may write to as well."""
    runs = Runs(results, 1)
    runs.mend()
    runs.add(row)


def table(rows: list) -> str:
    """The document: a summary, then one table a config, with the commands and what they ran on."""
    rows = titled(rows)
    order = [*dict.fromkeys([*ORDER, *(row['policy'] for row in rows)])]
    text = [TITLE, '']
    text += [
        'Real images and real ImageNet weights, same steps, seed and data for each policy. The',
        'checkpoint is picked on the validation split and scored on the test split, and so is the',
        'learning rate, and the form of the prompts, where several were run: "picked" below. Drawn',
        'by `tools/compare.py` from `results.jsonl`, which also holds every validation curve.',
        '',
        '| test (validation) | ' + ' | '.join(TITLES.get(p, p) for p in order) + ' |',
        '|---' * (len(order) + 1) + '|',
    ]
    configs = list(dict.fromkeys(row['config'] for row in rows))
    for config in configs:
        cells = [picked(rows, config, policy) for policy in order]
        shown = [f'{row["test"]:.4g} ({row["val"]:.4g})' if row else 'not run' for row in cells]
        text.append(f'| {config}, {metric_of(rows, config)} | ' + ' | '.join(shown) + ' |')
    text.append('')
    for config in configs:
        mine = [row for row in rows if row['config'] == config]
        text += [f'## {config}', '', f'Metric: {metric_of(rows, config)}.', '']
        text += [
            '| policy | options | seed | test | val (epoch / of) | val, last third | prompts '
            '| trained | picked |',
            '|---' * 9 + '|',
        ]
        for row in sorted(mine, key=lambda r: (order.index(r['policy']), r['seed'], options_of(r))):
            curve = row['val_curve']
            third = len(curve) * 2 // 3
            best = best_of(mine)
            gain = best(curve[third:]) - best(curve[:third] or curve)
            n = row['parameters']
            chosen = 'yes' if row is picked(rows, config, row['policy']) else ''
            text.append(
                f'| {TITLES.get(row["policy"], row["policy"])} | {options_of(row)} | {row["seed"]} '
                f'| **{row["test"]:.4g}** '
                f'| {row["val"]:.4g} ({row["best_epoch"]} / {row["epochs"]}) | {gain:+.3g} '
                f'| {n["prompts"]:,} | {n["trained"]:,} | {chosen} |'
            )
        text += ['', '```', *dict.fromkeys(row['command'] for row in mine), '```', '']
    text += ['"val, last third": what the last third of the epochs added to the best score before.']
    text += ['', *grounds(rows), '']
    return '\n'.join(text)


def titled(rows: list[dict]) -> list[dict]:
    """Rows whose config has a name of its own: its path, where others are called as it is."""
    paths: dict[str, set] = {}
    for row in rows:
        paths.setdefault(row['config'], set()).add(key_of(row)[0])
    return [
        dict(row, config=row['config'] if len(paths[row['config']]) == 1 else key_of(row)[0])
        for row in rows
    ]


def grounds(rows: list[dict]) -> list[str]:
    """A line for each device and stack that runs were made on; older rows are of a CPU."""
    found = Counter(
        f'{row.get("device", "CPU")} ({row["threads"]} threads a run), with '
        + ', '.join(f'{name} {version}' for name, version in row['versions'].items())
        for row in rows
    )
    if len(found) == 1:
        return [f'Run on {where}.' for where in found]
    return [f'- {count} of {len(rows)} runs on {where}.' for where, count in found.items()]


def metric_of(rows: list, config: str) -> str:
    return next(row['metric'] for row in rows if row['config'] == config)


def options_of(row: dict) -> str:
    return ', '.join(map(short, row.get('options', ())))


def short(option: str) -> str:
    """KEY=VALUE with the last part of the key alone."""
    key, value = option.split('=', 1)
    return f'{key.split(".")[-1]}={value}'


def parsed(options: list[str]) -> dict:
    """Options as the tools read them."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={})
    return parser.parse_args(['--cfg-options', *options] if options else []).cfg_options


def picked(rows: list, config: str, policy: str) -> dict | None:
    """The run of a policy with the best validation score."""
    of_config = [row for row in rows if row['config'] == config]
    mine = [row for row in of_config if row['policy'] == policy]
    return best_of(of_config)(mine, key=lambda row: row['val'], default=None)


def best_of(rows: list) -> Callable:
    """max, or min for a loss, as the hook picks checkpoints; older rows do not tell its rule."""
    return min if any(row.get('rule') == 'less' for row in rows) else max


if __name__ == '__main__':
    cli.run(main)
