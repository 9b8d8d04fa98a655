"""Tables and plots of a study, from its results alone."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .plan import METHODS, Study

LIMIT = 0.1
"""Part of the backbone's parameters that a parameter-efficient method may train."""


def write_report(study: Study, lines: list[dict], out: Path, name: str) -> None:
    """Write OUT/README.md (or another name for other results)."""
    found = cells(lines)
    stem = 'README' if name == 'results.jsonl' else Path(name).stem
    pictures = {place: draw(place, methods, out, stem) for place, methods in found.items()}
    by_labels = draw_fractions(found, out, stem)
    file = out / f'{stem}.md'
    text = report(study, lines, pictures, by_labels)
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


def slug(*words: object) -> str:
    """A file name of some words."""
    return re.sub(r'[^a-z0-9.]+', '-', ' '.join(map(str, words)).lower()).strip('-')


OTHERS = (
    'tab:blue', 'tab:orange', 'tab:green', 'tab:purple', 'tab:brown', 'tab:pink', 'tab:olive',
    'tab:cyan',
)  # fmt: skip
AXES = (
    ('trainable_backbone', 'trained parameters in the backbone', 1),
    ('peak_memory', 'MiB kept for backward', 2**20),
    ('wall_s', 'seconds of training', 1),
)


def draw(place: tuple, methods: dict[str, dict], out: Path, stem: str) -> str:
    """Draw score against parameters, memory and time; return the name of the picture."""
    task, fraction, metric = place
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout='constrained')
    for axis, (key, label, unit) in zip(axes, AXES, strict=True):
        for method, cell in methods.items():
            x = max(mean(cell['runs'], key) / unit, 1e-3)
            axis.errorbar(
                x, cell['score'], cell['spread'], fmt='o', capsize=3, color=colour(method)
            )
            axis.annotate(method, (x, cell['score']), (4, 4), textcoords='offset points', size=7)
        axis.set_xlabel(label)
        if key == 'trainable_backbone':
            axis.set_xscale('symlog', linthresh=1e4)  # Head-only trains none.
        else:
            axis.set_xscale('log')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric)
    figure.suptitle(f'{task}, {fraction:.0%} of the labels')
    return save(figure, out, slug(stem, task, f'{fraction:g}', metric))


def draw_fractions(found: dict, out: Path, stem: str) -> list[str]:
    """Draw score against the fraction of labels, where a task has several."""
    names = []
    for task, metric in dict.fromkeys((task, metric) for task, _, metric in found):
        points = sorted(f for t, f, m in found if (t, m) == (task, metric))
        if len(points) < 2:
            continue
        figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
        for method in dict.fromkeys(m for f in points for m in found[task, f, metric]):
            have = [f for f in points if method in found[task, f, metric]]
            scores = [found[task, f, metric][method]['score'] for f in have]
            spreads = [found[task, f, metric][method]['spread'] for f in have]
            axis.errorbar(
                have, scores, spreads, marker='o', capsize=3, label=method, color=colour(method)
            )
        axis.set_xscale('log')
        axis.set_xlabel('fraction of the labels')
        axis.set_ylabel(metric)
        axis.set_title(task)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        names.append(save(figure, out, slug(stem, task, 'labels', metric)))
    return names


def colour(method: str) -> str:
    """Pro-tuning and its two twins stand out."""
    known = {'pro-tuning': 'tab:red', 'full': 'black', 'head-only': 'tab:gray'}
    if method in known:
        return known[method]
    names = [name for name in METHODS if name not in known]
    return OTHERS[names.index(method) % len(OTHERS)] if method in names else 'tab:blue'


def save(figure: Figure, out: Path, name: str) -> str:
    """Write a picture."""
    figure.savefig(out / f'{name}.png', dpi=80)
    plt.close(figure)
    return f'{name}.png'


def report(
    study: Study, lines: list[dict], pictures: dict[tuple, str], by_labels: list[str]
) -> str:
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
        picture = pictures[task, fraction, metric]
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
        text += ['', f'![{task}: score against parameters, memory and time]({picture})', '']
    text += [f'![score against the fraction of labels]({name})\n' for name in by_labels]
    if lines:
        versions = ', '.join(f'{k} {v}' for k, v in lines[-1]['versions'].items())
        devices = ', '.join(sorted({line['device'] for line in lines}))
        text += [f'Run on {devices}, one thread a run on a CPU, with {versions}.', '']
    return '\n'.join(text)
