"""Tables and plots of a study, from its results alone."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .plan import METHODS, Study

LIMIT = 0.1
"""Part of the backbone's parameters that a parameter-efficient method may train."""


def write_report(study: Study, lines: list[dict], out: Path, name: str) -> None:
    """Write OUT/README.md (or another name for other results, whose table has no test scores)."""
    final = name == 'results.jsonl'
    found = cells(study, lines)
    stem = 'README' if final else Path(name).stem
    pictures = {place: draw(place, methods, out, stem, final) for place, methods in found.items()}
    by_labels = draw_fractions(found, out, stem) if final else []
    file = out / f'{stem}.md'
    text = report(study, found, lines, pictures, by_labels, out, final)
    file.write_text(text)
    print(text)
    print(f'wrote {file}')


def cells(study: Study, lines: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(task, fraction, metric) to method to its runs at its best learning rate.

    The learning rate is the one with the best mean validation score of the task's first metric
    over all seeds; until one has all seeds, over the most that any has.
    """
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        place = (line['task'], line['fraction'], line['metric'])
        runs[place][line['method']][line['lr']].append(line)
    best, chosen = {}, {}
    for place, methods in runs.items():
        task, fraction, _ = place
        best[place] = {}
        for method, by_lr in methods.items():
            seeds = max(len(found) for found in by_lr.values())
            full = {lr: found for lr, found in by_lr.items() if len(found) == seeds}
            # The first metric of a task chooses for all: the scores are of one model.
            lr = chosen.setdefault(
                (task, fraction, method), max(full, key=lambda lr: mean(full[lr], 'val_score'))
            )
            grid = sorted(study.tasks[task].get('lrs', study.lrs))
            planned = len(grid) * len(study.seeds)
            count = sum(len(found) for found in by_lr.values())
            best[place][method] = dict(
                lr=lr,
                runs=full.get(lr) or by_lr[lr],
                score=mean(by_lr[lr], 'score'),
                val=mean(by_lr[lr], 'val_score'),
                spread=spread(by_lr[lr], 'score'),
                val_spread=spread(by_lr[lr], 'val_score'),
                diverged=sum(line['diverged'] for found in by_lr.values() for line in found),
                count=count,
                complete=count == planned,
                edge=len(grid) > 1 and lr in (grid[0], grid[-1]),
            )
    return best


def mean(runs: list[dict], key: str) -> float:
    """Over the runs that have it: one that diverged has no memory."""
    found = [run[key] for run in runs if run.get(key) is not None]
    return statistics.mean(found) if found else math.nan


def step_time(runs: list[dict]) -> float:
    """Seconds of a step, the median over runs."""
    found = [run['step_s'] for run in runs if run.get('step_s') is not None]
    return statistics.median(found) if found else math.nan


def spread(runs: list[dict], key: str) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0


def differences(one: dict, other: dict, unit: float = 1.0) -> dict[int, float]:
    """How far one method is ahead of another, by seed, where both have it."""
    first, second = ({run['seed']: run['score'] for run in cell['runs']} for cell in (one, other))
    return {seed: unit * (first[seed] - second[seed]) for seed in first if seed in second}


def mean_and_error(places: list[dict[int, float]]) -> tuple[float, float]:
    """Mean over places and seeds, and its standard error over the seeds that all places have."""
    seeds = set.intersection(*map(set, places))
    means = [statistics.mean(by_seed[seed] for by_seed in places) for seed in seeds]
    if len(means) < 2:
        return statistics.mean(means) if means else math.nan, math.nan
    return statistics.mean(means), statistics.stdev(means) / math.sqrt(len(means))


def relative(time: float, unit: float) -> str:
    """A time over another; results of older versions have none."""
    return '' if math.isnan(time / unit) else f'{time / unit:.2f}'


def share(cell: dict) -> float:
    """Part of the backbone's parameters that a method trains."""
    run = cell['runs'][0]
    return run['trainable_backbone'] / run['backbone_parameters']


def hundredths(metric: str) -> float:
    """What makes of a score one that goes to 100: average precision goes to 1."""
    return 100.0 if 'mAP' in metric else 1.0


def slug(*words: object) -> str:
    """A file name of some words."""
    return re.sub(r'[^a-z0-9.]+', '-', ' '.join(map(str, words)).lower()).strip('-')


OTHERS = (
    'tab:blue', 'tab:orange', 'tab:green', 'tab:purple', 'tab:brown', 'tab:pink', 'tab:olive',
    'tab:cyan',
)  # fmt: skip
AXES = (
    ('trained parameters in the backbone', lambda runs: mean(runs, 'trainable_backbone')),
    ('MiB kept for backward', lambda runs: mean(runs, 'peak_memory') / 2**20),
    ('milliseconds of a step', lambda runs: 1000 * step_time(runs)),
)


def draw(place: tuple, methods: dict[str, dict], out: Path, stem: str, final: bool) -> str:
    """Draw score against parameters, memory and time; return the name of the picture."""
    task, fraction, metric = place
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout='constrained')
    score, error = ('score', 'spread') if final else ('val', 'val_spread')
    unit = hundredths(metric)
    for axis, (label, value) in zip(axes, AXES, strict=True):
        for method, cell in methods.items():
            x = max(value(cell['runs']), 1e-3)
            y, spreads = unit * cell[score], unit * cell[error]
            axis.errorbar(x, y, spreads, fmt='o', capsize=3, color=colour(method))
            axis.annotate(method, (x, y), (4, 4), textcoords='offset points', size=7)
        axis.set_xlabel(label)
        if axis is axes[0]:
            axis.set_xscale('symlog', linthresh=1e4)  # Head-only trains none.
        else:
            axis.set_xscale('log')
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric if final else f'{metric}, validation')
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
            unit = hundredths(metric)
            scores = [unit * found[task, f, metric][method]['score'] for f in have]
            spreads = [unit * found[task, f, metric][method]['spread'] for f in have]
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
    study: Study,
    found: dict[tuple, dict[str, dict]],
    lines: list[dict],
    pictures: dict[tuple, str],
    by_labels: list[str],
    out: Path,
    final: bool,
) -> str:
    """The document."""
    shown = 'Test scores' if final else 'Validation scores'
    told = (out / 'findings.md').exists()
    meaning = ' [findings.md](findings.md) says what the numbers mean.' if told else ''
    more = '' if final else f' --results {study.results_name}'
    more += '' if out == Path('docs/study') else f' --out {out}'
    text = [
        '# Study' if final else '# Ablations',
        '',
        f'{shown}, mean and standard deviation over seeds, at the learning rate with the best',
        'mean validation score of the first metric; the same grid of rates, steps and seeds for',
        'every method; * where that rate is at an end of the grid. "trains": part of the',
        'backbone\'s parameters, prompts included. "keeps": MiB that a step keeps for its backward',
        'pass (on a GPU: the peak). "time": processor time (on a GPU: time) of a step over that of',
        'head-only, the first line where there is none. A diverged run has score 0. Average',
        'precision is in points of 100. Corruption errors are plain means, not divided by another',
        "network's.",
        '',
        *([study.note, ''] if study.note else []),
        f'`{study.path}` has the options of every method, and its rate in the backbone over',
        f'that of the head.{meaning}',
        '',
        f'    python tools/study.py {study.path}{more}',
        '',
    ]
    if final:
        text += verdict(found, study.methods)
        text += together(found)
    for (task, fraction, metric), methods in found.items():
        first = next(iter(methods.values()))['runs'][0]
        plan = study.tasks[task]
        every = plan.get('scenarios', {}).get('every', 1)
        part = f', on 1 of {every} test images' if metric not in plan['metrics'] else ''
        part = part if every > 1 else ''
        of_test, of_val = hundredths(metric), hundredths(plan['metrics'][0])
        text += [
            f'## {task}, {fraction:.0%} of the labels, {metric}',
            '',
            f'{first["backbone"]}, {first["steps"]} steps{part}.',
            '',
            f'| method |{" test |" if final else ""} validation | lr | trains | keeps | time '
            '| runs (diverged) |',
            f'|---|{"---|" if final else ""}---|---|---|---|---|---|',
        ]
        base = methods.get('head-only') or next(iter(methods.values()))
        unit = step_time(base['runs'])
        key = 'score' if final else 'val'
        for method in sorted(methods, key=lambda m: -methods[m][key]):
            cell = methods[method]
            score, spreads = of_test * cell['score'], of_test * cell['spread']
            test = f' {score:.2f} ± {spreads:.2f} |' if final else ''
            val = f' {of_val * cell["val"]:.2f}'
            val += '' if final else f' ± {of_val * cell["val_spread"]:.2f}'
            text.append(
                f'| {method} |{test}{val} '
                f'| {cell["lr"]:g}{"*" * cell["edge"]} | {share(cell):.1%} '
                f'| {mean(cell["runs"], "peak_memory") / 2**20:.1f} '
                f'| {relative(step_time(cell["runs"]), unit)} '
                f'| {cell["count"]} ({cell["diverged"]}){"" if cell["complete"] else ", not all"} |'
            )
        picture = pictures[task, fraction, metric]
        text += ['', f'![{task}: score against parameters, memory and time]({picture})', '']
    text += [f'![score against the fraction of labels]({name})\n' for name in by_labels]
    if lines:
        versions = ', '.join(f'{k} {v}' for k, v in lines[-1]['versions'].items())
        devices = ', '.join(sorted({line['device'] for line in lines}))
        text += [f'Run on {devices}, one thread a run on a CPU, with {versions}.', '']
    return '\n'.join(text)


