"""The document of the coverage."""

from __future__ import annotations

import collections
import re

from protune_mm.compat import stack_versions

from .backbones import LIMIT
from .reading import digest

PRETRAINING = (
    'MAE', 'iTPN', 'MoCoV3', 'SimMIM', 'SparK', 'BEiT', 'SimCLR', 'BarlowTwins', 'MFF', 'SimSiam',
    'BYOL', 'CAE', 'DenseCL', 'EVA', 'MaskFeat', 'MILAN', 'MixMIM', 'MoCo', 'SwAV',
)  # fmt: skip
"""Model types that pre-train a backbone: nobody tunes one in them."""
ATTEMPTS = 5
"""Configs of one type of model whose training step is tried until one runs."""


def table(rows: list[dict]) -> str:
    """The document."""
    configs = [row for row in rows if row['key'].startswith('config ') and row.get('backbones')]
    built = {row['file']: row for row in rows if row['key'].startswith('build ')}
    by_model = {digest(r['model']): built[r['file']] for r in configs if r['file'] in built}
    checks = {digest(r['structure']): r for r in rows if r['key'].startswith('backbone ')}
    count = collections.defaultdict(collections.Counter)
    facts = collections.defaultdict(list)
    reasons = collections.defaultdict(set)
    for row in configs:
        outcome = by_model.get(digest(row['model']), {'status': 'not run', 'reason': ''})
        status, reason = outcome['status'], outcome['reason']
        for item in row['backbones']:
            place = (row['library'], item['type'])
            tried = checks.get(digest(item['structure']), {'status': 'not run', 'reason': ''})
            facts[place].append(tried)
            worst = max((status, tried['status']), key=ORDER.index)
            if (status, tried['status']) == ('stock fails', 'ok'):
                worst = 'backbone ok'
            pretrains = row['model_type'] in PRETRAINING
            count[place, pretrains][worst] += 1
            if worst not in ('ok', 'not run'):
                why = reason if status in (worst, 'stock fails') else tried['reason']
                reasons[place, worst].add(why.splitlines()[0] if why else '')
    text = [
        '# Coverage: stock configs that can be Pro-tuned',
        '',
        'Every config that the libraries ship. "ok": the rewritten config builds; and its backbone',
        'starts exactly as stock (bit for bit with `lean=False`; with lean layers to 1e-5, or to',
        '1e-9 in float64 where rounding grows), gives every prompt and nothing frozen a gradient,',
        'leaves all frozen tensors as they are in a step, and has prompts of at most',
        f'{LIMIT:.0%} of its parameters. "stock fails": the stock config does not build or run in',
        'this environment either. What the network would bring is made up: text encoders are',
        'small and random, teachers and backbones have random weights, scales and statistics.',
        *_notes(rows, checks),
        '',
        '    PYTHONPATH=.extra python tools/coverage.py  # .extra: requirements/coverage.txt',
        '',
    ]
    for pretrains, title in ((False, 'Detectors, segmentors, classifiers'), (True, 'Pre-training')):
        chosen_rows = {place: c for (place, p), c in count.items() if p is pretrains}
        total = sum(chosen_rows.values(), collections.Counter())
        text += [
            f'## {title}',
            '',
            f'{sum(total.values())} configs: {total["ok"]} ok '
            f'({total["ok"] / max(1, sum(total.values())):.1%}); {total["backbone ok"]} with an ok '
            f'backbone in a model that does not build here as stock; {total["refused"]} refused; '
            f'{total["failed"]} failed; {total["stock fails"]} whose stock backbone does not run '
            f'here{not_run(total)}.',
            '',
            '| library | backbone | configs | ok | backbone ok | refused | failed | stock fails '
            '| prompts |',
            '|---|---|---|---|---|---|---|---|---|',
        ]
        for place, c in sorted(chosen_rows.items()):
            shares = [f['prompts'] for f in facts[place] if 'prompts' in f]
            share = f'{min(shares):.1%} to {max(shares):.1%}' if shares else ''
            counts = ('ok', 'backbone ok', 'refused', 'failed', 'stock fails')
            cells = [*place, sum(c.values()), *(c[name] for name in counts), share]
            text.append(f'| {" | ".join(map(str, cells))} |')
        text.append('')
    text += [
        '## A training step of every type of model',
        '',
        'Two steps on generated data through the whole model: finite loss, a gradient at every',
        'prompt, frozen bits as they were. Up to five configs of a type are tried, the smallest',
        'first; "stock fails": the stock model does not train on this data either.',
        '',
        *_steps(rows, configs),
        '',
        '## Reasons',
        '',
    ]
    text += [
        f'- {library} {kind}, {status}: {reason}'
        for ((library, kind), status), found in sorted(reasons.items())
        for reason in sorted(found)
    ]
    unread = [row for row in rows if row['status'] == 'unreadable']
    text += [f'- {row["file"]}, mmengine cannot read it: {_portable(row)}' for row in unread]
    versions = ', '.join(f'{k} {v}' for k, v in stack_versions().items())
    return '\n'.join([*text, '', f'Run with {versions}.', ''])


