"""Tables and plots of a study, from its results alone."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

from jobs import check_document

from .cells import cells, hundredths, lead, mean, share
from .claim import by_scenario, together, verdict
from .plan import Study
from .plots import draw, draw_fractions
from .runs import rate_text

PARTS = (
    '0.06x0.5: the head trains at 0.06, what trains in the backbone at half (x2: twice) of the',
    'rate that it has with a plain 0.06. Head-only has each rate once.',
    '',
)
"""What a table has to say where rates have a part of the multiples."""


START = {
    True: '# Study\n\nTest scores, mean and standard deviation over seeds',
    False: '# Ablations\n\nValidation scores, mean and standard deviation over seeds',
}
"""How the document begins, by whether it has test scores."""


def document(out: Path, name: str) -> tuple[Path, bool]:
    """The file of a report on some results, and whether it has test scores.

    Raises:
        ValueError: the file is there, and no report.
    """
    final = name == 'results.jsonl'
    file = out / f'{"README" if final else Path(name).stem}.md'
    check_document(file, START[final])
    return file, final


def write_report(study: Study, lines: list[dict], out: Path, name: str) -> None:
    """Write OUT/README.md (or another name for other results, whose table has no test scores)."""
    file, final = document(out, name)
    found = cells(study, lines)
    if not final:
        # Under corruption and attack, too, the validation score is the clean one.
        found = {
            (task, fraction, metric): methods
            for (task, fraction, metric), methods in found.items()
            if metric in study.tasks[task]['metrics']
        }
    stem = file.stem
    pictures = {place: draw(place, methods, out, stem, final) for place, methods in found.items()}
    by_labels = draw_fractions(found, out, stem) if final else []
    text = report(study, found, lines, pictures, by_labels, out, final)
    file.write_text(text)
    print(text)
    print(f'wrote {file}')


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
    which = 'test scores' if final else 'validation'
    page = 'findings.md' if final else 'form.md'
    meaning = f' [{page}]({page}) says what the numbers mean.' if (out / page).exists() else ''
    more = '' if final else f' --results {study.results_name}'
    more += f' --out {out}'
    text = [
        f'{START[final]}, at the learning rate with the best',
        'mean validation score of the first metric; the same grid of rates, steps and seeds for',
        'every method; * where that rate is at an end of the grid, = where a higher one has the',
        'same validation score. "ahead": points of the named method over that of the line, by',
        f'{which}, the mean over the seeds of both and its standard error. "trains": part of the',
        'backbone\'s parameters, prompts included. "keeps": MiB that a step keeps for its backward',
        'pass (on a GPU: the peak). "time": processor time (on a GPU: time) of a step over that of',
        'head-only, of full where there is none, else of the first line, at equal rates and seeds.',
        'A diverged run has score 0. Average precision is in points of 100. Corruption errors are',
        "plain means, not divided by another network's.",
        '',
        *([study.note, ''] if study.note else []),
        *(PARTS if any(line.get('lr_part', 1) != 1 for line in lines) else ()),
        f'`{study.path}` has the options of every method, and its rate in the backbone over',
        f'that of the head.{meaning}',
        '',
        f'    python tools/study.py {study.path}{more}',
        '',
    ]
    if final:
        text += verdict(found, study.methods)
        text += by_scenario(study, found)
        text += together(found)
    for place, methods in found.items():
        text += table(study, place, methods, final)
        picture = pictures[place]
        text += ['', f'![{place[0]}: score against parameters, memory and time]({picture})', '']
    text += [f'![score against the fraction of labels]({name})\n' for name in by_labels]
    text += environments(lines)
    return '\n'.join(text)


def table(study: Study, place: tuple, methods: dict[str, dict], final: bool) -> list[str]:
    """The methods at one place, the best first, under a heading."""
    task, fraction, metric = place
    first = next(iter(methods.values()))['runs'][0]
    plan = study.tasks[task]
    every = plan.get('scenarios', {}).get('every', 1)
    part = f', on 1 of {every} test images' if metric not in plan['metrics'] and every > 1 else ''
    of_test, of_val = hundredths(metric), hundredths(plan['metrics'][0])
    key, unit = ('score', of_test) if final else ('val_score', of_val)
    best_first = sorted(methods, key=lambda m: -methods[m]['score' if final else 'val'])
    base = 'pro-tuning' if 'pro-tuning' in methods else best_first[0]
    text = [
        f'## {task}, {fraction:.0%} of the labels, {metric}',
        '',
        f'{first["backbone"]}, {first["steps"]} steps{part}.',
        '',
        f'| method |{" test |" if final else ""} validation | {base} ahead | lr | trains '
        '| keeps | time | runs (diverged) |',
        f'|---|{"---|" if final else ""}---|---|---|---|---|---|---|',
    ]
    for method in best_first:
        cell = methods[method]
        score, spreads = of_test * cell['score'], of_test * cell['spread']
        test = f' {score:.2f} ± {spreads:.2f} |' if final else ''
        val = f' {of_val * cell["val"]:.2f}'
        val += '' if final else f' ± {of_val * cell["val_spread"]:.2f}'
        time = cell['time']
        rate = rate_text(cell['lr'], cell['lr_part'])
        text.append(
            f'| {method} |{test}{val} | {lead(methods[base], cell, unit, key)} '
            f'| {rate}{"*" * cell["edge"]}{"=" * cell["tie"]} | {share(cell):.1%} '
            f'| {mean(cell["runs"], "peak_memory") / 2**20:.1f} '
            f'| {"" if math.isnan(time) else f"{time:.2f}"} '
            f'| {cell["count"]} ({cell["diverged"]}){"" if cell["complete"] else ", not all"} |'
        )
    return text


def environments(lines: list[dict]) -> list[str]:
    """What the runs ran on, with how many runs each where that differs, and all versions."""
    if not lines:
        return []
    devices = Counter({line['key']: device_of(line) for line in lines}.values())
    on = ' and on '.join(
        f'{device} ({count} run{"s" * (count > 1)})' if len(devices) > 1 else device
        for device, count in sorted(devices.items())
    )
    whole = max((line['versions'] for line in lines), key=len)
    stack = ', '.join(
        f'{name} {" or ".join(sorted({line["versions"].get(name, "unknown") for line in lines}))}'
        for name in whole
    )
    return [f'Run on {on}, one thread a run on a CPU, with {stack}.', '']


def device_of(line: dict) -> str:
    """The device of a run and, of a CPU, its model; results of older versions do not tell it."""
    if line['device'] != 'CPU':
        return line['device']
    return f'a CPU ({line.get("processor") or "model not recorded"})'
