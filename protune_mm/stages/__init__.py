"""The stage table: where the stages of each backbone family end. One row a family.

To add a backbone, add one :class:`Family` to :data:`FAMILIES`; the tests run over the table, with
the row's own example configs. A project adds a row for its own class by :func:`add_family`. See
docs/add_a_backbone.md.
"""

from __future__ import annotations

from torch import nn

from .family import Family, Stage
from .maps import MAPS
from .paths import PATHS
from .refused import REFUSED
from .tokens import TOKENS
from .wrapped import WRAPPED

__all__ = [
    'FAMILIES', 'LIBRARIES', 'Family', 'Stage', 'add_family', 'find_family', 'is_theirs',
    'known_families', 'refusal',
]  # fmt: skip

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
FAMILIES: tuple[Family, ...] = (*MAPS, *TOKENS, *PATHS, *WRAPPED)
_own: dict[type, Family] = {}


def add_family(backbone_type: type, family: Family) -> None:
    """Add a row for a backbone class of one's own, and the classes that derive from it.

    Args:
        backbone_type: the class.
        family: its row; ``name`` is for messages, and ``examples`` is not needed.

    Raises:
        TypeError: ``backbone_type`` is no class of a module.
    """
    if not (isinstance(backbone_type, type) and issubclass(backbone_type, nn.Module)):
        raise TypeError(f'add_family({backbone_type!r}, ...): give the class of the backbone')
    _own[backbone_type] = family


def find_family(backbone_type: type) -> Family | None:
    """Row of a backbone class: of itself, else of the nearest parent that has one.

    Only backbone classes of the three libraries match by name, so that a user's own class that
    merely shares a name with one is not taken for it; that has a row by :func:`add_family`.

    Args:
        backbone_type: class of the stock backbone.

    Returns:
        Family, or None where no class in the MRO has a row.
    """
    rows = {family.name: family for family in FAMILIES}
    for parent in backbone_type.__mro__:
        if parent in _own:
            return _own[parent]
        if is_theirs(parent) and '.backbones.' in parent.__module__ and parent.__name__ in rows:
            return rows[parent.__name__]
    return None


def refusal(backbone_type: type) -> str | None:
    """Why a backbone class, or a parent of it, cannot be Pro-tuned; None where it can."""
    for parent in backbone_type.__mro__:
        if is_theirs(parent) and parent.__name__ in REFUSED:
            return REFUSED[parent.__name__]
    return None


def known_families() -> str:
    """Names of the rows, for messages."""
    return ', '.join(family.name for family in FAMILIES)


def is_theirs(kind: type) -> bool:
    """Whether a class is of one of the three libraries."""
    return kind.__module__.split('.')[0] in LIBRARIES
