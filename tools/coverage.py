"""Try Pro-tuning on every stock config of the installed libraries.

    python tools/coverage.py                                  # all, on all cores
    python tools/coverage.py --library mmseg --backbone HRNet
    python tools/coverage.py --table                          # draw the table again

For each config: does the rewritten config build? For each distinct backbone: outputs at the start,
gradients, freeze, lean layers, size of the prompts. For each type of model: a training step. Writes
a JSON line a job into --work-dir, and docs/coverage.md. A run that was stopped goes on where it
was, unless the code or an installed package changed. requirements/coverage.txt has what some stock
models import beyond the libraries.
"""

from __future__ import annotations

if __name__ not in ('__main__', '__mp_main__'):
    # The folder of a script comes first in the search path, and numba looks for the package.
    raise ImportError('this is a tool, not the package `coverage`')

import argparse
import hashlib
import os
import sys
from importlib.metadata import distributions
from pathlib import Path

from jobs import DIED, Results
from stock_configs.backbones import try_backbone
from stock_configs.building import try_config
from stock_configs.reading import config_files, digest, file_of, read_config, result
from stock_configs.steps import try_step
from stock_configs.table import ATTEMPTS, PRETRAINING, complete, table

import protune_mm
from protune_mm.stages import LIBRARIES

TOOLS = Path(__file__).parent


def main() -> None:
    args = parse_args()
    # Results of other code, or of other libraries, are no results.
    folder = Path(args.work_dir) / state_digest()
    folder.mkdir(parents=True, exist_ok=True)
    kind = Results if args.table else Attempts
    results = kind(folder / 'results.jsonl', args.jobs, failure)
    libraries = [args.library] if args.library else LIBRARIES
    files = args.config or [file for name in libraries for file in config_files(name)]
    if args.sample:
        files = files[:: max(1, len(files) // args.sample)][: args.sample]
    rows = list(results.known.values()) if args.table else run(files, args.backbone, results)
    text = table(rows)
    print(text)
    if not (args.library or args.backbone or args.sample or args.config):
        if not complete(rows, files):
            sys.exit(f'{folder} does not hold all results: {args.out} stays as it is')
        Path(args.out).write_text(text)
        print(f'wrote {args.out}')
    sys.exit(any(row['status'] == 'failed' for row in rows))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--library', choices=LIBRARIES, help='only its configs')
    parser.add_argument('--backbone', help='only configs with a backbone of this type')
    parser.add_argument('--sample', type=int, help='only so many configs, evenly spread')
    parser.add_argument('--config', nargs='+', help='only these, such as mmseg::pspnet/NAME.py')
    parser.add_argument(
        '--jobs', type=int, default=len(os.sched_getaffinity(0)), help='processes; default: cores'
    )
    parser.add_argument('--table', action='store_true', help='run nothing, draw the table')
    parser.add_argument('--work-dir', default='work_dirs/coverage', help='folder of the results')
    parser.add_argument('--out', default='docs/coverage.md', help='the table of a full run')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs {args.jobs}: at least one process has to go on')
    return args


class Attempts(Results):
    """Results without those of processes that died, for want of memory perhaps: try these again."""

    def from_lines(self, lines: list[dict]) -> dict[str, dict]:
        return super().from_lines([row for row in lines if row['reason'] != DIED])


def run(files: list[str], backbone: str | None, results: Results) -> list[dict]:
    """All jobs for some configs; their results."""
    configs = results.work(read_config, (f'config {file}' for file in files))
    configs = [row for row in configs if chosen(row, backbone)]
    models, distinct = {}, {}
    for row in configs:
        if row.get('model'):
            models.setdefault(digest(row['model']), row['file'])
        for item in row.get('backbones', []):
            distinct.setdefault(digest(item['structure']), f'{row["file"]} {item["name"]}')
    rows = results.work(try_config, (f'build {file}' for file in models.values()))
    rows += results.work(try_backbone, (f'backbone {what}' for what in distinct.values()))
    types = {}
    for row in configs:
        file = models.get(digest(row.get('model')))
        built = results.known.get(f'build {file}', {}).get('status') == 'ok'
        if row.get('backbones') and built and row['model_type'] not in PRETRAINING:
            parts = [results.known.get(f'backbone {distinct[digest(item["structure"])]}', {})
                     for item in row['backbones']]  # fmt: skip
            size = sum(part.get('parameters', 0) for part in parts)
            types.setdefault((row['library'], row['model_type']), {})[file] = size
    # The smallest first.
    queues = {kind: sorted(found, key=found.get)[:ATTEMPTS] for kind, found in types.items()}
    while queues:
        done = results.work(try_step, [f'step {queue.pop(0)}' for queue in queues.values()])
        rows += done
        queues = {
            kind: queue
            for (kind, queue), row in zip(queues.items(), done, strict=True)
            if queue and row['status'] == 'stock fails'
        }
    return rows + configs


def state_digest() -> str:
    """Changes with the code that is tried, the code that tries it, and what both can import."""
    files = [
        *Path(protune_mm.__file__).parent.rglob('*.py'),
        *(TOOLS / 'stock_configs').glob('*.py'),
    ]
    joined = b''.join(path.read_bytes() for path in sorted(files))
    # Optional ones decide what stock models run, so all that is installed counts.
    joined += repr(sorted(f'{d.name} {d.version}' for d in distributions())).encode()
    return hashlib.sha1(joined + sys.version.encode()).hexdigest()[:12]


def failure(key: str, reason: str) -> dict:
    """The result of a job that raised an error."""
    return result(key, 'failed', reason[:400], file=file_of(key))


def chosen(row: dict, backbone: str | None) -> bool:
    """Whether a config has a backbone of the type asked for."""
    return not backbone or any(
        item['type'].rpartition('.')[2] == backbone for item in row.get('backbones', [])
    )


if __name__ == '__main__':
    main()
