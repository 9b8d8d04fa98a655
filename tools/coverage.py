"""Try Pro-tuning on every stock config of the installed libraries.

    python tools/coverage.py                                  # all, on all cores
    python tools/coverage.py --library mmseg --backbone HRNet
    python tools/coverage.py --table                          # draw the table again

For each config: does the rewritten config build? For each distinct backbone: outputs at the start,
gradients, freeze, lean layers, size of the prompts. Writes a JSON line a job into --work-dir, and
docs/coverage.md. A run that was stopped goes on where it was. requirements/coverage.txt has what
some stock models import beyond the libraries.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import torch
from generated_data import SIZE, batches
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from torch import nn

import protune_mm
from protune_mm.compat import stack_versions
from protune_mm.config import config_backbones
from protune_mm.frozen import backbones, frozen_tensors, heads
from protune_mm.optim import wrap_constructor
from protune_mm.stages import LIBRARIES, refusal

LIMIT = 0.08
SIZES = ((64, 96), (96, 160), (224, 224), (256, 256), (192, 192), (384, 384), (512, 512), (32, 32))
"""Heights and widths to try, in pixels: not square first, then the native sizes."""
WITHOUT_STRUCTURE = (
    'init_cfg',
    'frozen_stages',
    'norm_eval',
    'with_cp',
    'pretrained',
    'convert_weights',
)
"""Arguments of backbones that do not change their layers."""
PRETRAINING = (
    'MAE', 'iTPN', 'MoCoV3', 'SimMIM', 'SparK', 'BEiT', 'SimCLR', 'BarlowTwins', 'MFF', 'SimSiam',
    'BYOL', 'CAE', 'DenseCL', 'EVA', 'MaskFeat', 'MILAN', 'MixMIM', 'MoCo', 'SwAV',
)  # fmt: skip
"""Model types that pre-train a backbone: nobody tunes one in them."""


def main() -> None:
    args = parse_args()
    folder = Path(args.work_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / 'results.jsonl'
    known = {row['key']: row for row in read(results)}
    libraries = [args.library] if args.library else LIBRARIES
    files = [f'{name}::{path}' for name in libraries for path in config_files(name)]
    if args.config:
        files = args.config
    if args.sample:
        files = files[:: max(1, len(files) // args.sample)][: args.sample]
    if args.table:
        rows = list(known.values())
    else:
        spawn = multiprocessing.get_context('spawn')
        with ProcessPoolExecutor(args.jobs, spawn, start_worker) as pool:
            configs = work(pool, read_config, [('config', f) for f in files], known, results)
            configs = [row for row in configs if chosen(row, args.backbone)]
            models, distinct = {}, {}
            for row in configs:
                if row.get('model'):
                    models[digest(row['model'])] = row['key']
                for item in row.get('backbones', []):
                    item['file'] = row['file']
                    distinct.setdefault(digest(item['structure']), item)
            build = [('build', key.partition(' ')[2]) for key in models.values()]
            rows = work(pool, try_config, build, known, results)
            check = [('backbone', f'{i["file"]} {i["name"]}') for i in distinct.values()]
            rows += work(pool, try_backbone, check, known, results)
            # One config of each model type.
            types = {}
            for row in configs:
                if (
                    row.get('backbones')
                    and known[f'build {built_for(row, models)}']['status'] == 'ok'
                ):
                    types.setdefault((row['library'], row['model_type']), row['file'])
            rows += work(
                pool, try_step, [('step', file) for file in types.values()], known, results
            )
            rows += configs
    text = table(rows)
    print(text)
    if not (args.library or args.backbone or args.sample or args.config):
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
        '--jobs', type=int, default=os.cpu_count(), help='processes; default: cores'
    )
    parser.add_argument('--table', action='store_true', help='run nothing, draw the table')
    parser.add_argument('--work-dir', default='work_dirs/coverage', help='folder of the results')
    parser.add_argument('--out', default='docs/coverage.md', help='the table of a full run')
    return parser.parse_args()


def config_files(library: str) -> list[str]:
    """Names of all configs that a library ships, below its folder of configs."""
    root = Path(importlib.import_module(library).__file__).parent / '.mim/configs'
    found = (str(path.relative_to(root)) for path in sorted(root.rglob('*.py')))
    return [name for name in found if '_base_' not in name and '__init__' not in name]


def read(path: Path) -> Iterator[dict]:
    """Results so far; a line that was cut off is done again."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def work(pool: object, run: object, jobs: list[tuple], known: dict, results: Path) -> list[dict]:
    """Run the jobs that have no result yet, note each at once, and show how long it will take."""
    keys = [f'{kind} {what}' for kind, what in jobs]
    todo = [key for key in keys if key not in known]
    start = time.time()
    cut = results.exists() and not results.read_text().endswith('\n')
    with results.open('a') as out:
        if cut:  # A stopped run may have left half a line.
            out.write('\n')
        for number, job in enumerate(as_completed(pool.submit(run, key) for key in todo), 1):
            try:
                row = job.result()
            except BrokenProcessPool:
                sys.exit(
                    'a process died, for want of memory perhaps: run the same command again, with '
                    f'--jobs 1; {results} has the results so far'
                )
            known[row['key']] = row
            out.write(json.dumps(row) + '\n')
            out.flush()
            left = (time.time() - start) / number * (len(todo) - number)
            note = f': {row["reason"][:150]}' if row['status'] == 'failed' else ''
            print(f'[{number}/{len(todo)}, {left / 60:.0f} min left] {row["status"]} '
                  f'{row["key"][:110]}{note}', flush=True)  # fmt: skip
    return [known[key] for key in keys]


