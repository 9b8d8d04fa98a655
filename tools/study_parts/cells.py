"""Runs of a study by place and method, at the best learning rate of each, and statistics."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable

from protune_mm.robustness import per_cent

from .plan import Study


def cells(study: Study, lines: list[dict]) -> dict[tuple, dict[str, dict]]:
    """(task, fraction, metric) to method to its runs at its best learning rate, and its time.

    The learning rate is the one with the best mean validation score of the task's first metric
    over all seeds; until one has all seeds, over the most that any has. Of rates with the same the
    lowest counts.
    """
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        place = (line['task'], line['fraction'], line['metric'])
        runs[place][line['method']][rate_of(line)].append(line)
    best, chosen = {}, {}
    for place, methods in runs.items():
        task, fraction, _ = place
        best[place] = {}
        for method, by_lr in methods.items():
            seeds = max(len(found) for found in by_lr.values())
            whole = [lr for lr, found in by_lr.items() if len(found) == seeds]
            # The first metric of a task chooses for all: the scores are of one model.
            equal = chosen.setdefault((task, fraction, method), best_rates(by_lr, whole))
            rate = equal[0]
            grid = sorted(study.rates_of(task, method))
            planned = len(grid) * len(study.seeds_of(task))
            count = sum(len(found) for found in by_lr.values())
            best[place][method] = dict(
                lr=rate[0],
                lr_part=rate[1],
                runs=by_lr[rate],
                times=step_times(itertools.chain.from_iterable(by_lr.values())),
                score=mean(by_lr[rate], 'score'),
                val=mean(by_lr[rate], 'val_score'),
                spread=spread(by_lr[rate], 'score'),
                val_spread=spread(by_lr[rate], 'val_score'),
                diverged=sum(line['diverged'] for found in by_lr.values() for line in found),
                count=count,
                complete=count == planned,
                edge=is_end(rate, grid),
                tie=len(equal) > 1,
            )
        base = best[place][base_of(best[place])]
        timed = [set(cell['times']) for cell in best[place].values() if cell['times']]
        shared = set.intersection(*timed) if timed else set()
        for cell in best[place].values():
            cell['time'] = relative_time(cell, base, shared)
    return best


def rate_of(line: dict) -> tuple[float, float]:
    """The point of the grid that a run had. In older results all had the whole of the multiples."""
    return line['lr'], line.get('lr_part', 1.0)


def is_end(rate: tuple[float, float], grid: list[tuple[float, float]]) -> bool:
    """Whether better may lie outside of a grid: a rate, or a part where the grid has one rate.

    Parts in a grid of several rates are not looked at.
    """
    i = 0 if len({lr for lr, _ in grid}) > 1 else 1
    found = {point[i] for point in grid}
    return len(found) > 1 and rate[i] in (min(found), max(found))


def best_rates(by_lr: dict[tuple, list[dict]], whole: list[tuple]) -> list[tuple]:
    """Those of some rates that have the best validation score, the lowest first.

    Scores that differ by rounding alone are the same.
    """
    scores = {lr: mean(by_lr[lr], 'val_score') for lr in sorted(whole)}
    best = max(scores.values())
    return [lr for lr, score in scores.items() if math.isclose(score, best, rel_tol=1e-6)]


def mean(runs: list[dict], key: str) -> float:
    """Over the runs that have it: one that diverged has no memory."""
    found = [run[key] for run in runs if run.get(key) is not None]
    return statistics.mean(found) if found else math.nan


def step_times(runs: Iterable[dict]) -> dict[tuple, float]:
    """Seconds of a step by rate, seed and processor, of the runs that have them.

    Over the parts of a multiple their mean: head-only has none, and a step takes as long with any.
    """
    found = defaultdict(list)
    for run in runs:
        if run.get('step_s') is not None:
            key = (run['lr'], run['seed'], run.get('device'), run.get('processor'))
            found[key].append(run['step_s'])
    return {key: statistics.mean(times) for key, times in found.items()}


def relative_time(cell: dict, base: dict, shared: set) -> float:
    """Time of a step over that of a base, the median over rates and seeds; no number without any.

    At equal rates and seeds on one processor, as a study may have gone on on another machine: at
    those that all methods ``shared``, where there are any, else at those that these two have.
    Two machines of one kind of processor are not told apart. Older results have no time, or tell
    the name of their processor and not its kind.
    """
    runs = (shared or set(base['times'])) & set(cell['times'])
    ratios = [cell['times'][run] / base['times'][run] for run in runs]
    return statistics.median(ratios) if ratios else math.nan


def base_of(methods: dict[str, dict]) -> str:
    """The method whose time is one: head-only, else full, else the best by validation.

    One that has times, where any has.
    """
    timed = [name for name, cell in methods.items() if cell['times']] or list(methods)
    ends = [name for name in ('head-only', 'full') if name in timed]
    return ends[0] if ends else max(timed, key=lambda name: methods[name]['val'])


def spread(runs: list[dict], key: str) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(run[key] for run in runs) if len(runs) > 1 else 0.0


def differences(one: dict, other: dict, unit: float = 1.0, key: str = 'score') -> dict[int, float]:
    """How far one method is ahead of another, by seed, where both have it."""
    first, second = ({run['seed']: run[key] for run in cell['runs']} for cell in (one, other))
    return {seed: unit * (first[seed] - second[seed]) for seed in first if seed in second}


def mean_and_error(places: list[dict[int, float]]) -> tuple[float, float]:
    """Mean over places, and its standard error over the seeds that all places have.

    A place with more seeds than others counts once, with all of its seeds.
    """
    average = statistics.mean(statistics.mean(by_seed.values()) for by_seed in places)
    seeds = set.intersection(*map(set, places))
    if len(seeds) < 2:
        return average, math.nan
    means = [statistics.mean(by_seed[seed] for by_seed in places) for seed in seeds]
    return average, statistics.stdev(means) / math.sqrt(len(means))


def lead(one: dict, other: dict, unit: float = 1.0, key: str = 'score') -> str:
    """How far one method is ahead of another and the standard error of that; '' of itself.

    Over the seeds that both have, and '' where that is none. One seed has no error.
    """
    by_seed = differences(one, other, unit, key)
    return told(*mean_and_error([by_seed])) if by_seed and one is not other else ''


def told(ahead: float, error: float) -> str:
    """A difference and its standard error, which one seed does not have."""
    return f'{ahead:+.2f}' + ('' if math.isnan(error) else f' ± {error:.2f}')


def share(cell: dict) -> float:
    """Part of the backbone's parameters that a method trains."""
    run = cell['runs'][0]
    return run['trainable_backbone'] / run['backbone_parameters']


def hundredths(metric: str) -> float:
    """What makes of a score one that goes to 100: average precision goes to 1."""
    return 1.0 if per_cent(metric) else 100.0