def together(found: dict[tuple, dict[str, dict]]) -> list[str]:
    """Pro-tuning against every other method, over all places where both have all their runs."""
    ahead = defaultdict(list)
    for place, methods in found.items():
        ours = methods.get('pro-tuning')
        if ours is None or not ours['complete']:
            continue
        for name, cell in methods.items():
            if name != 'pro-tuning' and cell['complete']:
                ahead[name].append((place, differences(ours, cell, hundredths(place[2]))))
    rows = []
    for name, places in ahead.items():
        first = {}
        for (task, fraction, _), by_seed in places:
            first.setdefault((task, fraction), by_seed)  # The first metric comes first.
        mean_first, error_first = mean_and_error([*first.values()])
        mean_all, error_all = mean_and_error([by_seed for _, by_seed in places])
        largest = max(share(found[place][name]) for place, _ in places)
        wins = sum(statistics.mean(by_seed.values()) > 0 for _, by_seed in places)
        row = (
            f'| {name} | {largest:.1%} | {mean_first:+.2f} ± {error_first:.2f} ({len(first)}) '
            f'| {mean_all:+.2f} ± {error_all:.2f} | {wins} of {len(places)} |'
        )
        rows.append((mean_first, row))
    if not rows:
        return []
    return [
        '## Over all places',
        '',
        'Points that Pro-tuning is ahead of each other method: mean over tasks and fractions by',
        'the first metric of each (their number), mean over all places, and in how many of them',
        'it is ahead; only where both have all their runs. ± is the standard error of the mean,',
        'over seeds alone: other tasks might tell otherwise.',
        '',
        '| method | trains at most | over tasks | over places | ahead in |',
        '|---|---|---|---|---|',
        *(row for _, row in sorted(rows)),
        '',
    ]