def start_worker() -> None:
    """One thread a process, and no messages of the stack."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


def digest(value: object) -> str:
    return hashlib.sha1(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def plain(value: object) -> object:
    """A config in JSON's types."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, type):
        return f'{value.__module__}.{value.__qualname__}'
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def structure(config: dict) -> object:
    """What of a backbone's config makes a difference to its layers."""
    return plain({k: v for k, v in config.items() if k not in WITHOUT_STRUCTURE})


def result(key: str, status: str, reason: str = '', **more: object) -> dict:
    return dict(key=key, status=status, reason=reason, **more)


def read_config(key: str) -> dict:
    """What a config's model is, and its backbones."""
    file = key.partition(' ')[2]
    library = file.partition('::')[0]
    row = dict(library=library, file=file)
    try:
        cfg = protune_mm.load_config(file)
        kind = (cfg.get('model') or {}).get('type')
        items = []
        for name, backbone in config_backbones(cfg):
            config = {**backbone, 'scope': scope_name(cfg, file)}
            items.append(dict(name=name, type=plain(backbone['type']), structure=structure(config)))
        return result(key, 'read', model=plain(cfg.get('model')), model_type=plain(kind),
                      backbones=items, **row)  # fmt: skip
    except Exception as error:
        return result(key, 'unreadable', repr(error)[:300], **row)


def chosen(row: dict, backbone: str | None) -> bool:
    return not backbone or any(
        item['type'].rpartition('.')[2] == backbone for item in row.get('backbones', [])
    )


@contextlib.contextmanager
def without_init() -> Iterator[None]:
    """Leave new weights as they come: what is only built need not be initialized."""
    names = [n for n in dir(nn.init) if n.endswith('_') and not n.startswith('_')]
    stock = {name: getattr(nn.init, name) for name in names}
    for name in names:
        setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
    try:
        yield
    finally:
        for name, function in stock.items():
            setattr(nn.init, name, function)


def try_config(key: str) -> dict:
    """Whether the rewritten config builds."""
    file = key.partition(' ')[2]
    cfg = protune_mm.load_config(file)
    if not list(config_backbones(cfg)):
        return result(key, 'no backbone', file=file)
    for protune in (True, False):
        cfg = protune_mm.load_config(file, protune=protune)
        try:
            with scope_of(scope_name(cfg, file)), without_init():
                MODELS.build(cfg.model)
        except Exception as error:
            reason = short(error)
            if protune and 'cannot be Pro-tuned' in reason:
                return result(key, 'refused', reason, file=file)
            if not protune:
                return result(key, 'stock fails', reason, file=file)
            problem = reason + '\n' + traceback.format_exc(limit=-3)
            continue
        if protune:
            return result(key, 'ok', file=file)
    return result(key, 'failed', problem, file=file)


