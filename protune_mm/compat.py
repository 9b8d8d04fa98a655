"""What protune_mm does so that several versions of the stack behave alike.

Imported by :mod:`protune_mm.registry`, so it has run before any model is built, whichever of
the three spellings a user chose.
"""

from __future__ import annotations

import collections
import importlib
import pickle
import platform
import re
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.runner.checkpoint import CheckpointLoader

STACK = ('torch', 'torchvision', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
"""Import names of the packages whose versions decide how a model behaves."""


def stack_versions() -> dict[str, str]:
    """Versions of the installed stack, by import name.

    The import name is the same for the original libraries and for the maintained forks, the
    distribution name is not, so the distribution is looked up from the import name.

    Returns:
        dict[str, str]: import name to ``'distribution version'`` (just the version where both
        names agree), or ``'not installed'``.
    """
    owners = packages_distributions()
    found = {}
    for name in STACK:
        owner = owners.get(name, [name])[0]
        try:
            found[name] = version(owner) if owner == name else f'{owner} {version(owner)}'
        except PackageNotFoundError:
            found[name] = 'not installed'
    return found


def processor(info: str = '/proc/cpuinfo') -> str:
    """Kind of CPU: ``AMD EPYC (family 25, model 17)``; empty where the system does not tell.

    The numbers are there because a cloud may give one name to several kinds, which differ in speed
    and round differently.

    Args:
        info: what Linux tells of it.
    """
    text = Path(info).read_text() if Path(info).exists() else ''
    found: dict[str, str] = {}
    for name, value in re.findall(r'^(model name|cpu family|model)\s*: *(.*)$', text, re.M):
        found.setdefault(name, value.strip())
    if not found.get('model name'):
        return platform.processor()
    numbers = [
        f'{short} {found[name]}'
        for name, short in (('cpu family', 'family'), ('model', 'model'))
        if name in found
    ]
    return found['model name'] + (f' ({", ".join(numbers)})' if numbers else '')


def register_config_packages() -> None:
    """Make ``protune_mm::...`` and, under the maintained forks, ``mmseg::...`` resolve.

    mmengine maps the scope to a distribution and joins the distribution's location with its
    name. An editable install (PEP 660) has its metadata in site-packages and its code elsewhere,
    which that misses; a name that is a module but no distribution makes mmengine ask Python's
    import system instead, which is right for wheels, editable installs and PYTHONPATH alike.
    """
    MODULE2PACKAGE.setdefault('protune_mm', 'protune_mm.registry')
    owners = packages_distributions().get('mmseg', [])
    if owners and 'mmsegmentation' not in owners:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


def allow_checkpoint_types() -> None:
    """Let ``torch.load`` of torch 2.6 and later read mmengine's own checkpoints.

    Since torch 2.6 the default is ``weights_only=True``, and mmengine 0.10 passes nothing, so
    ``--resume``, and loading any file of mmengine's CheckpointHook, fails on the log history in
    ``message_hub``. The types allowed here hold numbers only; nothing that runs code on reading
    is allowed.
    """
    if _torch_version() < (2, 6):
        return  # The default is weights_only=False there.
    core = importlib.import_module(
        'numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray'
    )
    # numpy has no module of dtype classes before 1.25, and does not pickle them then.
    named = getattr(np, 'dtypes', None)
    dtypes = [getattr(named, name) for name in named.__all__] if named else []
    types: list = [HistoryBuffer, np.ndarray, np.dtype, *dtypes, collections.defaultdict]
    types += [int, float, bool, str, list, dict, set, (history_statistic, 'builtins.getattr')]
    # A file may have been written under numpy 1 and read under 2, or the other way round.
    for module in ('numpy._core.multiarray', 'numpy.core.multiarray'):
        types += [(core._reconstruct, f'{module}._reconstruct'), (core.scalar, f'{module}.scalar')]
    torch.serialization.add_safe_globals(types)


def history_statistic(owner: object, name: str) -> object:
    """Stand in for ``getattr`` in checkpoints: a log history pickles its own methods.

    Allowing ``getattr`` itself would let a file call anything.

    Raises:
        UnpicklingError: anything but a statistic of :class:`HistoryBuffer`.
    """
    if owner is not HistoryBuffer or name not in HISTORY_STATISTICS:
        raise pickle.UnpicklingError(f'a checkpoint asks for attribute {name!r} of {owner!r}')
    return getattr(owner, name)


HISTORY_STATISTICS = ('min', 'max', 'current', 'mean', 'statistics')


def load_local_checkpoint(filename: str, map_location: object = None) -> object:
    """Read a checkpoint file without running code in it, and say so if it is damaged.

    mmengine's own calls ``torch.load``, which compares no checksums: a file in which some bits
    changed would be a wrong model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut short or damaged, or holds more than tensors and numbers.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{filename} can not be found.')
    wrong = damage(path)
    if wrong:
        raise ValueError(f'checkpoint {path} cannot be read: {wrong}; use another copy of it')
    try:
        # From torch 2.6 on with weights_only=True, unless the user's environment says otherwise.
        return torch.load(path, map_location=map_location)
    except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError) as error:
        told = str(error)
        if 'WeightsUnpickler' in told or 'weights_only' in told or 'Weights only' in told:
            asked = re.search(r'GLOBAL ([\w.]+)', told)
            what = f'asks for {asked[1]}' if asked else 'holds more than tensors and numbers'
            raise ValueError(
                f'checkpoint {path} {what}, which could run any code, and is not read; if you '
                'trust it: torch.serialization.add_safe_globals'
            ) from error
        raise ValueError(f'checkpoint {path} cannot be read: {told.splitlines()[0]}') from error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None.

    ``torch.load`` does not compare the checksums that ``torch.save`` writes.

    Args:
        path: a file. One in PyTorch's old format has no checksums.
    """
    size = path.stat().st_size
    if size == 0:
        return 'it is empty'
    if not zipfile.is_zipfile(path):
        with path.open('rb') as file:
            # Pickle, as of torch below 1.6, starts with \x80; a zip archive cut short is none.
            start = file.read(1)
        return None if start == b'\x80' else 'it is no checkpoint, or cut short'
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError, RuntimeError) as error:
        return f'it is damaged ({error})'
    # torch.serialization.set_crc32_options(False) writes files that look like that.
    return f'its part {broken} is damaged, or was written without checksums' if broken else None


def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split('.')[:2])


register_config_packages()
CheckpointLoader.register_scheme(prefixes='', loader=load_local_checkpoint, force=True)
allow_checkpoint_types()
