"""Test a model under the fifteen common corruptions, and a classifier under attack.

    python tools/test_robustness.py CONFIG CHECKPOINT --metric accuracy/top1 --out robust.json
    python tools/test_robustness.py CONFIG CHECKPOINT --metric coco/bbox_mAP --corruptions fog snow
    python tools/test_robustness.py CONFIG CHECKPOINT --metric accuracy/top1 --no-corruptions \
        --attacks fgsm pgd --budgets 0 0.5 1 2

For classifiers, detectors and segmentors of the three libraries; attacks are for classifiers. Each
score is written at once, and a run that was stopped goes on. requirements/robustness.txt has the
two libraries that corrupt and attack.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import TestLoop
from torch.utils.data import DataLoader

from protune_mm import cli
from protune_mm.robustness import (
    ATTACKS,
    CORRUPTIONS,
    AttackLoop,
    Corrupt,
    check_attack,
    corrupted,
    found_nothing,
    per_cent,
    summary,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    cli.add_common_arguments(parser, checkpoint=True)
    parser.add_argument(
        '--metric', required=True, help='such as accuracy/top1, coco/bbox_mAP, mIoU'
    )
    parser.add_argument(
        '--corruptions', nargs='+', choices=CORRUPTIONS, default=CORRUPTIONS, metavar='NAME'
    )
    parser.add_argument('--no-corruptions', action='store_true')
    parser.add_argument(
        '--severities', nargs='+', type=int, choices=range(1, 6), default=[1, 2, 3, 4, 5]
    )
    parser.add_argument('--baseline', help='--out of another network, to divide the mCE by')
    parser.add_argument('--attacks', nargs='+', choices=ATTACKS, default=[])
    parser.add_argument(
        '--budgets', nargs='+', type=float, default=[0, 0.5, 1, 2, 4], help='in 255ths of a pixel'
    )
    parser.add_argument('--out', help='JSON file of the scores')
    cfg, args = cli.parse(parser)
    if args.launcher != 'none':
        parser.error('scores are written by one process: test without --launcher')
    if args.baseline and args.no_corruptions:
        parser.error('--baseline divides errors under corruption: leave --no-corruptions out')
    scores = Scores(args, cfg)
    cfg.load_from = args.checkpoint
    runner = cli.build_runner(cfg)
    # What cannot be done is told before the first test.
    loader = runner.build_dataloader(cfg.test_dataloader)
    scores.about['test images'] = len(loader.dataset)
    baseline = read_baseline(args.baseline, scores.about) if args.baseline else None
    for attack in args.attacks:
        check_attack(runner.model, attack, args.budgets, loader.dataset.metainfo.get('subset'))
    if not args.no_corruptions:
        corrupted(cfg.test_dataloader, args.corruptions[0], 0)
        Corrupt(args.corruptions[0], 1)
        wanted = itertools.product(args.corruptions, args.severities)
        summary(1.0, dict.fromkeys(wanted, 0.0), per_cent(args.metric), baseline)

    def test(dataloader: DataLoader | dict) -> float:
        runner._test_loop = TestLoop(
            runner, runner.build_dataloader(dataloader), runner.build_evaluator(cfg.test_evaluator)
        )
        metrics = runner.test()
        if found_nothing(args.metric, metrics):
            return 0.0
        if args.metric not in metrics:
            parser.error(f'--metric {args.metric}: there are {", ".join(map(str, metrics))}')
        return float(metrics[args.metric])

    def attacked(attack: str) -> dict[str, float]:
        runner._test_loop = AttackLoop(runner, loader, attack, [b / 255 for b in args.budgets])
        return runner.test()

    clean = scores.once('clean', lambda: test(loader))
    found = {}
    for name in () if args.no_corruptions else args.corruptions:
        for severity in args.severities:
            found[name, severity] = scores.once(
                f'{name} {severity}',
                lambda name=name, severity=severity: test(
                    corrupted(cfg.test_dataloader, name, severity)
                ),
            )
    if found:
        part = part_of(args.corruptions, args.severities)
        scores.known.pop(f'mCE over baseline{part}', None)  # It may be over another one.
        means = summary(clean, found, per_cent(args.metric), baseline)
        scores.note({f'{name}{part}': value for name, value in means.items()})
    for attack in args.attacks:
        # What a smaller budget breaks counts as broken by a larger one, so all belong together.
        kind = 'standard autoattack' if attack == 'autoattack' else attack
        name = f'{kind}, budgets {" ".join(f"{budget:g}" for budget in args.budgets)}'
        scores.note(scores.once(name, lambda attack=attack: attacked(attack)))


def part_of(corruptions: Sequence[str], severities: Sequence[int]) -> str:
    """What means over some corruptions or severities have in their names; '' for all of them."""
    if {*corruptions} == {*CORRUPTIONS} and len({*severities}) == 5:
        return ''
    names = [name for name in CORRUPTIONS if name in corruptions]
    return f' ({", ".join(names)}; severities {", ".join(map(str, sorted({*severities})))})'


def read_baseline(path: str, about: dict) -> dict[tuple[str, int], float]:
    """Scores under corruption of another network.

    Raises:
        ValueError: they are of another metric, or of another number of images.
    """
    held = json.loads(Path(path).read_text())
    for key in ('metric', 'test images'):
        theirs = held['about'].get(key, about[key])  # Older files do not tell the images.
        if theirs != about[key]:
            raise ValueError(f'{path} has another {key}: {theirs}, here {about[key]}')
    split = {tuple(name.rsplit(' ', 1)): score for name, score in held['scores'].items()}
    return {(key[0], int(key[1])): score for key, score in split.items() if key[0] in CORRUPTIONS}


class Scores:
    """Scores so far, written as soon as they are there.

    Args:
        args: of the tool.
        cfg: the config with all options, for what decides the scores.

    Raises:
        ValueError: the file has scores of another model, checkpoint, test set or metric.
    """

    def __init__(self, args: argparse.Namespace, cfg: Config) -> None:
        self.file = Path(args.out) if args.out else None
        parts = ('model', 'data_preprocessor', 'test_dataloader', 'test_evaluator', 'custom_hooks')
        tested = json.dumps({part: cfg.get(part) for part in parts}, sort_keys=True, default=str)
        self.about = {
            'checkpoint': str(Path(args.checkpoint).resolve()),
            'checkpoint written at': Path(args.checkpoint).stat().st_mtime,
            'metric': args.metric,
            # Of model, test set and evaluator: config, options and --policy.
            'config with digest': hashlib.sha1(tested.encode()).hexdigest()[:12],
        }
        self.known: dict = {}
        if self.file and self.file.exists():
            before = json.loads(self.file.read_text())
            for key, value in self.about.items():
                if before['about'].get(key) != value:
                    raise ValueError(
                        f'{self.file} has the scores of another {key.split(" w")[0]}: {key} '
                        f'{before["about"].get(key)}, here {value}; name another file'
                    )
            self.known = before['scores']

    def once(self, name: str, compute: object) -> object:
        """A score that is there, or computed now."""
        if name not in self.known:
            self.note({name: compute()})
        return self.known[name]

    def note(self, scores: dict) -> None:
        """Show scores and write all of them."""
        self.known.update(scores)
        for name, value in scores.items():
            print(f'{name}: {value}', flush=True)
        if self.file:
            part = self.file.with_suffix('.part')
            part.write_text(json.dumps(dict(about=self.about, scores=self.known), indent=1) + '\n')
            part.replace(self.file)


if __name__ == '__main__':
    cli.run(main)