def scope_name(cfg: Config, file: str) -> str:
    """Default scope of a config; of its library where it has none."""
    return cfg.get('default_scope') or file.partition('::')[0]


def scope_of(name: str) -> contextlib.AbstractContextManager:
    return DefaultScope.overwrite_default_scope(name)


def short(error: Exception) -> str:
    return f'{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ""}'[:400]


def built_for(row: dict, models: dict[str, str]) -> str:
    """The file that was built for all configs with the same model."""
    return models[digest(row['model'])].partition(' ')[2]


def try_step(key: str) -> dict:
    """One training step of a whole model: finite loss, prompts move, frozen bits do not."""
    file = key.partition(' ')[2]
    problem = step(file, protune=True)
    kind = plain(protune_mm.load_config(file).model.type)
    if not problem:
        return result(key, 'ok', file=file, type=kind)
    if step(file, protune=False):
        return result(key, 'stock fails', problem.splitlines()[0], file=file, type=kind)
    return result(key, 'failed', problem, file=file, type=kind)


def step(file: str, protune: bool) -> str:
    """What went wrong, with every kind of generated data; '' if one of them trains."""
    problems = []
    cfg = protune_mm.load_config(file, protune=protune)
    library = file.partition('::')[0]
    with scope_of(scope_name(cfg, file)):
        try:
            torch.manual_seed(0)
            for _, backbone in config_backbones(cfg):
                backbone.pop('init_cfg', None)
            cfg.model.pop('pretrained', None)
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
            for parameter in model.parameters():  # Some layers leave memory as they find it.
                if not parameter.abs().max() < 1e3:
                    parameter.data.normal_(0, 0.01)
            model.train()
        except Exception as error:
            return short(error)
        sizes = [SIZE, (224, 224)] if library == 'mmpretrain' else [SIZE]
        for size in sizes:
            for data in batches(library, size):
                try:
                    return train(model, data)
                except Exception as error:
                    problems.append(f'{short(error)}\n{traceback.format_exc(limit=-4)}')
    return problems[0]


def train(model: nn.Module, data: dict) -> str:
    """Two steps: behind a zero start gradients arrive in the second only."""
    holder = SimpleNamespace(model=model)
    optimizer = dict(optimizer=dict(type='SGD', lr=1e-6))
    if list(backbones(model).values()):
        optimizer = wrap_constructor(optimizer)
    wrapper = Runner.build_optim_wrapper(holder, optimizer)
    before = {name: tensor.clone() for name, tensor in frozen_tensors(model)}
    hub = MessageHub.get_current_instance()  # Some augmentations of batches ask how far we are.
    for name in ('iter', 'epoch'):
        hub.update_info(name, 0)
    own = protune_mm.tuned_parameters(model)
    lost = set(own)
    for name, parameter in own.items():
        parameter.register_hook(lambda grad, name=name: lost.discard(name))
    for _ in range(2):
        logs = model.train_step(copy.deepcopy(data), wrapper)
    loss = logs['loss']
    if not torch.isfinite(loss):
        return f'the loss is {loss.item()}'
    moved = [n for n, t in frozen_tensors(model) if not torch.equal(t, before[n])]
    if moved:
        return f'{moved[0]} moved'
    return f'no gradient at {min(lost)}' if lost else ''


def try_backbone(key: str) -> dict:
    """Start, gradients, freeze, lean layers and size of one distinct backbone."""
    _, file, name = key.split(' ')
    cfg = protune_mm.load_config(file)
    config, scope = dict(config_backbones(cfg))[name], scope_name(cfg, file)
    row = dict(type=plain(config['type']), structure=structure({**config, 'scope': scope}))
    config = {k: v for k, v in config.items() if k not in ('init_cfg', 'pretrained')}
    try:
        with scope_of(scope):
            problem, facts = check(config)
    except Exception as error:
        if 'cannot be Pro-tuned' in str(error):
            return result(key, 'refused', short(error), **row)
        problem, facts = f'{short(error)}\n{traceback.format_exc(limit=-4)}', {}
        if isinstance(error, StockError):
            return result(key, 'stock fails', str(error), **row)
    return result(key, 'failed' if problem else 'ok', problem or '', **row, **facts)