def _notes(rows: list[dict], checks: dict[str, dict]) -> list[str]:
    """What the counts leave out, and what was measured otherwise."""
    configs = [row for row in rows if row['key'].startswith('config ')]
    unread = sum(row['status'] == 'unreadable' for row in configs)
    others = [row for row in configs if row['status'] == 'read' and not row['backbones']]
    kinds = sorted({row['model_type'] for row in others if row['model_type'] != 'None'})
    models = sum(row['model_type'] != 'None' for row in others)
    single = sorted({r['type'] for r in checks.values() if r.get('lean_dtype') == 'float32 only'})
    return [
        '',
        f'Not counted: {unread} configs that mmengine cannot read (at the end), and {models} of '
        f'models without a `backbone` ({", ".join(kinds)}).',
        *([f'Compared in float32 alone, to 1e-3: {", ".join(single)}.'] if single else []),
    ]


def not_run(total: collections.Counter) -> str:
    """A note, where results are missing."""
    return f'; {total["not run"]} not run yet' if total['not run'] else ''


def complete(rows: list[dict], files: list[str]) -> bool:
    """Whether all configs were read and built, and all backbones and types of models tried.

    Args:
        rows: the results.
        files: ``library::path`` of every config there is.
    """
    read = {row['file'] for row in rows if row['key'].startswith('config ')}
    configs = [row for row in rows if row['key'].startswith('config ') and row.get('backbones')]
    models = {row['file']: digest(row['model']) for row in configs}
    built, steps = (
        {models[r['file']]: r['status'] for r in rows
         if r['key'].startswith(kind) and r['file'] in models}
        for kind in ('build ', 'step ')
    )  # fmt: skip
    checked = {digest(row['structure']) for row in rows if row['key'].startswith('backbone ')}
    able = collections.defaultdict(set)
    for row in configs:
        model = models[row['file']]
        if built.get(model) == 'ok' and row['model_type'] not in PRETRAINING:
            able[row['library'], row['model_type']].add(model)
    return (
        bool(configs)
        and read.issuperset(files)
        and built.keys() >= set(models.values())
        and all(digest(item['structure']) in checked for r in configs for item in r['backbones'])
        and all(_tried([steps[m] for m in mine if m in steps], len(mine)) for mine in able.values())
    )


def _tried(found: list[str], there: int) -> bool:
    """Whether a type of model is done with: a step says something of ours, or none is left."""
    return any(s != 'stock fails' for s in found) or len(found) >= min(ATTEMPTS, there)


def _steps(rows: list[dict], configs: list[dict]) -> list[str]:
    """A line for each type of model."""
    kind_of = {row['file']: (row['library'], row['model_type']) for row in configs}
    tried = collections.defaultdict(list)
    for row in rows:
        if row['key'].startswith('step '):
            tried[kind_of[row['file']]].append(row)
    kinds = sorted(kind for kind in set(kind_of.values()) if kind[1] not in PRETRAINING)
    lines = []
    for kind in kinds:
        found = {status: row for row in tried[kind] for status in [row['status']]}
        worst = next((s for s in ('failed', 'ok', 'stock fails') if s in found), 'not tried')
        row = found.get(
            worst,
            {'file': '', 'reason': 'its backbone is refused, or the stock model does not build'},
        )
        lines.append(f'| {" | ".join(kind)} | {worst} | {row["file"].partition("::")[2]} | '
                     f'{row["reason"].partition(chr(10))[0][:120]} |')  # fmt: skip
    good = sum(' | ok | ' in line for line in lines)
    head = '| library | type | result | config | reason |\n|---|---|---|---|---|'
    return [f'{good} of {len(lines)} types train.', '', head, *lines]


def _portable(row: dict) -> str:
    """The reason without the folder in which this environment lies."""
    return re.sub(r'[^\s\'"]*site-packages/', '', row['reason'])


ORDER = ('ok', 'backbone ok', 'no backbone', 'stock fails', 'refused', 'not run', 'failed')
