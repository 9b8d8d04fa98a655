"""Tables and plots of a study, from its results alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from .plan import Study

LIMIT = 0.1
"""Part of the backbone's parameters that a parameter-efficient method may train."""


def write_report(study: Study, lines: list[dict], out: Path, name: str) -> None:
    """Write OUT/README.md (or another name for other results)."""
    text = report(study, lines)
    file = out / ('README.md' if name == 'results.jsonl' else f'{Path(name).stem}.md')
    file.write_text(text)
    print(text)
    print(f'wrote {file}')


def cells(lines: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(task, fraction, metric) to method to its runs at its best learning rate.

    The learning rate is the one with the best mean validation score over its seeds.
    """
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        place = (line['task'], line['fraction'], line['metric'])
        runs[place][line['method']][line['lr']].append(line)
    best = {}
    for place, methods in runs.items():
        best[place] = {}
        for method, by_lr in methods.items():
            seeds = max(len(found) for found in by_lr.values())
            complete = {lr: found for lr, found in by_lr.items() if len(found) == seeds}
            lr = max(complete, key=lambda lr: mean(complete[lr], 'val_score'))
            best[place][method] = dict(
                lr=lr,
                runs=complete[lr],
                score=mean(complete[lr], 'score'),
                val=mean(complete[lr], 'val_score'),
                spread=spread(complete[lr]),
                diverged=sum(line['diverged'] for found in by_lr.values() for line in found),
                count=sum(len(found) for found in by_lr.values()),
            )
    return best


def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def spread(runs: list[dict]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(run['score'] for run in runs) if len(runs) > 1 else 0.0


def report(study: Study, lines: list[dict]) -> str:
    """The document."""
    text = [
        '# Study',
        '',
        'Test scores, mean and standard deviation over seeds, at the learning rate with the best',
        'mean validation score; the same grid of rates, steps and seeds for every method.',
        '"trains": part of the backbone\'s parameters, prompts included. "keeps": MiB that a step',
        'keeps for its backward pass (on a GPU: the peak). "time": a step over that of head-only.',
        'A diverged run has score 0.',
        '',
        f'    python tools/study.py {study.path}',
        '',
    ]
    for (task, fraction, metric), methods in cells(lines).items():
        first = next(iter(methods.values()))['runs'][0]
        text += [
            f'## {task}, {fraction:.0%} of the labels',
            '',
            f'{first["backbone"]}, {metric}, {first["steps"]} steps.',
            '',
            '| method | test | validation | lr | trains | keeps | time | runs (diverged) |',
            '|---|---|---|---|---|---|---|---|',
        ]
        base = methods.get('head-only') or next(iter(methods.values()))
        unit = mean(base['runs'], 'wall_s')
        for method in sorted(methods, key=lambda m: -methods[m]['score']):
            cell = methods[method]
            run = cell['runs'][0]
            share = run['trainable_backbone'] / run['backbone_parameters']
            text.append(
                f'| {method} | {cell["score"]:.2f} ± {cell["spread"]:.2f} | {cell["val"]:.2f} '
                f'| {cell["lr"]:g} | {share:.1%} | {run["peak_memory"] / 2**20:.1f} '
                f'| {mean(cell["runs"], "wall_s") / unit:.2f} '
                f'| {cell["count"]} ({cell["diverged"]}) |'
            )
        text.append('')
    if lines:
        versions = ', '.join(f'{k} {v}' for k, v in lines[-1]['versions'].items())
        devices = ', '.join(sorted({line['device'] for line in lines}))
        text += [f'Run on {devices}, one thread a run on a CPU, with {versions}.', '']
    return '\n'.join(text)
