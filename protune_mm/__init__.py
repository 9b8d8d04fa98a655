"""Pro-tuning for MMDetection, MMSegmentation and MMPretrain."""

from .checkpoints import tuned_state_dict
from .config import load_config, overlay, protune_config
from .factory import ProTuned
from .inject import protune
from .merge import merge
from .prompt_sets import PromptSets
from .tuned import tuned_parameters
from .version import __version__


def __getattr__(name: str) -> type:
    """What configs name as ``'protune_mm.NAME'``, for configs in pure Python that import it."""
    from mmengine.registry import Registry

    from . import registry

    for group in vars(registry).values() if not name.startswith('_') else ():
        if isinstance(group, Registry) and group.scope == 'protune_mm':
            group.import_from_location()
            if name in group.module_dict:
                return group.module_dict[name]
    raise AttributeError(f"module 'protune_mm' has no attribute '{name}'")


__all__ = [
    'ProTuned',
    'PromptSets',
    '__version__',
    'load_config',
    'merge',
    'overlay',
    'protune',
    'protune_config',
    'tuned_parameters',
    'tuned_state_dict',
]