class StockError(Exception):
    """The stock backbone does not run here."""


def stock_backbone(config: dict) -> nn.Module:
    """The backbone with weights that are the same each time, none of them uninitialized."""
    torch.manual_seed(0)
    try:
        backbone = MODELS.build(copy.deepcopy(config))
    except Exception as error:
        raise StockError(short(error)) from error
    generator = torch.Generator().manual_seed(0)
    for parameter in backbone.parameters():
        if parameter.ndim > 1:
            fan = max(1, parameter[0].numel())
            parameter.data.normal_(0, fan**-0.5, generator=generator)
        elif not torch.isfinite(parameter).all() or parameter.numel() == 0:
            parameter.data.fill_(0.5)
    for name, buffer in backbone.named_buffers():
        if name.endswith('weight_gamma'):  # ConvAWS: the size of weights of which it makes units.
            buffer.fill_(0.02)
    backbone.train(False)
    return backbone.requires_grad_(False)


def run(backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return flat(backbone(x))


def flat(out: object) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, dict):
        out = list(out.values())
    return [t for part in out or () for t in flat(part)] if isinstance(out, list | tuple) else []


def picture(backbone: nn.Module, channels: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first image that the stock backbone takes, and what it returns."""
    native = getattr(backbone, 'img_size', None)
    sizes = list(SIZES)
    if native is not None:
        pair = tuple(native) if isinstance(native, list | tuple) else (int(native),) * 2
        sizes.insert(2, pair[-2:])
    errors = []
    for size in sizes:
        x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad():
                out = run(backbone, x)
            if all(torch.isfinite(o).all() for o in out):
                return x, out
            errors.append('its output is not finite')
        except Exception as error:
            errors.append(short(error))
    raise StockError(f'takes none of the images tried: {errors[0]}')


def check(config: dict) -> tuple[str, dict]:
    """Problems of one backbone ('' for none), and facts about it."""
    stock = stock_backbone(config)
    reason = refusal(type(stock))
    if reason:
        raise ValueError(f'{type(stock).__name__} cannot be Pro-tuned: {reason}')
    keys = set(stock.state_dict())
    total = sum(p.numel() for p in stock.parameters())
    gray = str(config['type']).endswith('LeNet5')
    x, expected = picture(stock, config.get('in_channels', 1 if gray else 3))
    facts = dict(size=list(x.shape[1:]), parameters=total)
    problems = []

    tuned = protune_mm.protune(stock, lean=False)
    with torch.no_grad():
        got = run(tuned.train(False), x)
    if [o.shape for o in got] != [o.shape for o in expected]:
        problems.append('outputs of other shapes than stock')
    elif not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        problems.append('with lean off the start is not that of the stock backbone')
    own = protune_mm.tuned_parameters(tuned)
    if keys & set(own):
        problems.append('a prompt has the name of a stock tensor')
    facts['prompts'] = sum(p.numel() for p in own.values()) / total
    if facts['prompts'] > LIMIT:
        problems.append(f'prompts have {facts["prompts"]:.1%} of the parameters')
    problems += check_training(tuned, x)
    del tuned, stock

    lean = protune_mm.protune(stock_backbone(config), lean=True).train(False)
    with torch.no_grad():
        got = run(lean, x)
    facts['lean_error'] = error = difference(expected, got)
    if not error <= 1e-5:
        # Rounding, or a mistake? In float64 the two tell themselves apart.
        stock = stock_backbone(config).double()
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            exact = run(stock, x.double())
            lean = protune_mm.protune(stock, lean=True).train(False)
            facts['lean_error'] = error = difference(exact, run(lean, x.double()))
            facts['lean_dtype'] = 'float64'
        if not error <= (1e-9 if 'lean_dtype' in facts else 1e-3):
            problems.append(f'lean layers differ by {error:.1e}')
    return '; '.join(problems), facts


def difference(expected: list[torch.Tensor], got: list[torch.Tensor]) -> float:
    """Largest difference, as a part of the largest number of each output."""
    return max(
        ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()
        for a, b in zip(expected, got, strict=True)
    )


def check_training(tuned: nn.Module, x: torch.Tensor) -> list[str]:
    """One step with prompts that matter: who got a gradient, and what moved."""
    generator = torch.Generator().manual_seed(2)
    own = protune_mm.tuned_parameters(tuned)
    for parameter in own.values():
        parameter.data.normal_(0, 0.1, generator=generator)
    tuned.train()
    before = {name: tensor.clone() for name, tensor in frozen_tensors(tuned)}
    trained = {f'{n}.{k}' for n, m in heads(tuned).items() for k, _ in m.named_parameters()}
    loss = sum(o.float().square().mean() for o in run(tuned, x) if o.requires_grad)
    loss.backward()
    problems = []
    for name, parameter in tuned.named_parameters():
        if name in own and (parameter.grad is None or not parameter.grad.any()):
            problems.append(f'no gradient at {name}')
        elif name not in own and name not in trained and parameter.grad is not None:
            problems.append(f'a gradient at {name}, which is frozen')
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1).step()
    tuned.train()
    moved = [n for n, t in frozen_tensors(tuned) if not torch.equal(t, before[n])]
    problems += [f'{name} moved' for name in moved]
    return problems[:3]


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
            pretrains = str(row['model_type']).rpartition('.')[2] in PRETRAINING
            count[place, pretrains][worst] += 1
            if worst not in ('ok', 'not run'):
                why = reason if status in (worst, 'stock fails') else tried['reason']
                reasons[place, worst].add(why.splitlines()[0] if why else '')
    text = [
        '# Coverage: stock configs that can be Pro-tuned',
        '',
        'Every config that the libraries ship. "ok": the rewritten config builds; and its backbone',
        'starts exactly as stock (bit for bit with `lean=False`; with lean layers to 1e-5, or in',
        'float64 where rounding grows), gives every prompt and nothing frozen a gradient, leaves',
        'all frozen tensors as they are in a step, and has prompts of at most',
        f'{LIMIT:.0%} of its parameters. "stock fails": the stock config does not build or run in',
        'this environment either.',
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
            f'{sum(total.values())} configs: {total["ok"]} ok; {total["backbone ok"]} with an ok '
            f'backbone in a model that does not build here as stock; {total["refused"]} refused; '
            f'{total["failed"]} failed; {total["stock fails"]} whose stock backbone does not run '
            'here.',
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
    steps = sorted((r for r in rows if r['key'].startswith('step ')), key=lambda r: r['key'])
    trained = [row['type'] for row in steps if row['status'] == 'ok']
    tried = {(row['file'].partition('::')[0], row['type']) for row in steps}
    types = {(row['library'], str(row['model_type'])) for row in configs}
    untried = [' '.join(kind) for kind in sorted(types - tried)]
    text += ['## A training step of every model type', '']
    text += [
        'Two steps on generated data through the whole model, one config a type: finite loss, a',
        'gradient at every prompt, frozen bits as they were. '
        f'{len(trained)} of {len(steps)} types: {", ".join(trained)}.',
        '',
    ]
    text += [
        f'- {row["type"]} ({row["file"]}), {row["status"]}: {row["reason"].splitlines()[0]}'
        for row in steps
        if row['status'] != 'ok'
    ]
    if untried:
        text += ['', f'Not tried, or the model does not build: {", ".join(untried)}.']
    text += ['', '## Reasons', '']
    text += [
        f'- {library} {kind}, {status}: {reason}'
        for ((library, kind), status), found in sorted(reasons.items())
        for reason in sorted(found)
    ]
    versions = ', '.join(f'{k} {v}' for k, v in stack_versions().items())
    return '\n'.join([*text, '', f'Run with {versions}.', ''])


ORDER = ('not run', 'ok', 'backbone ok', 'no backbone', 'stock fails', 'refused', 'failed')


if __name__ == '__main__':
    main()
