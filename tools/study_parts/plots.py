"""Plots of a study."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from .cells import base_of, hundredths, mean
from .plan import METHODS


def slug(*words: object) -> str:
    """A file name of some words."""
    return re.sub(r'[^a-z0-9.]+', '-', ' '.join(map(str, words)).lower()).strip('-')


OTHERS = (
    'tab:blue', 'tab:orange', 'tab:green', 'tab:purple', 'tab:brown', 'tab:pink', 'tab:olive',
    'tab:cyan',
)  # fmt: skip

MARKERS = 'sD^vP*X<>'


def set_memory_scale(axis: Axes) -> None:
    """A logarithmic scale in plain numbers, of which few stand, so that none meet."""
    axis.set_xscale('log')
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(StrMethodFormatter('{x:g}'))
    axis.xaxis.set_minor_formatter(NullFormatter())


def set_time_scale(axis: Axes) -> None:
    """From zero; points that lie close to each other keep a margin to their right."""
    right = axis.get_xlim()[1]
    axis.set_xlim(0, max(right, 1.03 * axis.dataLim.xmax) if axis.has_data() else right)


AXES = (
    (
        'trained parameters in the backbone',
        lambda cell: mean(cell['runs'], 'trainable_backbone'),
        lambda axis: axis.set_xscale('symlog', linthresh=1e4),  # Head-only trains none.
    ),
    (
        'MiB kept for backward',
        lambda cell: mean(cell['runs'], 'peak_memory') / 2**20,
        set_memory_scale,
    ),
    (
        'time of a step over that of {base}',
        lambda cell: cell['time'],
        set_time_scale,
    ),
)
"""Label of an axis, what it shows of a method, and what sets its scale."""


def draw(place: tuple, methods: dict[str, dict], out: Path, stem: str, final: bool) -> str:
    """Draw score against parameters, memory and time; return the name of the picture."""
    task, fraction, metric = place
    figure, axes = plt.subplots(1, 3, figsize=(13, 4), sharey=True, layout='constrained')
    score, error = ('score', 'spread') if final else ('val', 'val_spread')
    unit = hundredths(metric)
    on_gpu = next(iter(methods.values()))['runs'][0]['device'] != 'CPU'
    looks = looks_of(methods)
    base = base_of(methods)
    for axis, (label, value, set_scale) in zip(axes, AXES, strict=True):
        missing = []
        for method, cell in methods.items():
            x = value(cell)
            if math.isnan(x):
                missing.append(method)
                continue
            x = max(x, 1e-3)
            y, spreads = unit * cell[score], unit * cell[error]
            axis.errorbar(x, y, spreads, capsize=3, label=method, linestyle='', **looks[method])
        label = label.format(base=base)
        # As many names as there is room for below an axis.
        label += f' (none of {", ".join(missing)})' if 0 < len(missing) < 4 else ''
        axis.set_xlabel(label.replace('kept for backward', 'at the peak') if on_gpu else label)
        set_scale(axis)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(metric if final else f'{metric}, validation')
    figure.suptitle(f'{task}, {fraction:.0%} of the labels')
    rows = 22
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc='outside right center',
        fontsize=7,
        ncols=-(-len(methods) // rows),
    )
    return save(figure, out, slug(stem, task, f'{fraction:g}', metric))


def draw_fractions(found: dict, out: Path, stem: str) -> list[str]:
    """Draw score against the fraction of labels, where a task has several."""
    names = []
    for task, metric in dict.fromkeys((task, metric) for task, _, metric in found):
        points = sorted(f for t, f, m in found if (t, m) == (task, metric))
        if len(points) < 2:
            continue
        figure, axis = plt.subplots(figsize=(6, 4), layout='constrained')
        looks = looks_of(m for f in points for m in found[task, f, metric])
        for method in looks:
            have = [f for f in points if method in found[task, f, metric]]
            unit = hundredths(metric)
            scores = [unit * found[task, f, metric][method]['score'] for f in have]
            spreads = [unit * found[task, f, metric][method]['spread'] for f in have]
            axis.errorbar(have, scores, spreads, capsize=3, label=method, **looks[method])
        axis.set_xscale('log')
        axis.set_xticks(points, [f'{fraction:.3g}' for fraction in points])
        axis.set_xticks([], minor=True)
        axis.set_xlabel('fraction of the labels')
        axis.set_ylabel(metric)
        axis.set_title(task)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc='center left', bbox_to_anchor=(1, 0.5))
        names.append(save(figure, out, slug(stem, task, 'labels', metric)))
    return names


def looks_of(methods: Iterable[str]) -> dict[str, dict[str, str]]:
    """Colour and marker of each method.

    Those of every study look the same in all its pictures, Pro-tuning and its two twins stand out,
    and variants differ from all others of their picture.
    """
    known = {'pro-tuning': 'tab:red', 'full': 'black', 'head-only': 'tab:gray'}
    others = [name for name in METHODS if name not in known]
    known |= dict(zip(others, OTHERS, strict=True))
    looks = dict.fromkeys(methods)
    variants = itertools.cycle(itertools.product(MARKERS, OTHERS))
    for name in looks:
        marker, colour = ('o', known[name]) if name in known else next(variants)
        looks[name] = dict(marker=marker, color=colour)
    return looks


def save(figure: Figure, out: Path, name: str) -> str:
    """Write a picture."""
    figure.savefig(out / f'{name}.png', dpi=80)
    plt.close(figure)
    return f'{name}.png'
