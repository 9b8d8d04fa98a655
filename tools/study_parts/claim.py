"""Whether Pro-tuning is ahead: place by place, and over all places."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable

from .cells import differences, hundredths, lead, mean_and_error, share, told
from .plan import Study
from .scenarios import scenario_metrics

LIMIT = 0.1
"""Part of the backbone's parameters that a parameter-efficient method may train."""


def is_rival(name: str, cell: dict) -> bool:
    """Whether a method trains some of the backbone's parameters, and few enough."""
    return name != 'pro-tuning' and 0 < share(cell) <= LIMIT


def comparisons(found: dict[tuple, dict[str, dict]]) -> dict[str, dict[tuple, dict[int, float]]]:
    """How far Pro-tuning is ahead of each other method, by place and seed.

    Only where both have all their runs.
    """
    ahead = defaultdict(dict)
    for place, methods in found.items():
        ours = methods.get('pro-tuning')
        if ours is None or not ours['complete']:
            continue
        for name, cell in methods.items():
            if name != 'pro-tuning' and cell['complete']:
                ahead[name][place] = differences(ours, cell, hundredths(place[2]))
    return ahead


def wins(places: Iterable[dict[int, float]]) -> int:
    """In how many places Pro-tuning is ahead."""
    return sum(statistics.mean(by_seed.values()) > 0 for by_seed in places)


def together(found: dict[tuple, dict[str, dict]]) -> list[str]:
    """Pro-tuning against every other method, over all places where both have all their runs."""
    rows = []
    for name, places in comparisons(found).items():
        first = {}
        for (task, fraction, _), by_seed in places.items():
            first.setdefault((task, fraction), by_seed)  # The first metric comes first.
        mean_first, error_first = mean_and_error([*first.values()])
        mean_all, error_all = mean_and_error([*places.values()])
        largest = max(share(found[place][name]) for place in places)
        row = (
            f'| {name} | {largest:.1%} | {told(mean_first, error_first)} ({len(first)}) '
            f'| {told(mean_all, error_all)} | {wins(places.values())} of {len(places)} |'
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
        'over the seeds that all of these have: other tasks might tell otherwise.',
        '',
        '| method | trains at most | over tasks | over places | ahead in |',
        '|---|---|---|---|---|',
        *(row for _, row in sorted(rows)),
        '',
    ]


CLAIMS = (
    'classification', 'few labels', 'class imbalance', 'corruption', 'attacks', 'other domains',
    'detection', 'segmentation', 'instance segmentation',
)  # fmt: skip
"""What the paper says Pro-tuning is better at, and, of few labels, what it says against others."""
KINDS = (
    (r'(^|/)(accuracy|single-label|multi-label)/', 'classification'),
    (r'(^|/)(segm_|cityscapes/)', 'instance segmentation'),
    (r'mIoU|mDice|mFscore|mAcc|aAcc|PQ', 'segmentation'),
    (r'mAP|AP50|bbox_', 'detection'),
)
"""What a metric's name tells of the task, by the first pattern that it has."""


def scenario_of(study: Study, place: tuple) -> str | None:
    """Which of the claims a place belongs to.

    None where its score is not the first of its task, or of a metric that is in none of the claims.
    """
    task, fraction, metric = place
    plan = study.tasks[task]
    if kind := scenario_metrics(plan).get(metric):
        return kind
    if metric != plan['metrics'][0]:
        return None
    if 'long_tail' in plan:
        return 'class imbalance'
    if fraction < 1:
        return 'few labels'
    return next((kind for words, kind in KINDS if re.search(words, metric)), None)


def by_scenario(study: Study, found: dict[tuple, dict[str, dict]]) -> list[str]:
    """Pro-tuning against full fine-tuning, head-only and the best rival, a line a scenario.

    A scenario is that of all its places where Pro-tuning has all its runs; another method is
    compared where it has all of its own at each of these.
    """
    scenarios = {kind: [] for kind in CLAIMS}
    for place, methods in found.items():
        kind = scenario_of(study, place)
        if kind and 'pro-tuning' in methods and methods['pro-tuning']['complete']:
            scenarios[kind].append(place)
    ahead, rows = comparisons(found), []
    for kind, places in scenarios.items():
        if not places:
            continue
        whole = {
            name: [by_place[place] for place in places]
            for name, by_place in ahead.items()
            if by_place.keys() >= set(places)
        }
        small = [
            name for name in whole if all(is_rival(name, found[place][name]) for place in places)
        ]
        rival = min(small, key=lambda name: mean_and_error(whole[name])[0], default=None)
        row = [kind, str(len(places))]
        for name in ('full', 'head-only', rival):
            if name not in whole:
                row.append('')
                continue
            row.append(f'{told(*mean_and_error(whole[name]))} ({wins(whole[name])})')
        known = {name for p in places for name, cell in found[p].items() if is_rival(name, cell)}
        which = rival or 'none'
        if lacking := len(known - set(whole)):
            which += f' ({lacking} {"lack" if lacking > 1 else "lacks"} runs)'
        rows.append(f'| {" | ".join(row)} | {which} |')
    if not rows:
        return []
    return [
        '## By scenario',
        '',
        'Points that Pro-tuning is ahead, mean over the places of a scenario, and in how many of',
        'them. Clean scores are those of the first metric of a task, and belong to "few labels" or',
        '"class imbalance" where images were left out, else to what the task is. ± is the standard',
        'error over the seeds that all places of a scenario have. The rival is the best of those',
        f"that train at most {LIMIT:.0%} of the backbone's parameters, by the same mean. A column",
        'is empty where its method lacks runs at one of the places; how many rivals do is told',
        'behind the best.',
        '',
        '| scenario | places | over full | over head-only | over the best rival | which |',
        '|---|---|---|---|---|---|',
        *rows,
        '',
    ]


