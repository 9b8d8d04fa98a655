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

from jobs import hold
from mmengine.config import Config
from mmengine.runner import TestLoop
from torch.utils.data import DataLoader

from protune_mm import cli
from protune_mm.registry import type_name
from protune_mm.robustness import (
    ATTACKS,
    CORRUPTIONS,
    AttackLoop,
    Corrupt,
    check_attack,
    check_metric,
    corrupted,
    found_nothing,
    per_cent,
    robust_accuracy,
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
    how = cfg.get('test_cfg') or {}
    if 'type' in how and type_name(how) != TestLoop.__name__:
        parser.error(f"test_cfg.type={how['type']}: this tool tests by mmengine's TestLoop alone")
    check_metric(args.metric)
    about = about_test(args, cfg)
    cfg.load_from = args.checkpoint
    cfg.resume = False  # As in test.py.
    runner = cli.build_runner(cfg)
    # What cannot be done is told before the first test.
    loader = runner.build_dataloader(cfg.test_dataloader)
    scores = Scores(args.out, {**about, 'test images': len(loader.dataset)})
    baseline = read_baseline(args.baseline, scores.about) if args.baseline else None
    answers = loader.dataset.metainfo.get('subset')
    for attack in args.attacks:
        check_attack(runner.model, attack, args.budgets, answers)
    if not args.no_corruptions:
        Corrupt(args.corruptions[0], 1)
        first = corrupted(cfg.test_dataloader, args.corruptions[0], args.severities[0])
        runner.build_dataloader(first).dataset[0]  # One of another shape or type, say.
        wanted = itertools.product(args.corruptions, args.severities)
        summary(1.0, dict.fromkeys(wanted, 0.0), per_cent(args.metric), baseline)

    def test(dataloader: DataLoader | dict) -> float:
        runner._test_loop = TestLoop(
            runner,
            runner.build_dataloader(dataloader),
            runner.build_evaluator(cfg.test_evaluator),
            fp16=how.get('fp16', False),
        )
        metrics = runner.test()
        if found_nothing(args.metric, metrics, runner.test_loop.evaluator.metrics):
            return 0.0
        if args.metric not in metrics:
            parser.error(f'--metric {args.metric}: there are {", ".join(map(str, metrics))}')
        return float(metrics[args.metric])

    def attacked(attack: str) -> dict[str, float]:
        runner._test_loop = AttackLoop(runner, loader, attack, [b / 255 for b in args.budgets])
        return runner.test()

    def tested_clean() -> float:
        score = test(loader)
        # What only outputs and labels show is told before the tests that take long.
        if args.attacks:
            robust_accuracy(runner.model, [next(iter(loader))], args.attacks[0], [0], answers)
        return score

    clean = scores.once('clean', tested_clean)
    if not args.no_corruptions:
        summary(clean, {('no corruption', 0): clean}, per_cent(args.metric))
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
        means = summary(clean, found, per_cent(args.metric), baseline)
        # What is there may be over another baseline.
        scores.note(
            {f'{name}{part}': value for name, value in means.items()},
            but=f'mCE over baseline{part}',
        )
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
        ValueError: they are of another metric or of another number of images, or are none.
    """
    held = read_scores(Path(path))
    for key in ('metric', 'test images'):
        theirs = held['about'].get(key, about[key])  # Older files do not tell the images.
        if theirs != about[key]:
            raise ValueError(
                f'{path} has another {SHORT.get(key, key)}: {theirs}, here {about[key]}'
            )
    split = {tuple(name.rsplit(' ', 1)): score for name, score in held['scores'].items()}
    return {(key[0], int(key[1])): score for key, score in split.items() if key[0] in CORRUPTIONS}


def read_scores(file: Path) -> dict:
    """What a file of this tool holds.

    Raises:
        ValueError: it is none.
    """
    try:
        held = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f'{file} is no JSON ({error})') from error
    if not (isinstance(held, dict) and {'about', 'scores'} <= held.keys()):
        raise ValueError(f'{file} is no file that --out of tools/test_robustness.py has written')
    return held


SHORT = {
    'checkpoint written at': 'checkpoint',
    'config with digest': 'config',
    'test images': 'number of test images',
}
"""What a message calls some of what decides the scores."""
LOADING = ('num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'timeout')
"""Parts of a data loader that decide how images are loaded, and no score."""


def about_test(args: argparse.Namespace, cfg: Config) -> dict:
    """What decides the scores.

    Args:
        args: of the tool.
        cfg: the config with all options.
    """
    whole = cfg.to_dict()  # Functions and classes by their names, which are the same tomorrow.
    parts = (
        'model', 'data_preprocessor', 'test_dataloader', 'test_evaluator', 'test_cfg',
        'custom_hooks',
    )  # fmt: skip
    tested = {part: whole.get(part) for part in parts}
    loader = whole['test_dataloader']
    tested['test_dataloader'] = {k: v for k, v in loader.items() if k not in LOADING}
    text = json.dumps(tested, sort_keys=True, default=str)
    file = None if '://' in args.checkpoint else Path(args.checkpoint)
    return {
        'checkpoint': str(file.resolve()) if file else args.checkpoint,
        'checkpoint written at': file.stat().st_mtime if file else None,
        'metric': args.metric,
        # Of model, test set and evaluator: config, options and --policy.
        'config with digest': hashlib.sha1(text.encode()).hexdigest()[:12],
    }


class Scores:
    """Scores so far, written as soon as they are there.

    Args:
        file: where they are and go. Default: nowhere.
        about: what decides them.

    Raises:
        ValueError: the file has scores of another model, checkpoint, test set or metric, or none.
    """

    def __init__(self, file: str | None, about: dict) -> None:
        self.file = Path(file) if file else None
        self.about = about
        self.known: dict = {}
        if not self.file:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        """Take the scores of the file, if it is there."""
        if not self.file.exists():
            return
        before = read_scores(self.file)
        for key, value in self.about.items():
            if before['about'].get(key) != value:
                raise ValueError(
                    f'{self.file} has the scores of another {SHORT.get(key, key)}: {key} '
                    f'{before["about"].get(key)}, here {value}; name another file'
                )
        self.known = before['scores']

    def once(self, name: str, compute: object) -> object:
        """A score that is there, or computed now."""
        if name not in self.known:
            self.note({name: compute()})
        return self.known[name]

    def note(self, scores: dict, but: str = '') -> None:
        """Show scores and write all of them, those of other processes that test included.

        Args:
            scores: by name.
            but: name of a score that is not kept, unless it is among them.
        """
        for name, value in scores.items():
            print(f'{name}: {value}', flush=True)
        if not self.file:
            self._take(scores, but)
            return
        with self.file.with_name(f'.{self.file.name}.lock').open('a') as lock:
            hold(lock)
            self._read()
            self._take(scores, but)
            part = self.file.with_suffix('.part')
            part.write_text(json.dumps(dict(about=self.about, scores=self.known), indent=1) + '\n')
            part.replace(self.file)

    def _take(self, scores: dict, but: str) -> None:
        self.known.pop(but, None)
        self.known.update(scores)


if __name__ == '__main__':
    cli.run(main)