def verdict(found: dict[tuple, dict[str, dict]], planned: Iterable[str] = ()) -> list[str]:
    """Pro-tuning against full fine-tuning, head-only and the best rival, a line a place.

    The number of ``planned`` methods without a run at a place is told: the best rival may be one.
    """
    rows, gains, first = [], [], {}
    for (task, fraction, metric), methods in found.items():
        ours, full, head = (methods.get(m) for m in ('pro-tuning', 'full', 'head-only'))
        if ours is None or not all(cell['complete'] for cell in methods.values()):
            continue
        unit = hundredths(metric)
        small = {
            name: cell
            for name, cell in methods.items()
            if name not in ('pro-tuning', 'head-only') and 0 < share(cell) <= LIMIT
        }
        rival = max(small, key=lambda name: small[name]['score'], default=None)
        cells = [f'{task}, {fraction:.0%}, {metric}', f'{unit * ours["score"]:.2f}']
        for other, margin in ((full, 0.0), (head, 1.0), (small.get(rival), 0.0)):
            if other is None:
                cells.append('')
                continue
            ahead = unit * (ours['score'] - other['score'])
            needed = margin * unit * max(ours['spread'], other['spread'])
            told = 'yes' if ahead >= needed and ahead > -1e-9 else '**no**'
            _, error = mean_and_error([differences(ours, other, unit)])
            cells.append(f'{ahead:+.2f} ± {error:.2f} {told}')
        if full is not None:
            gains.append(unit * (ours['score'] - full['score']))
            first.setdefault((task, fraction), gains[-1])
        within = 'yes' if share(ours) <= LIMIT else '**no**'
        lacking = len(set(planned) - set(methods))
        which = f'{rival or ""}{f" ({lacking} methods not run)" if lacking else ""}'
        rows.append(f'| {" | ".join(cells)} | {which} | {share(ours):.1%} {within} |')
    if not rows:
        return []
    text = [
        '## Is the claim true here?',
        '',
        'Points of Pro-tuning (out of 100) ahead of full fine-tuning; ahead of head-only, "yes" if',
        'by more than the larger spread; ahead of the best rival that trains at most '
        f'{LIMIT:.0%} of',
        f"the backbone's parameters; and whether it keeps to {LIMIT:.0%} itself. ± is the standard",
        'error of the mean difference, seed by seed. Only places where all methods that have runs',
        'have all of them; how many methods have none is told behind the best rival.',
        '',
        '| place | Pro-tuning | over full | over head-only | over the best rival | which '
        '| trains |',
        '|---|---|---|---|---|---|---|',
        *rows,
        '',
    ]
    if gains:
        text += [
            'Ahead of full fine-tuning, mean over the tasks and fractions by the first metric of '
            f'each: {statistics.mean(first.values()):+.2f}; over all these places: '
            f'{statistics.mean(gains):+.2f}.',
            '',
        ]
    return text