def verdict(found: dict[tuple, dict[str, dict]], planned: Iterable[str] = ()) -> list[str]:
    """Pro-tuning against full fine-tuning, head-only and the best rival, a line a place.

    The rivals that lack runs at a place, and how many of the ``planned`` methods have none there,
    are told: the best one may be among them.
    """
    rows, gains, first = [], [], {}
    for (task, fraction, metric), methods in found.items():
        ours, full, head = whole = [methods.get(m) for m in ('pro-tuning', 'full', 'head-only')]
        if ours is None or not all(cell['complete'] for cell in whole if cell is not None):
            continue
        unit = hundredths(metric)
        small = {name: cell for name, cell in methods.items() if is_rival(name, cell)}
        partly = [name for name, cell in small.items() if not cell['complete']]
        rivals = [name for name in small if name not in partly]
        rival = max(rivals, key=lambda name: small[name]['score'], default=None)
        row = [f'{task}, {fraction:.0%}, {metric}', f'{unit * ours["score"]:.2f}']
        for other, margin in ((full, 0.0), (head, 1.0), (small.get(rival), 0.0)):
            if other is None:
                row.append('')
                continue
            ahead = unit * (ours['score'] - other['score'])
            needed = margin * unit * max(ours['spread'], other['spread'])
            answer = 'yes' if ahead >= needed and ahead > -1e-9 else '**no**'
            row.append(f'{lead(ours, other, unit)} {answer}')
        if full is not None:
            gains.append(unit * (ours['score'] - full['score']))
            val = unit * (ours['val'] - full['val'])
            first.setdefault((task, fraction), (gains[-1], val))
        within = 'yes' if share(ours) <= LIMIT else '**no**'
        unknown = [f'{name} lacks runs' for name in partly]
        if lacking := len(set(planned) - set(methods)):
            unknown.append(f'{lacking} not run')
        which = rival or 'none'
        which += f' ({", ".join(unknown)})' if unknown else ''
        rows.append(f'| {" | ".join(row)} | {which} | {share(ours):.1%} {within} |')
    if not rows:
        return []
    text = [
        '## Is the claim true here?',
        '',
        'Points of Pro-tuning (out of 100) ahead of full fine-tuning; ahead of head-only, "yes" if',
        'by more than the larger spread; ahead of the best rival that trains at most '
        f'{LIMIT:.0%} of',
        f"the backbone's parameters; and whether it keeps to {LIMIT:.0%} itself. ± is the standard",
        'error of the mean difference, seed by seed. Only places where Pro-tuning, full',
        'fine-tuning and head-only have all their runs or none; which rivals lack some, and how',
        'many methods have none, is told behind the best rival.',
        '',
        '| place | Pro-tuning | over full | over head-only | over the best rival | which '
        '| trains |',
        '|---|---|---|---|---|---|---|',
        *rows,
        '',
    ]
    if gains:
        by_test, by_val = zip(*first.values(), strict=True)
        text += [
            'Ahead of full fine-tuning, mean over the tasks and fractions by the first metric of '
            f'each: {statistics.mean(by_test):+.2f}; over all these places: '
            f'{statistics.mean(gains):+.2f}.',
            '',
            'By validation, where the rates are chosen: '
            f'{statistics.mean(by_val):+.2f}; behind in {behind(zip(by_val, first, strict=True))}.',
            '',
        ]
    return text


def behind(gains: Iterable[tuple[float, tuple[str, float]]]) -> str:
    """Tasks and fractions with a minus, the worst first."""
    minus = sorted((gain, place) for gain, place in gains if gain < 0)
    named = (f'{task} with {part:.0%} of the labels ({gain:+.2f})' for gain, (task, part) in minus)
    return ', '.join(named) or 'none'
