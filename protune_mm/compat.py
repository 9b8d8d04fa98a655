"""What protune_mm does so that several versions of the stack behave alike.

Imported by :mod:`protune_mm.registry`, so it has run before any model is built, whichever of
the three spellings a user chose.
"""

from __future__ import annotations

import collections
import importlib
import pickle
from importlib.metadata import PackageNotFoundError, packages_distributions, version

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging.history_buffer import HistoryBuffer

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
    major, minor = (int(part) for part in torch.__version__.split('.')[:2])
    if (major, minor) < (2, 6):
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


register_config_packages()
allow_checkpoint_types()
