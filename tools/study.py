"""Compare tuning methods over tasks, fractions of the labels and seeds.

    python tools/study.py my_study.py --out my_study              # all runs, on all cores
    python tools/study.py my_study.py --out my_study --task flowers5 --fraction 0.2 --jobs 1
    python tools/study.py my_study.py --run "flowers5 pro-tuning 1 0.001 0"
    python tools/study.py my_study.py --out my_study --table      # draw tables and plots again

Every method has the same steps, seeds and grid of learning rates; its learning rate is the best on
the validation split, as a mean over seeds, and the score is that of the test split. Each run that
ends is a line a metric in OUT/results.jsonl; a run that is there is not done again, unless its
settings have changed, and one that was stopped is. A run whose loss is no number counts, with
score 0. The table of other results than results.jsonl (ablations) shows no test scores: what is
chosen by them must not have seen the test split.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import torch
from jobs import Results
from study_parts.data_checks import check_data, check_ready
from study_parts.plan import Study
from study_parts.report import document, write_report
from study_parts.runs import Run
from study_parts.training import train

from protune_mm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('study', help='the file of a study')
    parser.add_argument('--task', nargs='+', help='only these tasks')
    parser.add_argument('--method', nargs='+', help='only these methods')
    parser.add_argument('--fraction', nargs='+', type=float, help='only these parts of the labels')
    parser.add_argument('--run', help='one run, by the key in its results; print its lines')
    parser.add_argument('--table', action='store_true', help='run nothing, draw tables and plots')
    parser.add_argument(
        '--jobs',
        type=int,
        default=torch.cuda.device_count() or len(os.sched_getaffinity(0)),
        help='runs side by side; default: one on each GPU, or on each core where there is none',
    )
    parser.add_argument(
        '--out', help='folder of results, tables and plots; default: work_dirs/study/NAME OF FILE'
    )
    parser.add_argument('--results', default='results.jsonl', help='name of the file in it')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs {args.jobs}: at least one run has to go on')
    try:
        study = Study(args.study)
        one = args.run and Run.of(args.run)
    except ValueError as error:
        parser.error(str(error))
    if one and (one.task not in study.tasks or one.method not in study.known):
        parser.error(
            f'--run "{args.run}": {args.study} has the tasks {", ".join(study.tasks)}; methods are '
            f'{", ".join(study.known)}'
        )
    if one:
        check_ready(study, [one.task])
        check_data(study, [one])
        for line in train(args.study, args.run)['lines']:
            print(json.dumps(line))
        return
    study.results_name = args.results
    out = Path(args.out or Path('work_dirs', 'study', Path(args.study).stem))
    document(out, args.results)  # Perhaps another's.
    out.mkdir(parents=True, exist_ok=True)
    planned = runs = study.runs()
    for name in ('task', 'method', 'fraction'):
        chosen = getattr(args, name) or ()
        there = dict.fromkeys(getattr(run, name) for run in planned)
        for choice in chosen:
            if choice not in there:
                parser.error(f'--{name} {choice}: {args.study} has {", ".join(map(str, there))}')
        runs = [run for run in runs if not chosen or getattr(run, name) in chosen]
    if not runs:
        parser.error(f'{args.study} has none of these methods and fractions in these tasks')
    settings = {run.key: study.setting(run) for run in planned}
    results = StudyResults(out / args.results, args.jobs, settings)
    print(f'{results.path}: {len(results.known)} of {len(planned)} runs are there', flush=True)
    if not args.table:
        check_ready(study, dict.fromkeys(run.task for run in runs))
        print('looking at the data of all tasks', flush=True)
        check_data(study, [run for run in runs if run.key not in results.known])
        job = functools.partial(train, args.study, settings=settings)
        results.work(job, [run.key for run in runs])
        results.read_again()  # Another process may have had a part of the runs.
    lines = [line for row in results.known.values() for line in row['lines']]
    if lines:
        write_report(study, lines, out, args.results)
    elif args.table:
        parser.error(f'{results.path} has no results of {args.study}: name their folder by --out')
    if results.failed:
        key, reason = next(iter(results.failed.items()))
        sys.exit(
            f'{len(results.failed)} runs failed. The first, "{key}": {reason}\n'
            'The same command does only what is not done yet.'
        )


class StudyResults(Results):
    """Results with a line for each metric of a run; what is of no run of a study stays in the file.

    Args:
        path: of the file, JSON lines.
        processes: how many runs are done side by side.
        settings: of all runs of the study, by key.
    """

    def __init__(self, path: Path, processes: int, settings: dict[str, str]) -> None:
        self.settings = settings
        self.told: set[str] = set()
        super().__init__(path, processes)

    def from_lines(self, lines: list[dict]) -> dict[str, dict]:
        """A run counts when all its metrics are there, with the setting that the study has now."""
        found: dict[str, dict[str, dict]] = {}
        changed, unplanned = set(), set()
        for line in lines:
            key = line['key']
            if key not in self.settings:
                unplanned.add(key)
            elif line.get('setting') != self.settings[key]:
                changed.add(key)
            else:
                found.setdefault(key, {})[line['metric']] = line
        for keys, why in (
            (changed.difference(found), 'of other settings'),
            (unplanned, 'not planned'),
        ):
            if keys and why not in self.told:
                print(f'{self.path}: {len(keys)} runs {why} ignored')
                self.told.add(why)
        return {
            key: dict(key=key, lines=list(metrics.values()))
            for key, metrics in found.items()
            if len(metrics) == next(iter(metrics.values()))['metrics']
        }

    def to_lines(self, row: dict) -> list[dict]:
        """See :class:`Results`."""
        return row['lines']


if __name__ == '__main__':
    cli.run(main)
